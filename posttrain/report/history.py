"""The records a model stands on."""

from __future__ import annotations

from posttrain.artifact import Artifact, Record


def history(artifact: Artifact) -> list[Record]:
    """Returns the records of an artifact and of every stage it came from, oldest first, each once.

    Stages of one run lie side by side, so `@stage` is looked for beside the artifact that names it. A
    stage that is no longer there (pruned, moved) is left out, and its own inputs with it.
    """
    records: dict[str, Record] = {}
    _visit(artifact, records)
    return list(records.values())


def _visit(artifact: Artifact, records: dict[str, Record]) -> None:
    for ref in artifact.record.inputs.values():
        parent = Artifact.read(artifact.folder.parent / ref[1:]) if ref.startswith("@") else None
        if parent is not None and parent.record.stage not in records:
            _visit(parent, records)
    records.setdefault(artifact.record.stage, artifact.record)
