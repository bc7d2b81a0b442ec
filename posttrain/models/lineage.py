"""Lineage: which base and which adapters, in order, a model stands on. No torch here."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from posttrain.artifact import Artifact, DigestCache, sha256
from posttrain.errors import CheckpointError
from posttrain.models.files import files_of_model


@dataclass(frozen=True)
class Quantization:
    """How the base was quantised in training (bitsandbytes 4 bits)."""

    quant_type: str
    """`nf4` or `fp4`."""
    double_quant: bool
    source_dtype: str
    """Dtype the weights had just before they were quantised: `bfloat16`, `float16`, `float32`."""
    blocksize: int = 64
    modules: tuple[str, ...] | None = field(default=None, compare=False, repr=False)
    """What was quantised, by the names in the loaded base; None in records from before this was noted."""
    device: str = field(default="cpu", compare=False, repr=False)
    """Where it was quantised, `cpu` or `cuda`: the two differ in rare roundings."""


@dataclass(frozen=True)
class Link:
    """One folder of a lineage."""

    folder: Path
    label: str
    """How people know it: `@sft`, a hub id with commit, or a path."""
    fingerprint: str | None
    """The record's fingerprint where a stage left the folder; None for foreign folders."""


@dataclass(frozen=True)
class Lineage:
    """A base and the adapters on top of it, oldest first."""

    base: Link
    adapters: tuple[Link, ...] = ()
    quantization: Quantization | None = None

    def grown(self, adapter: Link, quantization: Quantization | None) -> Lineage:
        """The lineage with one more adapter on top."""
        return Lineage(self.base, (*self.adapters, adapter), quantization)

    def as_dict(self, run_dir: Path) -> dict[str, Any]:
        """Plain form for a record; folders inside the run are written relative to it, so that it can move."""
        quantization = asdict(self.quantization) if self.quantization else None
        links = [_link_dict(link, run_dir) for link in (self.base, *self.adapters)]
        return {"base": links[0], "adapters": links[1:], "quantization": quantization}


def _link_dict(link: Link, run_dir: Path) -> dict[str, Any]:
    place, run_dir = link.folder.resolve(), run_dir.resolve()  # either may be spelled through a symbolic link
    folder = str(place.relative_to(run_dir)) if place.is_relative_to(run_dir) else str(place)
    return {"folder": folder, "label": link.label, "fingerprint": link.fingerprint}


def read_lineage(saved: dict[str, Any], run_dir: Path) -> Lineage:
    """Reads the plain form back; relative folders start from the run that wrote it."""
    links = [
        Link((run_dir / entry["folder"]).resolve(), entry["label"], entry["fingerprint"])
        for entry in (saved["base"], *saved["adapters"])
    ]
    return Lineage(links[0], tuple(links[1:]), _read_quantization(saved["quantization"]))


def _read_quantization(saved: dict[str, Any] | None) -> Quantization | None:
    if not saved:
        return None
    modules = saved.get("modules")
    return Quantization(**saved | {"modules": tuple(modules) if modules is not None else None})


def lineage_of(folder: Path, ref: str) -> Lineage:
    """Finds out what a model folder stands on.

    A folder of ours that holds an adapter names its base and parents in its record; anything else must be
    a standalone model.

    Raises:
        CheckpointError: an adapter without a record of ours (its `adapter_config.json` alone is never
            trusted), or a link whose folder is gone or was made again.
    """
    folder = folder.resolve()
    artifact = Artifact.read(folder)
    if not (folder / "adapter_config.json").exists():
        return Lineage(Link(folder, ref, artifact.record.fingerprint if artifact else None))
    if artifact is None or not artifact.record.lineage or not artifact.record.lineage["adapters"]:
        raise CheckpointError(
            str(folder),
            "an adapter without stage.json: nothing proves which base and adapters it was trained on",
            "merge it into its base with the tool that made it, and give the merged folder",
        )
    lineage = read_lineage(artifact.record.lineage, folder.parent)
    for link in (lineage.base, *lineage.adapters):
        _verify(link, folder)
    return lineage


def prove_base(lineage: Lineage) -> str:
    """Proves from its bytes that the base is the one that the oldest adapter was trained on; says by what.

    Raises:
        CheckpointError: it is another one, though its record or place may be the same.
    """
    base, made = Artifact.read(lineage.base.folder), Artifact.read(lineage.adapters[0].folder)
    wanted_by = lineage.adapters[0].label
    todo = f"restore the base that {wanted_by} was trained on, or train it again on this one"
    if lineage.base.fingerprint and base is not None:
        for name, seen in base.record.files.items():
            path = base.folder / name
            if not path.is_file() or sha256(path) != seen["sha256"]:
                raise CheckpointError(str(path), f"is not what {wanted_by} was trained on", todo)
        return "the SHA-256 of its files, in its record"
    known = made.record.identity.get("model", {}) if made is not None else {}
    if "content" in known:
        files = files_of_model(lineage.base.folder)
        if DigestCache(lineage.base.folder / ".no-cache").tree(lineage.base.folder, files) != known["content"]:
            raise CheckpointError(str(lineage.base.folder), f"is not what {wanted_by} was trained on", todo)
        return "the SHA-256 of its files, in the adapter's record"
    return f"commit {known['commit']}" if "commit" in known else "nothing but the word of whoever named it"


def _verify(link: Link, wanted_by: Path) -> None:
    if not link.folder.is_dir():
        raise CheckpointError(str(wanted_by), f"stands on {link.label} ({link.folder}), which is gone", "restore it")
    found = Artifact.read(link.folder)
    if link.fingerprint and (found is None or found.record.fingerprint != link.fingerprint):
        raise CheckpointError(
            str(wanted_by),
            f"was trained on another {link.label} than the one now in {link.folder}",
            "train it again on the present one, or restore the folder it was trained on",
        )
