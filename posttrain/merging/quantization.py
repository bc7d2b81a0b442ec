"""The base that a 4-bit training saw: put on its grid and taken back, from files, never from a live model.

bitsandbytes' arithmetic without its packing (QLoRA, arXiv 2305.14314). A tensor's elements, row after row, are cut
into blocks of 64; the last may be short. With a = max |w| over a block,

    w' = value[q] * s,   q = the nearest of 16 values to w / a,   s = a

and under double quantisation s is `a` in 8 bits: with m the mean of all a, c = max |a - m| over 256 blocks,

    s = dynamic[p] * c + m,   p = the nearest of 256 values to (a - m) / c      (dynamic: arXiv 1511.04561)
"""

from __future__ import annotations

import math
import re
from collections.abc import Container
from dataclasses import dataclass
from functools import cache

import torch

from posttrain.errors import CheckpointError
from posttrain.merging.adapter import EMBEDDINGS
from posttrain.merging.header import BYTES, FLOATS, TensorInfo
from posttrain.merging.tensors import TORCH, ReadBytes, byte_range, read_bytes

GROUP = 256
"""Blocks that share a scale of scales under double quantisation."""
_CHUNK = 1 << 18
"""Elements of the first pass at a time: 1 MiB in fp32."""
CELLS = 1024
"""Cells of [-1, 1] in the table of a 4-bit code: fp4 has bounds that are 0.0026 apart."""
_HALF = torch.tensor(CELLS / 2)
_TINY = 1e-38
"""Least scale that bitsandbytes divides by."""
_NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""QLoRA, appendix E: quantiles of a normal distribution, scaled to [-1, 1]."""
_FP4 = (0.0, 0.0625, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0)
"""One sign, two exponent, one mantissa bit; bitsandbytes divides by the largest. Zero exists with both signs."""
_FP4_CUDA_BOUNDS = (0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333)
"""Not quite the midpoints: bitsandbytes' CUDA kernel has them as these decimals."""


@dataclass(frozen=True)
class QuantSpec:
    """How bitsandbytes quantised the base; every field changes the numbers."""

    quant_type: str = "nf4"
    """`nf4` or `fp4`."""
    double_quant: bool = True
    """Whether the block scales are quantised to 8 bits as well."""
    blocksize: int = 64
    """Elements that share a scale; transformers always takes 64."""
    source_dtype: str = "bfloat16"
    """Dtype in which the base was loaded before it was quantised."""
    skipped: tuple[str, ...] = ("lm_head",)
    """Modules left as they were, as transformers' `llm_int8_skip_modules` spells them; unused beside `modules`."""
    modules: tuple[str, ...] | None = None
    """Modules that training held in 4 bits, by the names of the base's files; None: told from `skipped`."""
    device: str = "cpu"
    """Where training quantised, `cpu` or `cuda`: the two round 8-bit scales and fp4's ties differently."""

    @property
    def dtype(self) -> torch.dtype:
        """`source_dtype` as torch knows it."""
        return torch_dtype(self.source_dtype)


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a config's word for it; ValueError for anything a model is not stored in."""
    known = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    if name not in known:
        raise ValueError(f"dtype {name!r} is none of {', '.join(known)}")
    return known[name]


def is_quantised(info: TensorInfo, spec: QuantSpec) -> bool:
    """Whether training held this tensor in 4 bits: recorded, or else the weight of a linear layer not skipped.

    Without a record embeddings are told by their name, since a file does not name layer types.

    Raises:
        CheckpointError: no record, and a mixture of experts: transformers 5 holds experts as fused parameters,
            which are not quantised, older ones as linear layers, which are.
    """
    module, _, kind = info.name.rpartition(".")
    if spec.modules is not None:
        return kind == "weight" and module in spec.modules
    if kind != "weight" or info.dtype not in FLOATS or module.rsplit(".", 1)[-1] in EMBEDDINGS:
        return False
    if any(_skips(pattern, module) for pattern in spec.skipped):
        return False
    if len(info.shape) > 2 or re.search(r"\.experts\.\d+\.", module):
        raise CheckpointError(
            str(info.file),
            f"{info.name} belongs to experts: which of them training quantised was not recorded",
            "use `base: original` for this architecture",
        )
    return len(info.shape) == 2


def check_modules(spec: QuantSpec, tensors: Container[str]) -> None:
    """Raises CheckpointError when training quantised a module that the base's files do not name."""
    for module in spec.modules or ():
        if f"{module}.weight" not in tensors:
            raise CheckpointError(
                module,
                "was quantised in training, but the base's files have no tensor of that name",
                "use `base: original` for this architecture",
            )


