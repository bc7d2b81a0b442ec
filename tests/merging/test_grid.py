"""The 4-bit grid, computed without packing, against bitsandbytes to the bit."""

from __future__ import annotations

from pathlib import Path

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from posttrain.errors import CheckpointError
from posttrain.merging.header import TensorInfo, read_header
from posttrain.merging.quantization import Grid, QuantSpec

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SPECIAL = [0.0, -0.0, 1e-40, -1e-40, 5e-39, 1.2e-38, 6e-8, 1.0, -1.0, 0.5, 6e4, -6e4, 3e38, -3e38]


def store(weight: torch.Tensor, folder: Path) -> TensorInfo:
    save_file({"w": weight}, folder / "w.safetensors")
    return read_header(folder / "w.safetensors")[0]


def reference(weight: torch.Tensor, spec: QuantSpec, device: str = "cpu") -> torch.Tensor:
    packed, state = bnb.quantize_4bit(
        weight.to(spec.dtype).to(device),
        blocksize=spec.blocksize,
        compress_statistics=spec.double_quant,
        quant_type=spec.quant_type,
    )
    return bnb.dequantize_4bit(packed, state).view(weight.shape).cpu()


def assert_same_bits(found: torch.Tensor, expected: torch.Tensor, spec: QuantSpec) -> None:
    assert found.dtype == torch.float32
    expected = expected.float()
    if spec.quant_type == "fp4":  # which of the two zeros it is depends on bitsandbytes' kernel
        found, expected = found + 0.0, expected + 0.0
    assert torch.equal(found.view(torch.int32), expected.view(torch.int32))


def random_weight(seed: int, rows: int, width: int, spread: int, special: list[float]) -> torch.Tensor:
    """Normal numbers, rows of different sizes, a stretch of zeros, some values of choice."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((rows, width)) * 10.0 ** rng.integers(-spread, spread + 1, (rows, 1))
    flat = weight.reshape(-1)
    begin = int(rng.integers(0, flat.size))
    flat[begin : begin + int(rng.integers(0, 300))] = 0
    flat[rng.integers(0, flat.size, len(special))] = special
    return torch.from_numpy(weight).float()


@st.composite
def cases(draw: st.DrawFn) -> tuple[QuantSpec, torch.Tensor]:
    """A way to quantise, and a weight that fits into its dtype."""
    spec = QuantSpec(
        quant_type=draw(st.sampled_from(["nf4", "fp4"])),
        double_quant=draw(st.booleans()),
        blocksize=draw(st.sampled_from([32, 64, 128, 256, 4096])),
        source_dtype=draw(st.sampled_from(list(DTYPES))),
    )
    width = draw(st.one_of(st.integers(1, 300), st.sampled_from([16, 48, 64, 128, 192, 256, 1024, 4096])))
    special = draw(st.lists(st.sampled_from(SPECIAL), max_size=6))
    weight = random_weight(
        draw(st.integers(0, 2**32)), draw(st.integers(1, 70)), width, draw(st.integers(0, 6)), special
    )
    stored = DTYPES[draw(st.sampled_from(list(DTYPES)))]
    limit = min(torch.finfo(stored).max, torch.finfo(spec.dtype).max) / 2
    return spec, weight.clamp(-limit, limit).to(stored)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(case=cases(), cut=st.integers(1, 70))
def test_every_row_block_is_that_of_bitsandbytes(
    case: tuple[QuantSpec, torch.Tensor], cut: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    spec, weight = case
    grid = Grid(store(weight, tmp_path_factory.mktemp("grid")), spec)
    found = torch.cat([grid.rows(start, min(start + cut, len(weight))) for start in range(0, len(weight), cut)])
    with torch._dynamo.config.patch(disable=True):  # odd widths: bitsandbytes compiles for each
        expected = reference(weight, spec)
    assert_same_bits(found, expected, spec)


@pytest.mark.parametrize("shape", [(600, 1024), (3001, 200), (1, 700_001), (257, 64)], ids=str)
@pytest.mark.parametrize("spec", [QuantSpec(), QuantSpec("fp4", blocksize=128, source_dtype="float16")], ids=str)
def test_tensors_of_many_groups(spec: QuantSpec, shape: tuple[int, int], tmp_path: Path) -> None:
    weight = 0.02 * torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    with torch._dynamo.config.patch(disable=True):
        expected = reference(weight, spec)
    assert_same_bits(Grid(store(weight, tmp_path), spec).rows(0, shape[0]), expected, spec)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite(value: float, tmp_path: Path) -> None:
    weight = torch.ones(4, 64)
    weight[2, 7] = value
    with pytest.raises(CheckpointError, match="w has values that are not finite"):
        Grid(store(weight, tmp_path), QuantSpec())


def test_only_scales_stay_in_memory(tmp_path: Path) -> None:
    grid = Grid(store(torch.randn(512, 1024).bfloat16(), tmp_path), QuantSpec())
    held = [value for value in vars(grid).values() if isinstance(value, torch.Tensor)]
    assert sum(value.untyped_storage().nbytes() for value in held) <= 2 * 4 * 512 * 1024 / 64 + 1024


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_bounds_of_the_gpu(quant_type: str, tmp_path: Path) -> None:
    """A block whose largest element is 1: w / a is w, so that a bound can be hit; the GPU's kernel compares so."""
    limits = {
        "nf4": [
            -0.8480964004993439,
            -0.045525018125772476,
            0.03979014977812767,
            0.3893125355243683,
            0.8614784181118011,
        ],
        "fp4": [-0.8333333, -0.583333, -0.29166667, -0.00260417, 0.00260417, 0.0859375, 0.583333, 0.8333333],
    }[quant_type]
    bounds = torch.tensor(limits)
    inward, outward = bounds.nextafter(torch.zeros(1)), bounds.nextafter(bounds.sign() * 2)
    weight = torch.zeros(1, 64)
    weight[0, : 3 * len(bounds) + 1] = torch.cat([torch.ones(1), inward, bounds, outward])
    spec = QuantSpec(quant_type, double_quant=False, source_dtype="float32", device="cuda")
    at = Grid(store(weight, tmp_path), spec).rows(0, 1)[0, 1 : 3 * len(bounds) + 1].view(3, -1)
    larger = at.abs()[2] > at.abs()[0]
    assert larger.all()
    below = bounds < 0 if quant_type == "nf4" else torch.zeros(len(bounds), dtype=torch.bool)
    assert torch.equal(at[1], torch.where(below, at[2], at[0]))  # nf4 compares w, fp4 |w|: a bound is not above itself


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [False, True])
def test_gpu_quantises_so(quant_type: str, double_quant: bool, tmp_path: Path) -> None:
    weight = (0.02 * torch.randn(1024, 1024)).bfloat16()
    spec = QuantSpec(quant_type, double_quant, device="cuda")
    found, expected = Grid(store(weight, tmp_path), spec).rows(0, 1024), reference(weight, spec, "cuda").float()
    if double_quant:  # the mean of the scales is summed in another order: a scale's last bit
        torch.testing.assert_close(found, expected, rtol=2**-7, atol=0)
        assert (found != expected).float().mean() < 1e-3
    else:
        assert torch.equal(found, expected)
