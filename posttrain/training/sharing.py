"""Whether the two sequences of a preference pair can share the forward of what both begin with, and whether it pays."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from posttrain.errors import StageError
from posttrain.models.attention import shortest_window
from posttrain.training.dpo import SpineDpoTrainer
from posttrain.training.packed_view import MaskMaker
from posttrain.training.pairs import Pair, pad_pairs
from posttrain.training.shared_mask import MASKS

PAYS = {"cpu": 0.05, "cuda": 0.1}
"""Share of the tokens that sharing must save before `auto` takes it.

On a CPU it is even at 4 %, and from 6 % on faster (measured: Llama of 1.3 M parameters on hh-rlhf with cut
prompts). On a GPU it takes FlexAttention, which reaches about 0.7 to 1.4 of the flash kernels' speed (arXiv
2412.05496) where attention is the smaller part of a layer: a rule, not a measurement."""
_EXACT = 1e-4
"""Largest difference of log-probs between both paths in fp32, relative to the largest log-prob."""
_ROUGH = 2e-2
"""Mean difference in 16 bits, relative to the mean log-prob: rounding, not another attention."""
_UNMOVED = 1e-6
_BRANCH = 6


@dataclass(frozen=True)
class Survey:
    """The lengths of all pairs of a stage."""

    plain: int
    """Tokens, each sequence whole."""
    saved: int
    """How many of them sharing would save."""
    longest: int
    """Tokens of the longest sequence."""


def survey(pairs: Iterable[Pair]) -> Survey:
    """Looks at every pair once."""
    found = np.array([(pair.tokens, pair.shared, pair.longest) for pair in pairs], dtype=np.int64)
    return Survey(int(found[:, 0].sum()), int(found[:, 1].sum()), int(found[:, 2].max()))


@dataclass(frozen=True)
class Sharing:
    """How pairs run, and why."""

    mask: MaskMaker | None
    """None: plain packing."""
    plain_tokens: int
    """Tokens of all pairs, each sequence whole."""
    saved_tokens: int
    """How many of them sharing saves; 0 where it is not used."""
    note: str
    """One sentence for people."""

    def as_dict(self) -> dict[str, Any]:
        """For the record."""
        layout = "shared_prefix" if self.mask else "packed"
        return {
            "layout": layout,
            "plain_tokens": self.plain_tokens,
            "saved_tokens": self.saved_tokens,
            "note": self.note,
        }


def sharing_backend(wanted: str, device: str, lengths: Survey) -> str | None:
    """The attention backend to try first on a GPU, since the flash kernels take no mask; None: no wish."""
    pays = wanted == "on" or (wanted == "auto" and lengths.saved >= PAYS[device] * lengths.plain)
    return "flex_attention" if device == "cuda" and pays else None


def choose_sharing(trainer: SpineDpoTrainer, wanted: str, lengths: Survey, vocabulary: int) -> Sharing:
    """Decides whether pairs share their prefixes, and leaves the trainer set to it.

    Args:
        wanted: `auto` (where it is proven and pays), `on` or `off`.
        vocabulary: ids below it are valid.

    Raises:
        StageError: `on`, and this model or backend cannot.
    """
    trainer.mask = None
    plain, saved = lengths.plain, lengths.saved
    share = f"{saved / max(plain, 1):.0%} of the tokens"
    if wanted == "off":
        return Sharing(None, plain, 0, "pairs do not share their prefixes: runtime.share_prefix is off")
    if wanted == "auto" and saved < PAYS[trainer.args.device.type] * plain:
        return Sharing(None, plain, 0, f"pairs do not share their prefixes: it would save only {share}")
    attention = trainer.model.config._attn_implementation
    reason = _not_even_tried(trainer, attention, lengths.longest)
    reason = reason or _disproof(trainer, MASKS[attention], lengths.longest, vocabulary)
    if reason is None:
        trainer.mask = MASKS[attention]
        return Sharing(trainer.mask, plain, saved, f"pairs share their prefixes: {share} saved")
    if wanted == "on":
        todo = "set runtime.share_prefix to auto or off, or attn_implementation to sdpa or flex_attention"
        raise StageError("runtime.share_prefix", f"on, but {reason}", todo)
    return Sharing(None, plain, 0, f"pairs do not share their prefixes: {reason}")


def _not_even_tried(trainer: SpineDpoTrainer, attention: str, longest: int) -> str | None:
    """Why sharing cannot be right, as far as settings tell."""
    if attention not in MASKS:
        return f"{attention} takes no mask"
    if trainer.aux_loss_enabled:
        return "the router's balance loss counts every token of both sequences"
    window = shortest_window(trainer.model.config)
    if window is not None and window < longest:
        return f"a layer sees {window} tokens back, the longest sequence has {longest}"
    return None


@torch.no_grad()
def _disproof(trainer: SpineDpoTrainer, mask: MaskMaker, longest: int, vocabulary: int) -> str | None:
    """Runs made pairs, as long as the longest real one, on both paths of the live model; why they differ, or None."""
    made = _made_pairs(longest, vocabulary)
    with trainer.accelerator.autocast():
        trainer.model.train()  # the mode of training, which 4-bit kernels depend on; every dropout is off
        plain = _log_probs(trainer, None, made)
        try:
            shared = _log_probs(trainer, mask, made)
            other = _log_probs(trainer, mask, [*(_other_chosen(pair, vocabulary) for pair in made[:2]), *made[2:]])
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, NotImplementedError) as error:
            # A model that takes no ready mask fails in its own way, and plain packing is right for it.
            return f"the model takes no mask of ours ({type(error).__name__}: {str(error).splitlines()[0][:100]})"
        dtype = torch.get_autocast_dtype(plain.device.type) if torch.is_autocast_enabled(plain.device.type) else None
    half = len(made)
    moved = _gap(shared[half:], other[half:])
    if not moved <= _UNMOVED:
        return f"one answer sees the other (log-probs move by {moved:.2g} of their size)"
    exact = dtype in (None, torch.float32) and trainer.model.dtype == torch.float32
    gap = _gap(shared, plain) if exact else ((shared - plain).abs().mean() / plain.abs().mean()).item()
    if not gap <= (_EXACT if exact else _ROUGH):
        return f"its log-probs differ from those of plain packing by {gap:.2g} of their size"
    return None


def _gap(one: torch.Tensor, other: torch.Tensor) -> float:
    """Largest difference relative to the largest value; NaN where either is."""
    return ((one - other).abs().max() / other.abs().max().clamp(min=1e-6)).item()


def _made_pairs(longest: int, vocabulary: int) -> list[Pair]:
    """Random pairs: a prompt that fills the longest sequence, a short one, and an answer that begins another."""
    draw = torch.Generator().manual_seed(0)

    def ids(length: int) -> Any:
        return torch.randint(0, vocabulary, (length,), generator=draw, dtype=torch.int32).numpy()

    prompt = ids(max(longest - _BRANCH, 1))
    start = ids(3)
    answers = [ids(_BRANCH), ids(_BRANCH - 2)]
    return [Pair(prompt, *answers), Pair(ids(9), ids(5), ids(7)), Pair(ids(4), start, _joined(start, ids(4)))]


def _joined(one: Any, other: Any) -> Any:
    return torch.cat([torch.from_numpy(one), torch.from_numpy(other)]).numpy()


def _other_chosen(pair: Pair, vocabulary: int) -> Pair:
    """The same pair with another end of its first answer: the second one's log-probs may not move."""
    chosen = pair.chosen.copy()
    chosen[-1:] = (chosen[-1:] + 1) % vocabulary
    return Pair(pair.prompt, chosen, pair.rejected)


def _log_probs(trainer: SpineDpoTrainer, mask: MaskMaker | None, pairs: list[Pair]) -> torch.Tensor:
    """[2N, L - 1] log-probs of everything but the first token, on the path that `mask` says."""
    batch = trainer._prepare_inputs(pad_pairs(pairs, 0))
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    view = trainer.view(mask)
    outputs = view(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels)
    return outputs.log_probs.float()
