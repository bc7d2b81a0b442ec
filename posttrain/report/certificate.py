"""A merge's certificate as a page to read: verdict first, then what was measured, then what rounding left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from posttrain.report.markdown import table

WORST = 10
"""Tensors that a table names."""
FEW = 8
"""Rows below which figures of logits are rough."""
WHOLE = 0.9999
"""Cosine above which rounding left a change as it was."""
_SOURCES = {
    "held_out": "that training never saw",
    "training": "of the training data, since too few were there to hold some out",
    "given": "that the user gave",
}
_FIGURES = (
    ("relative_error", "relative error of the logits"),
    ("max_difference", "largest logit difference"),
    ("mean_difference", "mean logit difference"),
    ("mean_kl", "mean KL, nats per token"),
    ("max_kl", "largest KL of a token"),
    ("top1_agreement", "same most probable token"),
    ("reference_loss", "loss in use"),
    ("loss", "loss of the merged files"),
)
_LIMITS = {
    "relative_error": "relative_error",
    "max_difference": "max_logit_difference",
    "mean_kl": "mean_kl",
    "top1_agreement": "min_top1_agreement",
}


def certificate_page(certificate: Mapping[str, Any]) -> str:
    """Returns the Markdown of a `certificate.json`; ends with a newline."""
    failures: Sequence[str] = certificate["failures"]
    parts = [f"# Certificate: {certificate['merged']}", "", f"**{certificate['verdict'].upper()}**", ""]
    parts += [f"- does not hold: {failure}" for failure in failures]
    parts += [f"- {line}" for line in _made(certificate)]
    parts += [f"- advice: {line}" for line in certificate["advice"]]
    if certificate["inputs"]:
        parts += ["", "## Against each of the models combined", "", *_inputs(certificate)]
    else:
        parts += ["", "## Merged files against the adapters in use", "", *_comparison(certificate)]
    parts += ["", "## What rounding left of each change", "", *_tensors(certificate["tensors"])]
    rows = [[name, seen["sha256"], f"{seen['bytes']:,}"] for name, seen in certificate["files"].items()]
    return "\n".join([*parts, "", "## Files", "", *table(["file", "SHA-256", "bytes"], rows)]) + "\n"


def _made(certificate: Mapping[str, Any]) -> list[str]:
    method = {key: value for key, value in certificate["method"].items() if value not in (None, False, [], ())}
    kind, base = method.pop("kind"), certificate["base"]
    settings = "; ".join(f"{key} {_setting(value)}" for key, value in method.items())
    lines = [f"{' + '.join(certificate['parts'])}" + ("" if kind == "chain" else f", by {kind}")]
    lines += [settings] if settings else []
    lines.append(f"weights in {certificate['dtype']}, computed in fp32 and rounded once; base: {base['mode']}")
    lines += [_proof(proof) for proof in base["proved_by"]]
    if base["relative_error"]:
        measured = ", ".join(f"{mode} {_number(error)}" for mode, error in base["relative_error"].items())
        lines.append(f"base chosen by relative error of the logits to the adapters in use: {measured}")
    return lines


def _setting(value: Any) -> str:
    return ", ".join(map(_number, value)) if isinstance(value, (list, tuple)) else _number(value)


def _proof(proof: str) -> str:
    if proof.startswith("nothing"):
        return f"what says that this is the base of these adapters: {proof}"
    return f"that this is the base of these adapters is proved by {proof}"


def _rows(certificate: Mapping[str, Any]) -> str:
    """On what was compared, and how."""
    rows, how = certificate["rows"], certificate["compared"]
    where = "layer by layer from the files" if how["mode"] == "layers" else "both whole in memory"
    said = f"On {counted(rows['rows'], 'row')} {_SOURCES[rows['source']]}; {where}, computing in {how['dtype']}."
    return said + (" So few rows make rough figures." if rows["rows"] < FEW else "")


def counted(number: int, noun: str) -> str:
    """`1 row`, `2 rows`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _comparison(certificate: Mapping[str, Any]) -> list[str]:
    logits, weights = certificate["logits"], certificate["weights"]
    if certificate["rows"] is None or logits is None:
        return ["Not compared: no rows were given."]
    figures = [
        [label, _number(logits[key]), _limit(certificate["limits"], key)]
        for key, label in _FIGURES
        if logits[key] is not None
    ]
    table_of_logits = table([counted(logits["tokens"], "token"), "measured", "limit"], figures)
    return [*(_weights(certificate, weights) if weights else []), _rows(certificate), "", *table_of_logits]


def _weights(certificate: Mapping[str, Any], weights: Mapping[str, Any]) -> list[str]:
    """What looking at the numbers themselves found."""
    looked = f"{counted(weights['numbers'], 'number')} of {counted(weights['tensors'], 'tensor')}"
    off, what = weights["off"], f"those of the adapters in use, rounded to {certificate['dtype']}"
    if not off:
        return [f"All {looked} that were looked at are {what}.", ""]
    rows = [[one["name"], f"{100 * one['share']:.2g} %", _number(one["largest"])] for one in off[:WORST]]
    more = [f"And {counted(len(off) - WORST, 'tensor')} more.", ""] if len(off) > WORST else []
    said = f"Of {looked} that were looked at, these are not {what}:"
    return [said, "", *table(["tensor", "numbers off", "largest distance / rms"], rows), "", *more]


def _limit(limits: Mapping[str, Any], key: str) -> str:
    limit = limits.get(_LIMITS.get(key, ""))
    return "" if limit is None else f"at {'least' if key == 'top1_agreement' else 'most'} {limit:g}"


def _inputs(certificate: Mapping[str, Any]) -> list[str]:
    inputs: Mapping[str, Mapping[str, Any]] = certificate["inputs"]
    labels = [(key, label) for key, label in _FIGURES if any(one[key] is not None for one in inputs.values())]
    rows = [[label, *(_number(one[key]) for one in inputs.values())] for key, label in labels]
    said = "Nothing but these files computes what a combination should: its figures have no limits."
    return [f"{_rows(certificate)} {said}", "", *table(["", *inputs], rows)]


def _tensors(tensors: Sequence[Mapping[str, Any]]) -> list[str]:
    if not tensors:
        return ["No tensor was changed."]
    known = [one for one in tensors if one["cosine"] is not None]
    if known and known[0]["cosine"] > WHOLE:
        return [f"All of it: of {counted(len(known), 'changed tensor')}, none has a cosine below {WHOLE:g}."]
    rows = [
        [one["name"], _number(one["cosine"]), _number(one["norm_ratio"]), _number(one["relative_change"])]
        for one in tensors[:WORST]
    ]
    rest = [f"The other {counted(len(tensors) - WORST, 'tensor')} kept no less."] if len(tensors) > WORST else []
    head = ["tensor, worst first", "cosine", "norm ratio", "change / weight"]
    return [*table(head, rows), *(["", *rest] if rest else [])]


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, (int, float)) else "" if value is None else str(value)


def sweep_table(certificates: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Lines of a table of several scales: loss on the rows, and the distance to the adapters in use (scale 1)."""
    head = ["scale", "loss", "relative error", "mean KL", "same top token", "verdict"]
    rows = []
    for scale, one in certificates.items():
        found: Mapping[str, Any] = next(iter(one["inputs"].values()), {})
        figures = [_number(found.get(key)) for key in ("loss", "relative_error", "mean_kl", "top1_agreement")]
        rows.append([scale, *figures, str(one["verdict"])])
    return table(head, rows)
