"""An evaluation's JSON as a page to read: figures side by side, differences, gates, samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

KINDS = {
    "bits_per_byte": "bits per byte: lower is better",
    "preference": "preference between two given answers",
    "generate": "greedy answers",
}
_LONGEST_CELL = 300


def report_page(report: Mapping[str, Any]) -> str:
    """Returns the Markdown of a `report.json`; ends with a newline."""
    models: list[str] = report["models"]
    parts = [f"# Evaluation: {' · '.join(models)}", "", *(f"- {note}" for note in report["notes"]), ""]
    if report["gates"]:
        parts += ["## Gates", "", *gate_table(report["gates"]), ""]
    for suite in report["suites"]:
        parts += [f"## {suite['name']}", "", _rows_line(suite), "", *figure_table(suite, models), ""]
        if any(metric["differences"] for metric in suite["metrics"].values()):
            parts += ["Differences on the same rows (later minus earlier):", "", *difference_table(suite), ""]
        if suite.get("samples"):
            parts += ["Samples:", "", *_sample_table(suite["samples"], models), ""]
    if report.get("certificates"):
        parts += ["## Certificates of the merged models", "", *certificate_table(report["certificates"]), ""]
    parts.append("Square brackets hold 95 % intervals: Wilson's for shares, bootstrap over rows (10,000) elsewhere.")
    return "\n".join(parts) + "\n"


def console_table(report: Mapping[str, Any]) -> str:
    """Returns figures and differences of every suite as plain text, for the end of a run."""
    parts = []
    for suite in report["suites"]:
        parts += [f"{suite['name']} ({KINDS[suite['kind']]})", *_aligned(*_figures(suite, report["models"])), ""]
        if any(metric["differences"] for metric in suite["metrics"].values()):
            parts += [*_aligned(*_differences(suite)), ""]
    return "\n".join(parts).rstrip()


def figure_table(suite: Mapping[str, Any], models: Sequence[str]) -> list[str]:
    """Lines of a table with a row per metric and a column per model."""
    return table(*_figures(suite, models))


def _figures(suite: Mapping[str, Any], models: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    rows = []
    for name, metric in suite["metrics"].items():
        cells = []
        for model in models:
            figure = metric["models"].get(model)
            cell = figure_text(figure, metric["unit"]) if figure else "no verdict"
            undecided = metric["undecided"].get(model)
            cells.append(f"{cell} ({undecided} undecided)" if undecided and figure else cell)
        rows.append([_label(name, metric["unit"]), *cells])
    return ["", *models], rows


def difference_table(suite: Mapping[str, Any]) -> list[str]:
    """Lines of a table with a row per metric and a column per pair of models."""
    return table(*_differences(suite))


def _differences(suite: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    pairs = list(
        dict.fromkeys(
            (one["model"], one["minus"]) for metric in suite["metrics"].values() for one in metric["differences"]
        )
    )
    rows = []
    for name, metric in suite["metrics"].items():
        found = {(one["model"], one["minus"]): one for one in metric["differences"]}
        cells = [difference_text(found[pair], metric["unit"]) if pair in found else "no verdict" for pair in pairs]
        rows.append([_label(name, metric["unit"]), *cells])
    return ["", *(f"{later} − {earlier}" for later, earlier in pairs)], rows


def certificate_table(certificates: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines of a table with a row per merged model, linked to its certificate."""
    rows = []
    for one in certificates:
        logits, source = one["logits"] or {}, (one["rows"] or {}).get("source", "no rows")
        figures = [f"{logits[key]:.3g}" if key in logits else "" for key in ("relative_error", "mean_kl")]
        agreement = f"{logits['top1_agreement']:.4f}" if logits else ""
        link = f"[certificate]({one['page']})"
        rows.append([one["model"], one["verdict"], *figures, agreement, source.replace("_", " "), link])
    return table(["model", "verdict", "relative error", "mean KL", "same top token", "rows", "certificate"], rows)


