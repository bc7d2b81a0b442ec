"""Tensors of safetensors files in memory: rows read on demand, read ahead in a thread."""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import torch

from posttrain.errors import CheckpointError
from posttrain.merging.header import BYTES, TensorInfo

TORCH: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""The format's word for a dtype -> torch's."""
CODES = {dtype: code for code, dtype in TORCH.items()}


ReadBytes = Callable[[TensorInfo, int, int], torch.Tensor]
"""(tensor, first byte of it, how many) -> those bytes, uint8; memory that nobody else changes or reads again."""


def read_bytes(info: TensorInfo, begin: int, length: int) -> torch.Tensor:
    """Reads bytes [begin, begin + length) of a tensor, without making one of its dtype.

    Raises:
        CheckpointError: the file ends before them.
    """
    return read_into(torch.empty(length, dtype=torch.uint8), info, begin)


def read_into(flat: torch.Tensor, info: TensorInfo, begin: int) -> torch.Tensor:
    """Fills `flat` (uint8) with a tensor's bytes from `begin` on, and returns it; raises as `read_bytes`."""
    view = memoryview(flat.numpy())
    try:
        with info.file.open("rb", buffering=0) as stream:
            done = 0
            while done < len(view):
                count = os.preadv(stream.fileno(), [view[done:]], info.start + begin + done)
                if count == 0:
                    raise CheckpointError(str(info.file), f"ends inside {info.name}", "copy or download the file again")
                done += count
    except OSError as error:
        raise CheckpointError(str(info.file), f"cannot be read: {error.strerror}", "see that it is there") from error
    return flat


def byte_range(info: TensorInfo, start: int, stop: int) -> tuple[int, int]:
    """Rows [start, stop) as (first byte within the tensor, how many)."""
    row = math.prod(info.shape[1:]) * BYTES[info.dtype]
    return start * row, (stop - start) * row


def read_rows(info: TensorInfo, start: int, stop: int, read: ReadBytes = read_bytes) -> torch.Tensor:
    """Reads rows [start, stop) in the file's own dtype; shape (stop - start, *rest), a scalar as (1,)."""
    flat = read(info, *byte_range(info, start, stop))
    return flat.view(TORCH[info.dtype]).view(stop - start, *info.shape[1:])


def read_tensor(info: TensorInfo) -> torch.Tensor:
    """Reads a whole tensor in the file's own dtype."""
    return read_rows(info, 0, info.rows).view(info.shape)


def byte_blocks(info: TensorInfo, size: int = 1 << 20) -> Iterator[tuple[TensorInfo, int, int]]:
    """Yields (tensor, first byte, how many) over a tensor that is copied as bytes."""
    for begin in range(0, info.nbytes, size):
        yield info, begin, min(size, info.nbytes - begin)


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """A tensor's elements, row after row, as a file holds them; shares its memory where it is contiguous."""
    if not tensor.numel():
        return memoryview(b"")
    return memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())


class ReadAhead:
    """A `ReadBytes` that takes its blocks from larger pieces, which a thread has read before they are asked for.

    Args:
        pieces: (tensor, first byte, how many), in the order in which blocks of theirs will be asked for. Others
            may be asked for in between; they are read at once.
        ahead: pieces in memory beyond the one in use.

    An error of the thread is raised where its piece is asked for.
    """

    def __init__(self, pieces: Iterable[tuple[TensorInfo, int, int]], ahead: int = 3) -> None:
        self._pieces = iter(pieces)
        self._ahead = ahead
        self._pending: deque[tuple[TensorInfo, int, int, Future[torch.Tensor]]] = deque()
        self._now: tuple[TensorInfo, int, int] | None = None
        self._content = torch.empty(0, dtype=torch.uint8)

    def __enter__(self) -> ReadAhead:
        self._thread = ThreadPoolExecutor(1, "read")
        self._submit()
        return self

    def __call__(self, info: TensorInfo, begin: int, length: int) -> torch.Tensor:
        """Returns those bytes, which share the memory of their piece."""
        if self._now is None or not _covers(self._now, info, begin, length):
            if not self._pending or not _covers(self._pending[0][:3], info, begin, length):
                return read_bytes(info, begin, length)
            of, first, count, content = self._pending.popleft()
            self._submit()
            self._now, self._content = (of, first, count), content.result()
        begin -= self._now[1]
        return self._content[begin : begin + length]

    def _submit(self) -> None:
        while len(self._pending) < self._ahead and (piece := next(self._pieces, None)):
            self._pending.append((*piece, self._thread.submit(read_bytes, *piece)))

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(cancel_futures=True)


def _covers(piece: tuple[TensorInfo, int, int], info: TensorInfo, begin: int, length: int) -> bool:
    return piece[0] is info and piece[1] <= begin and begin + length <= piece[1] + piece[2]


@contextmanager
def streaming() -> Iterator[None]:
    """Makes ready for arithmetic on many small blocks, beside threads that read, hash and write.

    One thread computes meanwhile: OpenMP's others wait by spinning, and where they share cores with ours, blocks
    as small as these took 10 times as long in two threads as in one (measured on two cores); disk and hash
    are no faster than one thread's arithmetic. And the C allocator is told to keep what is freed: glibc raises
    its thresholds to the largest block freed so far, up to 32 MiB (mallopt(3), M_MMAP_THRESHOLD), without which
    every block would come by page faults, which took as long as the arithmetic.
    """
    before = torch.get_num_threads()
    torch.empty(31 << 20, dtype=torch.uint8)  # freed at once, never touched
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
