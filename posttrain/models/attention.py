"""Attention backends: which is fastest here, and the proof on the live model that packed documents stay apart."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from posttrain.errors import StageError
from posttrain.models.packed_attention import PACKED

_LENGTHS = (7, 9)
_TOLERANCE = 1e-6  # the same computation on the same shapes: kernels give the same bits, or nearly

FASTEST: dict[str, tuple[str, ...]] = {
    "cuda": ("flash_attention_3", "flash_attention_2", "flex_attention", "sdpa", "eager"),
    "cpu": (PACKED, "sdpa", "eager"),
}
"""Backends for packed rows, fastest first.

The flash kernels run each document on its own, version 3 with what Hopper adds. FlexAttention skips
blocks that no token sees, and needs a compiler and a first step of a minute. sdpa is given a dense mask:
quadratic in the row, in time and memory; on a CPU ours calls it per document instead (measured: 1.15 times as
many tokens per second). eager also keeps the scores of every layer for the backward."""
ONE_ROW = frozenset({"flash_attention_3", "flash_attention_2", "flex_attention", PACKED})
"""Backends that get one long row. The flash kernels take position ids for document borders only of a batch
of one (transformers' `_is_packed_sequence`): two rows would leak, silently."""
_WINDOWS = {"sliding_window": "sliding_attention", "attention_chunk_size": "chunked_attention"}


@dataclass(frozen=True)
class Attention:
    """The backend that a model runs on, and why not a faster one."""

    backend: str
    skipped: dict[str, str] = field(default_factory=dict)
    """Faster backends -> why they were not taken."""
    masked: bool = False
    """The decoder is given a mask of packed documents, since it makes none of its own."""

    def as_dict(self) -> dict[str, Any]:
        """For the record."""
        return {"backend": self.backend, "skipped": self.skipped, **({"masked": True} if self.masked else {})}


def missing(backend: str, device: str, dtype: torch.dtype) -> str | None:
    """Why a backend cannot run here at all, or None: what is installed, the device, the dtype of compute."""
    if backend in ("sdpa", "eager"):
        return None
    if backend == PACKED:
        return "is for CPUs" if device == "cuda" else None
    if device != "cuda":
        return "runs on a GPU only"
    if backend == "flex_attention":
        return None
    if dtype == torch.float32:
        return "computes in 16 bits only, the precision is fp32"
    found = {"flash_attention_2": is_flash_attn_2_available, "flash_attention_3": is_flash_attn_3_available}[backend]
    return None if found() else "is not installed"


def choose_attention(
    model: torch.nn.Module, asked: str, device: str, dtype: torch.dtype, vocabulary: int, first: str | None = None
) -> Attention:
    """Sets the model to the fastest backend that is installed and keeps packed documents apart, or to the one asked.

    An architecture that makes its mask without looking at position ids (Falcon) is given one, under sdpa.

    Args:
        asked: a backend, or `auto`.
        dtype: of compute; below fp32 the checks run under autocast, as training does.
        first: a backend that `auto` tries before all others.

    Raises:
        StageError: the backend asked for does not do, or none does.
    """
    order = (asked,) if asked != "auto" else tuple(dict.fromkeys([*([first] if first else []), *FASTEST[device]]))
    skipped: dict[str, str] = {}
    for backend in order:
        reason = missing(backend, device, dtype) or _try(model, backend, dtype, vocabulary)
        if reason is None:
            return Attention(backend, skipped)
        skipped[backend] = reason
    if "sdpa" in skipped and shortest_window(model.config) is None:
        hook = _decoder(model).register_forward_pre_hook(_mask_documents, with_kwargs=True)
        if _try(model, "sdpa", dtype, vocabulary) is None:
            return Attention("sdpa", skipped, masked=True)
        hook.remove()
    found = "; ".join(f"{backend} {reason}" for backend, reason in skipped.items())
    todo = "set it to auto, sdpa or eager" if asked != "auto" else "train such a model without packing elsewhere"
    raise StageError("runtime.attn_implementation", found, todo)


def _decoder(model: Any) -> torch.nn.Module:
    """What every forward passes through, with or without the output matrix."""
    return (model.get_base_model() if isinstance(model, PeftModel) else model).base_model


def _mask_documents(
    module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Adds to position ids of packed rows [B, L] the mask that they mean, [B, 1, L, L] bool: causal, per document."""
    positions = kwargs.get("position_ids")
    if positions is None or kwargs.get("attention_mask") is not None or kwargs.get("past_key_values") is not None:
        return None
    documents = (torch.diff(positions, prepend=positions[:, :1] - 1) != 1).cumsum(dim=1)
    same = documents[:, :, None] == documents[:, None, :]
    return args, {**kwargs, "attention_mask": same.tril()[:, None]}


def _try(model: Any, backend: str, dtype: torch.dtype, vocabulary: int) -> str | None:
    """Sets the model to a backend and checks it; why it does not do, or None."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    known = getattr(base, "_compatible_flash_implementations", None)
    if backend.startswith("flash") and known and backend not in known:
        return "is not among the kernels of this architecture"  # transformers would fetch another one and run it
    try:
        model.set_attn_implementation(backend)
        if model.config._attn_implementation != backend:
            return "cannot be set on this architecture"
        check_isolation(model, vocabulary, dtype)
    except StageError as error:
        return error.found
    except torch.OutOfMemoryError:
        raise
    except (ImportError, ValueError, RuntimeError, NotImplementedError, TypeError, AttributeError) as error:
        # Each backend refuses an architecture, a head size or a GPU in its own way; the next one is tried.
        return f"fails ({type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]})"
    return None


@torch.no_grad()
def check_isolation(model: torch.nn.Module, vocabulary: int, dtype: torch.dtype = torch.float32) -> float:
    """Changes the first document of a packed row and looks whether the second one's logits move.

    Args:
        vocabulary: ids below it are valid.
        dtype: below fp32 the model runs under autocast to it, as in training.

    Returns:
        The largest move, relative to the largest logit.

    Raises:
        StageError: the attention backend lets packed documents see each other.
    """
    device = next(model.parameters()).device
    training = {module: module.training for module in model.modules()}
    model.train()  # 4-bit layers use other kernels in eval mode
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.eval()
    generator = torch.Generator().manual_seed(0)
    one, other, second = (torch.randint(0, vocabulary, (1, n), generator=generator) for n in (*_LENGTHS[:1] * 2, 9))
    positions = torch.cat([torch.arange(n) for n in _LENGTHS])[None].to(device)
    logits = []
    try:
        for first in (one, other):
            ids = torch.cat([first, second], dim=1).to(device)
            autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
            with torch.random.fork_rng(), autocast:  # dropout inside attention falls alike in both passes
                output = model(input_ids=ids, position_ids=positions, use_cache=False)
            logits.append(output.logits[:, _LENGTHS[0] :].float())
    finally:
        for module, mode in training.items():
            module.training = mode
    moved = ((logits[0] - logits[1]).abs().max() / logits[0].abs().max().clamp(min=1e-6)).item()
    if not moved <= _TOLERANCE:
        raise StageError(
            "attention",
            f"packed documents see each other (logits move by {moved:.2g} of their size)",
            "set runtime.attn_implementation to sdpa or eager",
        )
    return moved


def shortest_window(config: Any) -> int | None:
    """Fewest tokens back that any attention layer sees, by a model's config; None where all see everything."""
    settings = config.get_text_config().to_dict()
    kinds = settings.get("layer_types")
    if kinds is None and settings.get("use_sliding_window") is False:
        return None
    found = [settings.get(name) for name, kind in _WINDOWS.items() if kinds is None or kind in kinds]
    return min((window for window in found if window), default=None)