def gate_table(gates: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines of a table with a row per gate."""
    rows = [["pass" if gate["passed"] else "**FAIL**", gate["subject"], gate["bounds"], _found(gate)] for gate in gates]
    return table(["", "figure", "must be", "is"], rows)


def _found(gate: Mapping[str, Any]) -> str:
    if gate["value"] is None:
        return "not measured"
    text = difference_text if gate["minus"] else figure_text
    return text(gate, gate["unit"])


def figure_text(figure: Mapping[str, Any], unit: str) -> str:
    """A figure with its interval: `74.0 % [66.5, 80.3]`, `1.234 [1.200, 1.270]`."""
    if unit == "share":
        return f"{100 * figure['value']:.1f} % [{100 * figure['low']:.1f}, {100 * figure['high']:.1f}]"
    digits = _digits(unit)
    return f"{figure['value']:.{digits}f} [{figure['low']:.{digits}f}, {figure['high']:.{digits}f}]"


def difference_text(figure: Mapping[str, Any], unit: str) -> str:
    """A difference with its interval: `+29.3 points [+21.3, +37.3]`."""
    if unit == "share":
        value, low, high = (100 * figure[key] for key in ("value", "low", "high"))
        return f"{value:+.1f} points [{low:+.1f}, {high:+.1f}]"
    digits = _digits(unit)
    return f"{figure['value']:+.{digits}f} [{figure['low']:+.{digits}f}, {figure['high']:+.{digits}f}]"


def _digits(unit: str) -> int:
    return {"bits/byte": 4, "nats": 2, "tokens": 1}[unit]


def headline(report: Mapping[str, Any]) -> str:
    """One line for people: the figure of the first gate (else of the first metric) for the last model.

    For example `aligned: right in asked language 74 % (67-80), +29 points over instruct (+21..+37)`.
    """
    suite, name, model, minus = _headline_subject(report)
    metric = suite["metrics"][name]
    figure = metric["models"].get(model)
    if figure is None:
        return f"{model}: {name.replace('_', ' ')} was not measured"
    text = f"{model}: {name.replace('_', ' ')} {_short(figure, metric['unit'])}"
    for one in metric["differences"]:
        if (one["model"], one["minus"]) == (model, minus):
            text += f", {_short_difference(one, metric['unit'])}"
    return text


def _headline_subject(report: Mapping[str, Any]) -> tuple[Mapping[str, Any], str, str, str | None]:
    models: list[str] = report["models"]
    # A gate on a difference is what the recipe set out to show; any gate comes before the first metric.
    gates = sorted(report["gates"], key=lambda gate: gate["minus"] is None)
    if gates:
        suite = next(one for one in report["suites"] if one["name"] == gates[0]["suite"])
        name, model, minus = gates[0]["metric"], gates[0]["model"], gates[0]["minus"]
    else:
        suite, model, minus = report["suites"][0], models[-1], None
        name = next(iter(suite["metrics"]))
    earlier = models[: models.index(model)]
    return suite, name, model, minus or (earlier[-1] if earlier else None)


def _short(figure: Mapping[str, Any], unit: str) -> str:
    if unit == "share":
        return f"{100 * figure['value']:.0f} % ({100 * figure['low']:.0f}-{100 * figure['high']:.0f})"
    return f"{figure['value']:.3g} {unit}"


def _short_difference(one: Mapping[str, Any], unit: str) -> str:
    if unit != "share":
        return f"{one['value']:+.3g} against {one['minus']} ({one['low']:+.3g}..{one['high']:+.3g})"
    value, low, high = (100 * one[key] for key in ("value", "low", "high"))
    return f"{value:+.0f} points {'over' if value >= 0 else 'against'} {one['minus']} ({low:+.0f}..{high:+.0f})"


def _label(name: str, unit: str) -> str:
    words = name.replace("_", " ")
    return words if unit in ("share", "bits/byte") else f"{words} ({unit})"


def _rows_line(suite: Mapping[str, Any]) -> str:
    text = f"{KINDS[suite['kind']]}; {suite['rows']} rows"
    return f"{text}, {suite['left_out']} left out as too long or empty." if suite["left_out"] else f"{text}."


def _sample_table(samples: Sequence[Mapping[str, Any]], models: Sequence[str]) -> list[str]:
    return table(["question", *models], [[one["question"], *(one["answers"][m] for m in models)] for one in samples])


def _aligned(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(line[column]) for line in (head, *rows)) for column in range(len(head))]
    return [
        "  " + "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in (head, *rows)
    ]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table; cells are made safe and cut at 300 characters."""
    lines = [list(head), ["---"] * len(head), *rows]
    return ["| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines]


def _cell(text: str) -> str:
    """One line without table marks or HTML: answers of models are data, not markup."""
    short = text if len(text) <= _LONGEST_CELL else text[:_LONGEST_CELL] + "…"
    escaped = short.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")
    return " ".join(escaped.split())
