"""Everything the doctor finds in a checkpoint, and what its template does."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from posttrain.chat.turns import EndOfTurn
from posttrain.doctor import beginnings, files, sizes, tokens, weights
from posttrain.doctor.behaviour import behaviour
from posttrain.doctor.catalogue import CATALOGUE, Finding
from posttrain.doctor.checkpoint import Checkpoint, open_checkpoint
from posttrain.doctor.data import data as look_at_data
from posttrain.doctor.marks import marks
from posttrain.doctor.probes import Probes
from posttrain.doctor.profile import profile_of
from posttrain.errors import UserError

_GRAVITY = ("error", "warning", "note")
_EXPLAINS = {
    "tokenizer-broken": {"truncation-baked-in", "files-disagree", "no-template"},
    "unk-is-pad": {"tokenizer-changes-text"},
    "template-tokens-missing": {"end-of-turn-not-one-token", "token-row-untrained"},
    "template-indented": {"generation-prompt-not-prefix", "history-rewritten"},
    "bos-missing": {"bos-not-in-template"},
}
"""Finding -> what follows from it, and is not told beside it."""


@dataclass(frozen=True)
class Diagnosis:
    """What was found in a folder."""

    folder: Path
    findings: tuple[Finding, ...]
    """The gravest first."""
    profile: dict[str, Any]
    """What tokenizer, template and sizes are; see `posttrain.doctor.profile`."""

    @property
    def failed(self) -> bool:
        """Whether there is a finding of severity `error`."""
        return any(finding.severity == "error" for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        """The diagnosis as JSON: folder, profile, findings."""
        findings = [asdict(finding) for finding in self.findings]
        return {"folder": str(self.folder), "profile": self.profile, "findings": findings}


def diagnose(folder: Path, template: str | None = None, data: Path | None = None, base_dir: Path = Path()) -> Diagnosis:
    """Diagnoses a model, adapter or tokenizer folder.

    Args:
        folder: a transformers checkpoint, an adapter with its tokenizer, or a tokenizer alone: what needs a
            model's config or weights is then left out.
        template: bundled name or file of a template to judge instead of the folder's own.
        data: conversations or pairs to be checked against tokenizer and template.
        base_dir: what relative files of a template or data are relative to.

    Raises:
        UserError: no such folder, template or data; files that are incomplete; a missing extra.
    """
    checkpoint = open_checkpoint(folder, template, base_dir)
    files.check_readable(checkpoint)
    findings = list(_of_files(checkpoint))
    probes: Probes | None = None
    if checkpoint.tokenizer is not None:
        probes = Probes(checkpoint.tokenizer, checkpoint.template) if checkpoint.template is not None else None
        broken = _broken(probes) if probes is not None else []
        findings += broken
        probes = None if broken else probes
        findings += _of_tokenizer(checkpoint, None if probes is None else probes.end)
        if probes is not None:
            findings += _of_template(checkpoint, probes)
            if data is not None:
                findings += look_at_data(str(data), base_dir, probes)
    if data is not None and probes is None:
        raise UserError(str(data), f"{folder} has no template that renders", "name one with --template")
    return Diagnosis(folder, _sifted(findings), profile_of(checkpoint, probes))


def _of_files(checkpoint: Checkpoint) -> Iterator[Finding]:
    yield from files.tokenizer_files(checkpoint)
    yield from files.template_files(checkpoint)
    yield from files.disagreements(checkpoint)
    yield from sizes.sizes(checkpoint)


def _of_tokenizer(checkpoint: Checkpoint, end: EndOfTurn | None) -> Iterator[Finding]:
    odd = [*sizes.rows(checkpoint), *tokens.pad(checkpoint, end)]
    yield from odd
    if not odd:  # else they explain it
        yield from files.id_disagreements(checkpoint)
    yield from tokens.eos(checkpoint)
    yield from beginnings.plain_texts(checkpoint)
    if checkpoint.tokenizer is not None:
        yield from tokens.text(checkpoint.tokenizer)


def _broken(probes: Probes) -> list[Finding]:
    """What keeps a template from rendering anything: tokens it is known to need, else the template itself."""
    broken = list(files.renders(probes))
    missing = list(tokens.template_tokens(probes)) if broken and probes.bundled else []
    return missing or broken


def _of_template(checkpoint: Checkpoint, probes: Probes) -> Iterator[Finding]:
    """What is found by rendering; tokens that are not there make everything said of ids void."""
    missing = list(tokens.template_tokens(probes))
    yield from missing
    if not missing:
        if checkpoint.tokenizer is not None and checkpoint.tokenizer.eos_token:
            yield from tokens.end_of_answers(checkpoint, probes)
        yield from tokens.flags(probes)
        yield from tokens.prefix_space(probes)
        yield from beginnings.conversations(checkpoint, probes)
        yield from weights.token_rows(checkpoint, probes)
        source = checkpoint.own_source if checkpoint.chosen is None else checkpoint.chosen.source
        yield from marks(source or "", probes)
    yield from behaviour(probes)


def _sifted(findings: list[Finding]) -> tuple[Finding, ...]:
    """Leaves out what another finding explains, and repetitions; the gravest first, then as in the catalogue."""
    ids = {finding.id for finding in findings}
    explained = {id for found in ids for id in _EXPLAINS.get(found, ())}
    if "eos-missing" in ids and any("'eos_token' is undefined" in finding.cause for finding in findings):
        explained.add("template-broken")
    kept = {finding: None for finding in findings if finding.id not in explained}
    order = list(CATALOGUE)
    return tuple(sorted(kept, key=lambda finding: (_GRAVITY.index(finding.severity), order.index(finding.id))))