def _skips(pattern: str, module: str) -> bool:
    """transformers' should_convert_module: from the start up to a module boundary, or as a suffix."""
    return bool(re.match(rf"(?:{pattern})(?:(?<=\.)|(?=\.|$))", module)) or module.endswith(pattern)


class Grid:
    """A tensor as bitsandbytes' Linear4bit holds it: scales in memory, rows computed when they are asked for.

    A first pass over the file finds the scales, since double quantisation needs the mean of all of them; two
    fp32 numbers per block are kept. Every number is to the bit that of bitsandbytes 0.50 on a CPU (the sign of
    an fp4 zero aside). For `cuda` the choice among the 16 values is the GPU's for bf16 weights; double quantised
    scales may differ from its in the last bit of fp32, since a GPU sums their mean in another order.

    Args:
        info: any float dtype; converted to `spec.dtype` first, as when a training loads it.

    Raises:
        CheckpointError: values that are not finite.
    """

    def __init__(self, info: TensorInfo, spec: QuantSpec) -> None:
        self._info, self._spec = info, spec
        self._width = math.prod(info.shape[1:])
        self._code = _code(spec.quant_type, spec.device)
        step = max(1, _CHUNK // spec.blocksize) * spec.blocksize
        pieces = [self._block_maxima(begin, min(begin + step, info.numel)) for begin in range(0, info.numel, step)]
        self._maxima = torch.cat(pieces)
        if not self._maxima.isfinite().all():
            raise CheckpointError(str(info.file), f"{info.name} has values that are not finite", "restore the base")
        if info.numel % spec.blocksize:
            self._maxima[-1].clamp_(min=_TINY)  # as bitsandbytes does, for a short block only
        self._scales = _rounded_scales(self._maxima, spec.device) if spec.double_quant else self._maxima

    def rows(self, start: int, stop: int, read: ReadBytes = read_bytes) -> torch.Tensor:
        """Rows [start, stop) in fp32, rounded to `spec.dtype`, into which bitsandbytes dequantises."""
        size = self._spec.blocksize
        weights = self._as_loaded(read(self._info, *byte_range(self._info, start, stop)))
        if self._width % size == 0:
            blocks = slice(start * self._width // size, stop * self._width // size)
            weights = weights.view(-1, size)
            inverse = self._maxima[blocks].clamp(min=_TINY).reciprocal_().view(-1, 1)
            found = self._nearest(weights.mul_(inverse)).mul_(self._scales[blocks].view(-1, 1))
        else:
            place = torch.arange(start * self._width, stop * self._width)
            found = self._nearest(self._normalised(weights, place // size)).mul_(self._scales[self._scale_of(place)])
        return found.to(self._spec.dtype).float().view(stop - start, *self._info.shape[1:])

    def _as_loaded(self, content: torch.Tensor) -> torch.Tensor:
        """Bytes of the file as flat fp32 numbers that `spec.dtype` can hold."""
        return content.view(TORCH[self._info.dtype]).to(self._spec.dtype).to(torch.float32, copy=True)

    def _block_maxima(self, begin: int, end: int) -> torch.Tensor:
        """max |w| of each block of the elements [begin, end)."""
        item = BYTES[self._info.dtype]
        content = read_bytes(self._info, begin * item, (end - begin) * item)
        weights = content.view(TORCH[self._info.dtype]).to(self._spec.dtype)
        words = torch.int32 if weights.element_size() == 4 else torch.int16
        sizes = weights.view(words) & torch.iinfo(words).max  # bits without a sign are in the order of |w|
        short = -len(sizes) % self._spec.blocksize
        blocks = torch.nn.functional.pad(sizes, (0, short)).view(-1, self._spec.blocksize)
        return blocks.amax(1).view(weights.dtype).float()

    def _normalised(self, weights: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
        """w / a where blocks cross rows: times the reciprocal, but divided in a short last block, as bitsandbytes."""
        maxima = self._maxima[block]
        short = block == self._info.numel // self._spec.blocksize
        return torch.where(short, weights / maxima, weights * maxima.clamp(min=_TINY).reciprocal_())

    def _scale_of(self, place: torch.Tensor) -> torch.Tensor:
        """The block whose scale an element gets: its own, but for an error of bitsandbytes on CPUs with AVX512.

        Where rows are no whole number of blocks but one of 16 elements, its kernel (0.50, CPU) starts each row at
        block `row * (width // blocksize)`. The training saw those numbers, so they are what is wanted here.
        """
        size, width = self._spec.blocksize, self._width
        if self._spec.device != "cpu" or width % 16 or size >= 2048 or _cpu() != "AVX512":
            return place // size
        return place // width * (width // size) + place % width // size

    def _nearest(self, numbers: torch.Tensor) -> torch.Tensor:
        """The values of the code nearest to numbers of [-1, 1], by passes that vectorise."""
        cell = torch.add(_HALF, numbers, alpha=CELLS / 2).int()
        bound = self._code.bounds.index_select(0, cell.view(-1).long()).view(numbers.shape)
        cell.add_(torch.gt(numbers, bound, out=bound).int(), alpha=CELLS + 1)
        return self._code.values.index_select(0, cell.view(-1).long()).view(numbers.shape)


def _cpu() -> str:
    return torch.backends.cpu.get_cpu_capability()


@dataclass(frozen=True)
class _Code:
    """A 4-bit code over cells of [-1, 1] so small that none has more than one bound between two values."""

    bounds: torch.Tensor
    """The bound in each cell, or infinity; it belongs to the value below it."""
    values: torch.Tensor
    """Of each cell below its bound, then of each cell above it."""


@cache
def _code(quant_type: str, device: str) -> _Code:
    values, bounds = _nf4() if quant_type == "nf4" else _fp4(device)
    cells = torch.add(_HALF, bounds, alpha=CELLS / 2).int()  # as in use, so that rounding moves both alike
    table = torch.full((CELLS + 1,), math.inf)
    table[cells] = bounds
    below = torch.bincount(cells + 1, minlength=CELLS + 1)[: CELLS + 1].cumsum(0)
    return _Code(table, torch.cat([values[below], values[below + table.isfinite()]]))


def _nf4() -> tuple[torch.Tensor, torch.Tensor]:
    """The 16 values in ascending order, and the 15 bounds between them."""
    values = torch.tensor(_NF4)
    return values, (values[1:] + values[:-1]) / 2


def _fp4(device: str) -> tuple[torch.Tensor, torch.Tensor]:
    positive = torch.tensor(_FP4) / _FP4[-1]
    values = torch.cat([-positive.flip(0), positive])
    if device == "cpu":
        return values, (values[1:] + values[:-1]) / 2
    upper = torch.tensor(_FP4_CUDA_BOUNDS)  # on |w|, so that a negative one belongs to the value above it
    return values, torch.cat([torch.nextafter(-upper.flip(0), torch.tensor(-2.0)), torch.zeros(1), upper])


def _rounded_scales(maxima: torch.Tensor, device: str) -> torch.Tensor:
    """Block scales in 8 bits and back; the CPU finds the nearest value over 65536 cells, the GPU exactly."""
    values, cells = _dynamic()
    mean = maxima.mean()
    groups = torch.nn.functional.pad(maxima - mean, (0, -len(maxima) % GROUP)).view(-1, GROUP)
    largest = groups.abs().amax(1, keepdim=True)
    numbers = (groups * largest.reciprocal()).nan_to_num_(nan=-1.0).clamp_(-1, 1)  # NaN: a group of zeros
    if device == "cpu":
        nearest = cells[((numbers + 1) * 0.5 * (len(cells) - 1) + 0.5).long()]
    else:
        nearest = values[torch.bucketize(numbers, (values[1:] + values[:-1]) / 2)]
    return nearest.mul_(largest).view(-1)[: len(maxima)] + mean


@cache
def _dynamic() -> tuple[torch.Tensor, torch.Tensor]:
    """The 256 values of the dynamic 8-bit type (arXiv 1511.04561), and the nearest of them to 65536 points of [-1, 1].

    Seven decades, in each of them twice as many steps as in the one below, of both signs; 0 and 1.
    """
    decades = []
    for number in range(7):
        edges = torch.linspace(0.1, 1, 2**number + 1)
        decades.append((edges[:-1] + edges[1:]) / 2 * 10.0 ** (number - 6))
    positive = torch.cat(decades)
    values = torch.cat([-positive, torch.tensor([0.0, 1.0]), positive]).sort().values
    points = -1 + 2 * torch.arange(1 << 16, dtype=torch.float32) / ((1 << 16) - 1)
    return values, values[torch.bucketize(points, (values[1:] + values[:-1]) / 2)]
