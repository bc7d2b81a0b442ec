"""The repair: a mended copy of a checkpoint, its weights linked, its source never touched."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from posttrain.artifact import RECORD, Artifact, visible_files
from posttrain.chat.templates import ChatTemplate, load_template
from posttrain.doctor import mend_files, mend_template, mend_tokens
from posttrain.doctor.catalogue import Finding
from posttrain.doctor.checkpoint import open_checkpoint
from posttrain.doctor.diagnose import diagnose
from posttrain.doctor.mend import Patient
from posttrain.errors import UserError
from posttrain.merging.atomic import build_folder

Mend = Callable[[Patient], None]
_MENDS: dict[str, Mend] = {
    # what does not load; what contradicts
    "tokenizer-broken": mend_files.tokenizer,
    "truncation-baked-in": mend_files.whole_texts,
    "files-disagree": mend_files.agreement,
    # sizes
    "rows-fewer-than-tokens": mend_tokens.grow,
    "tied-weights-differ": mend_files.untied,
    "max-length-unset": mend_files.max_length,
    # the template, and the tokens it needs
    "eos-missing": mend_tokens.eos,
    "no-template": mend_template.suggested,
    "template-indented": mend_template.minify,
    "template-tokens-missing": mend_tokens.template_tokens,
    "end-of-turn-not-one-token": mend_template.ending,
    # beginning and end of text
    "eos-appended": mend_files.no_eos_after_texts,
    "bos-flag-lies": mend_files.bos_flag,
    "bos-doubled": mend_template.one_bos,
    "bos-missing": mend_template.bos_first,
    "bos-not-in-template": mend_template.bos_if_base,
    # stop, pad and bos ids
    "end-of-turn-not-eos": mend_tokens.settle,
    "id-out-of-range": mend_tokens.settle,
    "pad-missing": mend_tokens.settle,
    "pad-is-eos": mend_tokens.settle,
    "unk-is-pad": mend_tokens.settle,
    # behaviour, marks, rows
    "system-refused": mend_template.fold_system,
    "system-dropped": mend_template.fold_system,
    "end-of-turn-outside-marks": mend_template.without_marks,
    "token-row-untrained": mend_tokens.untrained,
}
"""Defect -> what mends it, in the order in which defects are mended: one may hide the next."""
_TRIES = 2
_OTHER_WEIGHTS = {".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"}
_WORK_OF_STAGES = {"checkpoints", "job.json", "log.txt"}
_LINKED = 1 << 20
"""Bytes from which a file is linked, not copied; weights always are."""


@dataclass(frozen=True)
class Repair:
    """What a repair did."""

    changes: tuple[str, ...]
    """One line each, in the order they were made; () where nothing was to be mended."""
    left: tuple[Finding, ...]
    """What a second diagnosis finds in the mended copy."""


def fix(folder: Path, out: Path, template: str | None = None, base_dir: Path = Path()) -> Repair:
    """Writes a mended copy of a model or tokenizer folder, reads it back and diagnoses it again.

    The source is never changed: its weights are hard-linked (copied on another filesystem), and a shard in
    which rows change is written anew. Mending a mended copy changes nothing. A copy in which something changed
    is a new model: it has no stage's record, and rows that are new in it are listed in `posttrain_tokens.json`,
    for training.

    Args:
        out: must not exist; it has this name only when it is complete.
        template: bundled name or file of the template to install; None = the folder's own, or for a base
            model without one, the bundled template that fits its vocabulary.
        base_dir: what a relative file of a template is relative to.

    Raises:
        UserError: `out` exists or lies inside `folder`, no such folder or template, what cannot be read or written.
        CheckpointError: files that are incomplete, or matrices that cannot be written (quantised).
    """
    open_checkpoint(folder, template, base_dir)

    def write(partial: Path) -> Repair:
        chosen = None if template is None else load_template(template, base_dir)
        try:
            return _write(folder, partial, chosen)
        except UserError as error:  # nobody will find the copy: it goes when this is raised
            where = error.where.replace(str(partial), str(folder))
            raise type(error)(where, error.found, error.todo) from None
        except OSError as error:
            found = f"cannot be read or written: {error.strerror}"
            raise UserError(str(error.filename or out), found, "make room, or check who may read and write") from None

    return build_folder(out, [folder], write, out.parent / f".{out.name}.mending")


def _write(folder: Path, partial: Path, template: ChatTemplate | None) -> Repair:
    """Copies, mends, and diagnoses the copy."""
    _copy(folder, partial)
    patient = _admit(partial)
    if template is not None:
        mend_template.install(patient, template)
    _mend(patient)
    left = diagnose(partial).findings
    if patient.changes:
        (partial / RECORD).unlink(missing_ok=True)
    return Repair(tuple(patient.changes), left)


def _admit(folder: Path) -> Patient:
    artifact = Artifact.read(folder)
    metrics = {} if artifact is None else artifact.record.summary.get("metrics", {})
    checkpoint = open_checkpoint(folder)
    base = checkpoint.own_template is None and checkpoint.own_template_error is None
    return Patient(folder, base, frozenset(metrics.get("untrained_token_ids", ())))


def _mend(patient: Patient) -> None:
    """Mends the first defect that is found, and looks again, until nothing is found that could be mended."""
    tried: Counter[str] = Counter()
    while True:
        findings = {finding.id: finding for finding in diagnose(patient.folder).findings if finding.severity != "note"}
        due = [id for id in _MENDS if id in findings and tried[id] < _TRIES]
        if not due:
            break
        tried[due[0]] += 1
        _MENDS[due[0]](patient)
    mend_tokens.never_seen(patient)


def _copy(folder: Path, partial: Path) -> None:
    """Links or copies what belongs to a model: no logs, no checkpoints, no weights in forms that would go stale."""
    safetensors = any(folder.glob("*.safetensors"))
    for path in visible_files(folder):
        place = path.relative_to(folder)
        if place.parts[0] in _WORK_OF_STAGES or (safetensors and path.suffix in _OTHER_WEIGHTS):
            continue
        target = partial / place
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".safetensors" or path.stat().st_size >= _LINKED:
            _link(path, target)
        else:
            shutil.copyfile(path, target)


def _link(path: Path, target: Path) -> None:
    try:
        os.link(path.resolve(), target)
    except OSError:  # another filesystem, or one without links
        free, size = shutil.disk_usage(target.parent).free, path.stat().st_size
        if free < size:
            raise UserError(str(target.parent), f"{size:,} bytes needed, {free:,} free", "make room") from None
        shutil.copyfile(path, target)
