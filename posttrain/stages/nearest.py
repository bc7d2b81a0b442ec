"""The model whose tokenizer and template a stage would use now, though the one it reads may still have to be made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from posttrain.artifact import Artifact
from posttrain.models.hub import HubId
from posttrain.stages.context import Job


def nearest_model(
    job: Job, jobs: Mapping[str, Job], fetch: Callable[[HubId], Path | None]
) -> tuple[dict[str, Any], str | None]:
    """The first model below a stage that exists, and the template that stages in between will train with.

    Where there is no tokenizer to be had the model's folder is None, and `missing` says why.

    Args:
        jobs: all stages of the recipe by name.
        fetch: hub id -> a folder with its config and tokenizer, or None.
    """
    if isinstance(job.config.get("tokenizer"), dict):
        return {"folder": None, "missing": "its tokenizer is trained by itself"}, None
    given, template = job.inputs.get("tokenizer") or job.inputs["model"], None
    while given["ref"].startswith("@") and Artifact.read(Path(given["folder"])) is None:
        above = jobs[given["ref"][1:]]
        if above.kind in ("sft", "dpo"):
            template = above.config.get("chat_template") or template
        if isinstance(above.config.get("tokenizer"), dict):
            return {"folder": None, "missing": f"its tokenizer is trained by {above.stage}, which has not run"}, None
        given = above.inputs.get("tokenizer") or above.inputs["model"]
    if given["folder"] is None:
        hub = HubId(given["ref"].partition("@")[0], given["revision"])
        folder = fetch(hub)
        given = {**given, "folder": str(folder) if folder else None, "missing": f"{hub} cannot be fetched"}
    return given, template
