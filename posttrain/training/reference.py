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
) -> torch.Tensor:
    """Computes, or reads, the log-probs of all pairs under the trainer's untrained policy.

    The cache file is filled in place, NaN marking what is missing, so a killed run goes on where it
    was; it belongs to one content key, so it can never be another run's.

    Args:
        cache: path of the [N, 2] float32 `.npy`; its name carries `reference_key`.

    Returns:
        [N, 2] fp32: chosen, rejected; NaN where `should_stop` came before it.

    Raises:
        StageError: a log-prob that is not finite.
    """
    table = _open_table(cache, len(pairs))
    costs = [pair.cost(trainer.shares) for pair in pairs]
    done, told = 0, time.monotonic()
    for batch in cut_pairs(costs, limits.tokens, limits.documents):  # however much is known: the same bits
        if not np.isnan(table[batch]).any():
            done += len(batch)
            continue
        if should_stop():
            break
        logps = trainer.policy_logps(pad_pairs([pairs[index] for index in batch], pad_id))
        if not logps.isfinite().all():
            raise StageError(
                "reference log-probs",
                "the model's log-probs are not finite",
                "use precision bf16 or fp32; check the model",
            )
        table[batch] = logps.numpy()
        done += len(batch)
        if done == len(pairs) or time.monotonic() - told > _TELL_SECONDS:
            told = time.monotonic()
            events("phase", text=f"reference log-probs {done}/{len(pairs)}")
    table.flush()
    return torch.from_numpy(np.array(table))


def _open_table(cache: Path, rows: int) -> np.memmap:
    if not cache.exists():
        cache.parent.mkdir(parents=True, exist_ok=True)
        temporary = cache.with_name(f".{cache.name}.{os.getpid()}")
        with temporary.open("wb") as file:
            np.save(file, np.full((rows, 2), np.nan, dtype=np.float32))
        temporary.replace(cache)
    return np.lib.format.open_memmap(cache, mode="r+")
