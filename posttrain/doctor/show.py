"""A diagnosis as text for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from posttrain.doctor.catalogue import CATALOGUE, Finding
from posttrain.doctor.diagnose import Diagnosis

_LABEL = 12


def spell(diagnosis: Diagnosis) -> Iterator[str]:
    """Yields the lines: what the checkpoint is, then every finding with its cause and its remedy."""
    yield str(diagnosis.folder)
    for label, value in _profile(diagnosis.profile):
        yield f"  {label:<{_LABEL}}{value}"
    for finding in diagnosis.findings:
        yield ""
        yield from spell_finding(finding)
    yield ""
    yield _sum(diagnosis.findings)


def spell_repair(out: str, changes: Sequence[str], left: Sequence[Finding]) -> Iterator[str]:
    """Yields the lines of a repair: what was changed, and what is still found in the copy."""
    yield ""
    yield f"{out}: " + ("a copy; nothing was changed" if not changes else "the repaired copy")
    for change in changes:
        yield f"  {change}"
    for finding in left:
        yield ""
        yield from spell_finding(finding)
    yield ""
    yield "in the copy: " + _sum(left, mending=False)


def spell_finding(finding: Finding) -> Iterator[str]:
    """Yields a finding's lines: id and title, where and why, what to do."""
    yield f"{finding.severity}: {finding.id}: {CATALOGUE[finding.id].title}"
    yield f"  {finding.where}: {finding.cause}"
    yield f"  -> {finding.remedy}"


def _profile(profile: dict[str, Any]) -> Iterator[tuple[str, str]]:
    template = profile["template"]
    if template is not None:
        yield "template", f"{template['name']} ({template['digest'][:12]})"
        end = template["end_of_turn"]
        yield "end of turn", "none" if end is None else f"{end['text']} ({end['id']})"
    stops = profile["stop_tokens"]
    if stops is not None:
        yield "stops at", ", ".join(stops) or "nothing"
    if profile["tokens"] is not None:
        yield "bos", _bos(profile)
        yield "pad", profile["pad_token"] or "none"
    if template is not None:
        default = template["default_system"]
        yield "system", template["system"] + (f", default {default[:60]!r}" if default else "")
        yield "history", template["history"]
        yield "tools", "written" if template["tools"] else "not written"
        yield "thinking", "written" if template["thinking"] else "not written"
        yield "white space", "trimmed" if template["trims"] else "kept"
    if profile["tokens"] is not None:
        rows = "" if profile["rows"] is None else f", {profile['rows']:,} embedding rows"
        yield "sizes", f"{profile['tokens']:,} tokens{rows}"


def _bos(profile: dict[str, Any]) -> str:
    if profile["bos_token"] is None:
        return "none"
    places = [
        name for name, there in (("plain texts", profile["plain_begins_with_bos"]), ("chats", _chats(profile))) if there
    ]
    return f"{profile['bos_token']}, begins {' and '.join(places) or 'nothing'}"


def _chats(profile: dict[str, Any]) -> bool:
    return bool(profile["template"] and profile["template"]["begins_with_bos"])


def _sum(findings: Sequence[Finding], mending: bool = True) -> str:
    if not findings:
        return "nothing found"
    counts = {severity: sum(f.severity == severity for f in findings) for severity in ("error", "warning", "note")}
    said = [f"{count} {severity}{'s' if count > 1 else ''}" for severity, count in counts.items() if count]
    mendable = sum(finding.mendable for finding in findings)
    return ", ".join(said) + (f"; --fix OUT can mend {mendable} of them" if mendable and mending else "")
