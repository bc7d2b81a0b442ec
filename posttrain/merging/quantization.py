"""The base that a 4-bit training saw: quantised and dequantised from files, never from a live model."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from posttrain.errors import CheckpointError
from posttrain.merging.adapter import EMBEDDINGS
from posttrain.merging.header import FLOATS, TensorInfo


@dataclass(frozen=True)
class QuantSpec:
    """How bitsandbytes quantised the base; every field changes the numbers."""

    quant_type: str = "nf4"
    """`nf4` or `fp4`."""
    double_quant: bool = True
    """Whether the block scales are quantised to 8 bits as well (QLoRA, arXiv 2305.14314)."""
    blocksize: int = 64
    """Elements that share a scale; transformers always takes 64."""
    source_dtype: str = "bfloat16"
    """Dtype in which the base was loaded before it was quantised."""
    skipped: tuple[str, ...] = ("lm_head",)
    """Modules left as they were, as transformers' `llm_int8_skip_modules` spells them."""

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
    """Whether transformers puts this tensor in 4 bits: the weight of a linear layer that is not skipped.

    Embeddings are told by their name, since a file does not name layer types.

    Raises:
        CheckpointError: fused experts (three dimensions): their layer types cannot be told.
    """
    module, _, kind = info.name.rpartition(".")
    if kind != "weight" or info.dtype not in FLOATS or module.rsplit(".", 1)[-1] in EMBEDDINGS:
        return False
    if any(_skips(pattern, module) for pattern in spec.skipped):
        return False
    if len(info.shape) > 2:
        raise CheckpointError(
            str(info.file),
            f"{info.name} has {len(info.shape)} dimensions",
            "use `base: original` for this architecture",
        )
    return len(info.shape) == 2


def _skips(pattern: str, module: str) -> bool:
    """transformers' should_convert_module: from the start up to a module boundary, or as a suffix."""
    return bool(re.match(rf"(?:{pattern})(?:(?<=\.)|(?=\.|$))", module)) or module.endswith(pattern)


def dequantised(weight: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """Rounds a weight to its 4-bit grid and back, to the bit as bitsandbytes' Linear4bit holds it.

    Args:
        weight: the tensor of the base's file, any float dtype.

    Returns:
        Same shape, in `spec.dtype`, which is the dtype that bitsandbytes dequantises into.
    """
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit  # seconds to import: only where it is needed

    packed, state = quantize_4bit(
        weight.to(spec.dtype).contiguous(),
        blocksize=spec.blocksize,
        compress_statistics=spec.double_quant,
        quant_type=spec.quant_type,
    )
    return dequantize_4bit(packed, state).view(weight.shape)
