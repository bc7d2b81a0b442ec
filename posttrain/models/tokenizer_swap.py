"""A model takes another tokenizer: rows of tokens that both know are copied, all other rows begin as the mean row.

The way of Águila and FLOR (Falcon and BLOOM continued in Spanish and Catalan). Done on loaded weights, before training.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from posttrain.errors import CheckpointError

_MEAN = -1
_PER_LAYER = "vocab_size_per_layer_input"
"""In the config of models (Gemma 3n) that have a second embedding, of every layer."""
_OLD_IDS = ("decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id", "suppress_tokens",
            "begin_suppress_tokens", "bad_words_ids", "sequence_bias")  # fmt: skip
"""Settings of a generation config that name tokens by their ids, beside bos, eos and pad."""


@dataclass(frozen=True)
class Vocabulary:
    """What a swap has to know of a tokenizer."""

    ids: Mapping[str, int]
    """Token string -> id, added tokens included."""
    roles: Mapping[str, str]
    """`eos`, `bos`, `unk`, `pad` -> token string, where the tokenizer has one; in this order."""

    def id_of(self, role: str) -> int | None:
        """Id of the token with a role."""
        return self.ids[self.roles[role]] if role in self.roles else None


@dataclass(frozen=True)
class Swap:
    """Where each row of the new matrices comes from."""

    sources: np.ndarray
    """[rows] int64: the old row that a row is copied from; -1: it begins as the mean. Padding rows do too."""
    entries: np.ndarray
    """[n] int64, ascending: old rows that stand for a token, over which the mean is taken."""
    new: np.ndarray
    """[rows] bool: rows of tokens that begin as the mean; padding is not among them."""
    shared: int
    """Tokens with the same string in both."""
    by_role: Mapping[str, tuple[str, str]]
    """Role -> (new token, old token whose row it gets)."""

    def told(self) -> str:
        """The swap in one line."""
        roles = ", ".join(f"{new} as {old}" for new, old in dict.fromkeys(self.by_role.values()))
        line = f"{self.shared} rows copied, {int(self.new.sum())} begin as the mean of {len(self.entries)}"
        return f"{line}; by role: {roles}" if roles else line

    def figures(self) -> dict[str, Any]:
        """What a record says of the swap."""
        return {
            "tokens": self.shared + len(self.by_role) + int(self.new.sum()),
            "rows": len(self.sources),
            "shared_rows": self.shared,
            "rows_by_role": {role: {"token": new, "from": old} for role, (new, old) in self.by_role.items()},
            "new_rows": int(self.new.sum()),
            "mean_over_rows": len(self.entries),
        }


def vocabulary_of(tokenizer: PreTrainedTokenizerBase) -> Vocabulary:
    """Reads token strings and special roles of a tokenizer."""
    named = {
        "eos": tokenizer.eos_token,
        "bos": tokenizer.bos_token,
        "unk": tokenizer.unk_token,
        "pad": tokenizer.pad_token,
    }
    ids = tokenizer.get_vocab()
    return Vocabulary(ids, {role: token for role, token in named.items() if token is not None and token in ids})


def plan_swap(old: Vocabulary, new: Vocabulary, rows: int, where: str) -> Swap:
    """Decides where each new row comes from.

    A token's own string goes first. A special token whose string the old vocabulary lacks gets the row of the old
    token in its role (of several roles, the first of eos, bos, unk, pad that the old tokenizer has). All others begin
    as the mean. Rows are padded to a multiple of 64 where the old matrix was, else of 8.

    Args:
        rows: of the old embedding matrix; old tokens beyond it count as not there.
        where: names the new tokenizer, for errors.

    Raises:
        CheckpointError: apart from special tokens, no string stands in both vocabularies.
    """
    known = {token: row for token, row in old.ids.items() if row < rows}
    shared = new.ids.keys() & known.keys()
    if not shared - set(new.roles.values()):
        found = f"none of its {len(new.ids)} tokens is one of the model's {len(known)}"
        todo = "take a tokenizer of the same kind (byte-level, or SentencePiece), or train a model from scratch"
        raise CheckpointError(where, found, todo)
    multiple = 64 if rows % 64 == 0 else 8
    sources = np.full(-(-(max(new.ids.values()) + 1) // multiple) * multiple, _MEAN, dtype=np.int64)
    for token in shared:
        sources[new.ids[token]] = known[token]
    by_role = {}
    for role, token in new.roles.items():
        if sources[new.ids[token]] == _MEAN and old.roles.get(role) in known:
            by_role[role] = (token, old.roles[role])
            sources[new.ids[token]] = known[old.roles[role]]
    begun = np.zeros(len(sources), dtype=bool)
    begun[list(new.ids.values())] = True
    return Swap(sources, np.unique(list(known.values())), begun & (sources == _MEAN), len(shared), by_role)


def swap_tokenizer(model: PreTrainedModel, swap: Swap, new: Vocabulary) -> None:
    """Gives a model the matrices and the token ids of another tokenizer, in place.

    The input embedding, the output matrix where it is not tied, and the output bias where there is one: copied rows are
    bit for bit the old ones, the others the fp32 mean of the old rows that stand for a token (`Swap.entries`: padding
    of the old matrix is left out). Config and generation config follow the new tokenizer; what else the generation
    config says of single tokens is dropped.

    Raises:
        CheckpointError: an adapter, weights that are not fp32, or embeddings beside the two matrices.
    """
    _refuse(model)
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    tied = head.weight is embedding.weight
    first = _taken(embedding.weight, swap)
    last = None if tied else _taken(head.weight, swap)
    bias = None if head.bias is None else _taken(head.bias, swap)
    model.resize_token_embeddings(len(swap.sources), mean_resizing=False)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    with torch.no_grad():
        embedding.weight.copy_(first)
        if last is not None:
            head.weight.copy_(last)
        if bias is not None:
            head.bias.copy_(bias)
    embedding.padding_idx = None  # the old tokenizer's: that row would never learn
    _set_ids(model, new)


def _refuse(model: PreTrainedModel) -> None:
    where = model.config._name_or_path or type(model).__name__
    if isinstance(model, PeftModel):
        raise CheckpointError(where, "is an adapter: its rows belong to its base's tokenizer", "merge it first")
    for name, param in model.named_parameters():
        if param.dtype != torch.float32:
            todo = "give the checkpoint before it was quantised"
            raise CheckpointError(where, f"{name} is {param.dtype}, and a swap works on fp32 weights", todo)
    if model.config.get_text_config().to_dict().get(_PER_LAYER) is not None:
        found = f"has embeddings of every layer ({_PER_LAYER}), which a tokenizer swap does not cover"
        raise CheckpointError(where, found, "keep its tokenizer, or take another model")


def _taken(old: torch.Tensor, swap: Swap) -> torch.Tensor:
    """New rows of a matrix [rows, width], or of a bias [rows]; on the old one's device."""
    old = old.detach()
    mean = old[torch.from_numpy(swap.entries).to(old.device)].mean(dim=0)
    copied = torch.from_numpy(np.flatnonzero(swap.sources != _MEAN)).to(old.device)
    made = mean.expand(len(swap.sources), *old.shape[1:]).clone()
    made[copied] = old[torch.from_numpy(swap.sources).to(old.device)[copied]]
    return made


def _set_ids(model: PreTrainedModel, new: Vocabulary) -> None:
    ids = {f"{role}_token_id": new.id_of(role) for role in ("bos", "eos", "pad")}
    for config in (model.config, model.config.get_text_config()):
        for name, value in ids.items():
            setattr(config, name, value)
    stops = None if ids["eos_token_id"] is None else [ids["eos_token_id"]]
    model.generation_config.update(**dict.fromkeys(_OLD_IDS), **{**ids, "eos_token_id": stops})
