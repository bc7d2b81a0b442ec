"""A merge's certificate as a page to read: verdict first, then what was measured, then what rounding left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from posttrain.report.markdown import table

WORST = 10
_SOURCES = {
    "held_out": "rows that training never saw",
    "training": "rows of the training data, since too few were there to hold some out",
    "given": "rows that the user gave",
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
    parts += ["", "## Merged files against the adapters in use", "", *_comparison(certificate)]
    if certificate["inputs"]:
        parts += ["", "## Against each of the models combined", "", *_inputs(certificate["inputs"])]
    parts += ["", "## What rounding left of each change", "", *_tensors(certificate["tensors"])]
    rows = [[name, seen["sha256"], f"{seen['bytes']:,}"] for name, seen in certificate["files"].items()]
    return "\n".join([*parts, "", "## Files", "", *table(["file", "SHA-256", "bytes"], rows)]) + "\n"


def _made(certificate: Mapping[str, Any]) -> list[str]:
    method = {key: value for key, value in certificate["method"].items() if value not in (None, False, [], ())}
    kind, base = method.pop("kind"), certificate["base"]
    settings = ", ".join(f"{key} {value}" for key, value in method.items())
    lines = [f"{' + '.join(certificate['parts'])}" + ("" if kind == "chain" else f", by {kind}")]
    lines += [settings] if settings else []
    lines.append(f"weights in {certificate['dtype']}, computed in fp32 and rounded once; base: {base['mode']}")
    lines += [f"that it is the base of these adapters is proved by {proof}" for proof in base["proved_by"]]
    if base["relative_error"]:
        measured = ", ".join(f"{mode} {_number(error)}" for mode, error in base["relative_error"].items())
        lines.append(f"base chosen by relative error of the logits to the adapters in use: {measured}")
    return lines


def _comparison(certificate: Mapping[str, Any]) -> list[str]:
    rows, how, logits = certificate["rows"], certificate["compared"], certificate["logits"]
    if rows is None:
        return ["Not compared: no rows were given."]
    where = "layer by layer from the files" if how["mode"] == "layers" else "both whole in memory"
    said = f"On {rows['rows']} {_SOURCES[rows['source']]}, {where}, computing in {how['dtype']}."
    if logits is None:
        return [said, "", "Nothing but these files computes what a combination should: its figures have no limits."]
    figures = [
        [label, _number(logits[key]), _limit(certificate["limits"], key)]
        for key, label in _FIGURES
        if logits[key] is not None
    ]
    return [said, "", *table([f"{logits['tokens']:,} tokens", "measured", "limit"], figures)]


def _limit(limits: Mapping[str, Any], key: str) -> str:
    limit = limits.get(_LIMITS.get(key, ""))
    return "" if limit is None else f"at {'least' if key == 'top1_agreement' else 'most'} {limit:g}"


def _inputs(inputs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    labels = [(key, label) for key, label in _FIGURES if any(one[key] is not None for one in inputs.values())]
    rows = [[label, *(_number(one[key]) for one in inputs.values())] for key, label in labels]
    return table(["", *inputs], rows)


def _tensors(tensors: Sequence[Mapping[str, Any]]) -> list[str]:
    if not tensors:
        return ["No tensor was changed."]
    rows = [
        [one["name"], _number(one["cosine"]), _number(one["norm_ratio"]), _number(one["relative_change"])]
        for one in tensors[:WORST]
    ]
    rest = [f"The other {len(tensors) - WORST} kept more."] if len(tensors) > WORST else []
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
