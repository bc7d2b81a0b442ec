"""Reference log-probs: precomputed once with the policy before its first step, cached by content."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from posttrain.artifact import fingerprint
from posttrain.errors import StageError
from posttrain.pretraining import world
from posttrain.pretraining.ranks import ALONE, Rank
from posttrain.training.dpo import SpineDpoTrainer
from posttrain.training.limits import Limits
from posttrain.training.pairs import Pair, cut_pairs, pad_pairs

_TELL_SECONDS = 5.0


def reference_key(policy: dict[str, Any], pairs: Sequence[Pair]) -> str:
    """Key of a cache entry: what the policy is and how it computes, and the exact token ids.

    Args:
        policy: everything that decides the policy's log-probs (weights' fingerprints, quantisation,
            precision, attention, layout, `ld_alpha`).
    """
    digest = hashlib.sha256()
    for pair in pairs:
        for part in (pair.prompt, pair.chosen, pair.rejected):
            digest.update(len(part).to_bytes(4, "little"))
            digest.update(np.ascontiguousarray(part, dtype="<i4").tobytes())
    return fingerprint({"policy": policy, "pairs": digest.hexdigest()})


def reference_logps(
    trainer: SpineDpoTrainer,
    pairs: Sequence[Pair],
    pad_id: int,
    limits: Limits,
    cache: Path,
    events: Callable[..., None],
    should_stop: Callable[[], bool],
    rank: Rank = ALONE,
) -> torch.Tensor:
    """Computes, or reads, the log-probs of all pairs under the trainer's untrained policy.

    The cache file is filled in place, NaN marking what is missing, so a killed run goes on where it
    was; it belongs to one content key, so it can never be another run's. Of several processes each runs
    its share of the batches, and the first writes them all.

    Args:
        cache: path of the [N, 2] float32 `.npy`; its name carries `reference_key`.

    Returns:
        [N, 2] fp32: chosen, rejected; NaN where `should_stop` came before it.

    Raises:
        StageError: a log-prob that is not finite.
    """
    table = _open_table(cache, len(pairs)) if rank.first else None
    known = world.from_first(torch.from_numpy(np.array(table)) if table is not None else None)
    costs = [pair.cost(trainer.shares) for pair in pairs]
    batches = cut_pairs(costs, limits.tokens, limits.documents)  # however much is known: the same bits
    rounds = [batches[start : start + rank.world] for start in range(0, len(batches), rank.world)]
    done, told = 0, time.monotonic()
    for turn in rounds:
        indices = [index for batch in turn for index in batch]
        if not known[indices].isnan().any():
            done += len(indices)
            continue
        if world.any_of(should_stop()):
            break
        known[indices] = _score_round(trainer, pairs, pad_id, turn, rank)
        if not known[indices].isfinite().all():
            raise StageError(
                "reference log-probs",
                "the model's log-probs are not finite",
                "use precision bf16 or fp32; check the model",
            )
        if table is not None:
            table[indices] = known[indices].numpy()
        done += len(indices)
        if done == len(pairs) or time.monotonic() - told > _TELL_SECONDS:
            told = time.monotonic()
            events("phase", text=f"reference log-probs {done}/{len(pairs)}")
    if table is not None:
        table.flush()
    return known


def _score_round(
    trainer: SpineDpoTrainer, pairs: Sequence[Pair], pad_id: int, turn: list[list[int]], rank: Rank
) -> torch.Tensor:
    """Log-probs [n, 2] of the n pairs of some batches, one for each process; one that has none runs the last again.

    Every process runs one forward, because that of a sharded model is one of all of them.
    """
    own = min(rank.index, len(turn) - 1)
    logps = trainer.policy_logps(pad_pairs([pairs[index] for index in turn[own]], pad_id))
    found = [torch.zeros(len(batch), 2) for batch in turn]
    if rank.index == own:
        found[own] = logps
    return world.sum_table(torch.cat(found))


def _open_table(cache: Path, rows: int) -> np.memmap:
    if not cache.exists():
        cache.parent.mkdir(parents=True, exist_ok=True)
        temporary = cache.with_name(f".{cache.name}.{os.getpid()}")
        with temporary.open("wb") as file:
            np.save(file, np.full((rows, 2), np.nan, dtype=np.float32))
        temporary.replace(cache)
    return np.lib.format.open_memmap(cache, mode="r+")
