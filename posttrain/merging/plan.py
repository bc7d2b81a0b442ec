"""What every tensor of the merged model is made of, known from headers before a weight is read."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch

from posttrain.errors import CheckpointError
from posttrain.merging.adapter import CONFIG, EMBEDDINGS, HEADS, Adapter, Add, Edit, LowRank, Replace, Rows
from posttrain.merging.checkpoint import Checkpoint
from posttrain.merging.header import FLOATS, TensorInfo, read_rows

_OTHER_BASE = "use the base that this adapter was trained on"
_BLOCK = 1 << 22


@dataclass(frozen=True)
class Output:
    """One tensor of the merged model."""

    name: str
    source: TensorInfo
    """Where its values come from: the base, or an adapter that replaces it."""
    edits: tuple[Edit, ...]
    """What is then done to them, in the order of the chain."""
    base: TensorInfo | None
    """The base's tensor of the same shape, to measure the change against; None where the shape changed."""

    @property
    def touched(self) -> bool:
        """Whether an adapter has a part in it."""
        return bool(self.edits) or self.source != self.base


@dataclass(frozen=True)
class Plan:
    """The whole merged model."""

    outputs: tuple[Output, ...]
    """In the order of the base's files, so that reading is sequential."""
    tied: bool | None
    """Whether embedding and output layer stay one tensor; None where the base's were two already."""
    vocabulary: int | None
    """Rows of the embedding; None where no embedding is known by its name."""


@dataclass(frozen=True)
class _Tie:
    stored: str
    alias: str


def plan_merge(base: Checkpoint, adapters: list[Adapter]) -> Plan:
    """Adds up a chain of adapters that were in use together on one base.

    Each delta counts from the base (DoRA's norm as well, as in peft's forward with several active
    adapters); a replaced tensor or row takes the value of the last adapter that has it.

    Raises:
        CheckpointError: an adapter that does not fit this base, naming its key.
    """
    _refuse_quantised(base)
    tie = _find_tie(base)
    sources = dict(base.tensors)
    if tie:
        sources[tie.alias] = base.tensors[tie.stored]
    edits: dict[str, list[Edit]] = {}
    for adapter in adapters:
        _check_coverage(base, adapter)
        own, copies = dict(adapter.edits), _fresh_copies(adapter, sources)
        for name, copy in copies.items():
            own[name] = [copy, *own.get(name, [])]
        if tie:
            own, together = _share(tie, own, set(copies), adapter)
            tie_holds = together and tie.alias in own or not own.keys() & {tie.stored, tie.alias}
            own = {name: own[name] for name in own}
            if not tie_holds:
                tie = _Tie(tie.stored, tie.alias)
        for name, more in own.items():
            edits.setdefault(name, [])
            for edit in more:
                _check_fit(edit, name, sources, adapter)
    raise NotImplementedError
