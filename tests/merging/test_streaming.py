"""What a merge is made of: reading ahead, arithmetic in one thread, hashing and writing in others."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from merging import tiny
from safetensors.torch import load_file

from posttrain.errors import CheckpointError
from posttrain.merging import writer
from posttrain.merging.adapter import read_adapter
from posttrain.merging.checkpoint import open_checkpoint
from posttrain.merging.edits import merged_blocks
from posttrain.merging.header import TensorInfo
from posttrain.merging.merge import merge, merge_into
from posttrain.merging.plan import plan_merge
from posttrain.merging.tensors import ReadAhead, byte_blocks, read_tensor, streaming
from posttrain.merging.writer import FileWriter


def test_headers_and_checkpoints_are_read_without_torch() -> None:
    code = "import sys, posttrain.merging.checkpoint; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "False\n"


def write_all(path: Path) -> bytes:
    """Writes pieces that fit a buffer, that do not, and that leave no page whole; returns what should be there."""
    generator = torch.Generator().manual_seed(0)
    expected = b""
    with FileWriter(path) as file:
        for size in (8, 3, 40_000, 4096, 0, 100_001, 65_536, 300_000, 1):
            piece = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)
            expected += bytes(piece.numpy())
            if size % 2:
                file.write(bytes(piece.numpy()))
            else:
                file.write_tensor(piece)
            room = file.room(16)
            room.copy_(torch.arange(16, dtype=torch.uint8))
            expected += bytes(range(16))
    assert file.describe() == {"sha256": hashlib.sha256(expected).hexdigest(), "bytes": len(expected)}
    return expected


@pytest.fixture
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "_BUFFER", 1 << 16)


@pytest.mark.usefixtures("small_buffers")
def test_file_is_what_was_given(tmp_path: Path) -> None:
    assert write_all(tmp_path / "x") == (tmp_path / "x").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.mark.usefixtures("small_buffers")
@pytest.mark.parametrize("refused", ["open", "write"])
def test_file_system_without_direct_writes(refused: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original: Callable[..., int] = getattr(os, refused)
    refusals = []

    def refuse(first: object, second: object, *rest: object) -> int:
        flags = second if refused == "open" else writer.fcntl.fcntl(first, writer.fcntl.F_GETFL)
        if flags & os.O_DIRECT:
            refusals.append(1)
            raise OSError(errno.EINVAL, "Invalid argument")
        return original(first, second, *rest)

    monkeypatch.setattr(os, refused, refuse)
    assert write_all(tmp_path / "x") == (tmp_path / "x").read_bytes()
    assert len(refusals) == 1


@pytest.mark.usefixtures("small_buffers")
def test_disk_that_fills_up_while_a_thread_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, written = os.write, [0]

    def fill(file: int, content: memoryview) -> int:
        if written[0] > 200_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        written[0] += (count := original(file, content[: 1 << 15]))  # a short write is not an error
        return count

    monkeypatch.setattr(os, "write", fill)
    before = threading.active_count()
    with pytest.raises(CheckpointError, match="No space left on device"):
        write_all(tmp_path / "x")
    assert list(tmp_path.iterdir()) == []
    assert threading.active_count() == before


def test_reading_ahead_gives_the_same_bytes_in_any_order(tmp_path: Path) -> None:
    content = bytes(range(256)) * 40
    (tmp_path / "x").write_bytes(content)
    one, two = (TensorInfo(name, "U8", (5000,), tmp_path / "x", start) for name, start in (("a", 100), ("b", 5100)))
    pieces = [piece for info in (one, two) for piece in byte_blocks(info, 1000)]
    asked = [(one, 0, 250), (one, 250, 750), (two, 10, 20), (one, 1000, 1000), (one, 0, 250), (one, 2000, 1500)]
    asked += [(two, 0, 1000), (one, 3000, 1000), (two, 1000, 10), (two, 4000, 1000)]
    with ReadAhead(iter(pieces), ahead=2) as read:
        for info, begin, length in asked:
            start = info.start + begin
            assert bytes(read(info, begin, length).numpy()) == content[start : start + length]


def test_error_of_reading_ahead_is_raised_where_the_bytes_are_asked_for(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(bytes(1500))
    info = TensorInfo("a", "U8", (3000,), tmp_path / "x", 0)
    with ReadAhead(byte_blocks(info, 1000)) as read:
        assert len(read(info, 0, 1000)) == 1000
        with pytest.raises(CheckpointError, match="ends inside a"):
            read(info, 1000, 1000)
        (tmp_path / "x").unlink()
        with pytest.raises(CheckpointError, match="cannot be read: No such file"):
            read(info, 500, 1000)


def test_threads_are_as_before_a_merge(tmp_path: Path) -> None:
    base = tiny.save_base(tmp_path / "base", False, torch.bfloat16, shards=True)
    threads, running = torch.get_num_threads(), threading.active_count()
    torch.set_num_threads(3)
    try:
        with streaming():
            assert torch.get_num_threads() == 1
        merge(base, [], tmp_path / "out", "float32")
        assert torch.get_num_threads() == 3
        with pytest.raises(TypeError):
            merge_into(tmp_path, base, [], "float32", block=None)  # type: ignore[arg-type]
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    assert threading.active_count() == running


@pytest.mark.parametrize("alpha", [6, 8], ids=["scale 1.5", "scale 2"])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_sum_in_fp32_to_the_bit(stored: torch.dtype, alpha: int, tmp_path: Path) -> None:
    base = tiny.save_base(tmp_path / "base", False, stored, shards=False)
    adapter = tiny.save_adapter(base, tmp_path / "adapter", target_modules=["q_proj", "up_proj"], lora_alpha=alpha)
    weights, factors = load_file(base / "model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    for block in (64, 1 << 19):  # rows in any number of blocks
        (tmp_path / str(block)).mkdir()
        merge_into(tmp_path / str(block), base, [adapter], "bfloat16", block=block)
        merged = load_file(tmp_path / str(block) / "model.safetensors")
        for name, weight in weights.items():
            key = f"base_model.model.{name.removesuffix('.weight')}.lora_{{}}.weight"
            if key.format("A") in factors:
                weight = weight.float() + (factors[key.format("B")] @ factors[key.format("A")]) * (alpha / 4)
            assert torch.equal(merged[name], weight.bfloat16()), name


def test_blocks_do_not_share_memory(tmp_path: Path) -> None:
    base = tiny.save_base(tmp_path / "base", False, torch.float32, shards=False)
    adapter = tiny.save_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    outputs = plan_merge(open_checkpoint(base), [read_adapter(adapter)]).outputs
    output = next(output for output in outputs if "q_proj" in output.name)
    kept = [rows for _, rows in merged_blocks(output, None, block=128)]
    again = [rows.clone() for _, rows in merged_blocks(output, None, block=128)]
    assert all(torch.equal(one, other) for one, other in zip(kept, again, strict=True))
    assert torch.equal(torch.cat([rows for rows, _ in merged_blocks(output, None, 128)]), read_tensor(output.base))
