"""Stage kinds: one short file each, `run(config, context) -> Summary`.

A stage runs in a process of its own (`python -m posttrain.stages JOB`), told everything by a job file
that the pipeline wrote into `<stage>.partial/job.json`. This module imports nothing heavy.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StageKind:
    """One entry of the table of stage kinds."""

    module: str
    """Imported only in the stage's own process; has `run(config, context) -> Summary`."""
    version: int
    """Raised when the code changes what the same settings produce; part of the fingerprint."""
    trains: bool = False
    """Whether it takes optimizer steps (and so writes checkpoints and a token ledger)."""


KINDS: dict[str, StageKind] = {
    "pretrain": StageKind("posttrain.stages.pretrain", 1, trains=True),
    "sft": StageKind("posttrain.stages.sft", 2, trains=True),
    "dpo": StageKind("posttrain.stages.dpo", 2, trains=True),
    "merge": StageKind("posttrain.stages.merge", 2),
    "evaluate": StageKind("posttrain.stages.evaluate", 1),
    "publish": StageKind("posttrain.stages.publish", 1),
}
