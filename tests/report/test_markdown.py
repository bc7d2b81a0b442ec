"""The page people read, and the one line above all others."""

from __future__ import annotations

from typing import Any

from posttrain.report.markdown import difference_text, figure_text, headline, report_page, table


def figure(value: float, low: float, high: float) -> dict[str, Any]:
    return {"value": value, "low": low, "high": high, "rows": 150}


def make_report() -> dict[str, Any]:
    differences = [
        {"model": "instruct", "minus": "base", **figure(0.45, 0.37, 0.53)},
        {"model": "aligned", "minus": "base", **figure(0.74, 0.67, 0.81)},
        {"model": "aligned", "minus": "instruct", **figure(0.29, 0.2133, 0.3733)},
    ]
    right = {
        "unit": "share",
        "models": {
            "base": figure(0, 0, 0.025),
            "instruct": figure(0.45, 0.37, 0.53),
            "aligned": figure(0.74, 0.665, 0.803),
        },
        "differences": differences,
        "undecided": {"base": 150, "instruct": 2},
    }
    gate = {
        "suite": "questions",
        "metric": "right_in_asked_language",
        "model": "aligned",
        "minus": "instruct",
        "subject": "questions: right_in_asked_language of aligned minus instruct",
        "bounds": "at least 0.25",
        "unit": "share",
        **figure(0.29, 0.2133, 0.3733),
        "passed": True,
    }
    other = {**gate, "minus": None, "subject": "questions: right_in_asked_language of base", "value": None}
    sample = {"question": "What is | a <b>?", "answers": {"base": "x\ny", "instruct": "z" * 400, "aligned": ""}}
    return {
        "models": ["base", "instruct", "aligned"],
        "suites": [
            {
                "name": "questions",
                "kind": "generate",
                "rows": 150,
                "left_out": 3,
                "metrics": {"right_in_asked_language": right},
                "samples": [sample],
            }
        ],
        "gates": [{**other, "model": "base", "passed": False}, gate],
        "notes": ["The same rows."],
    }


def test_headline_tells_figure_and_difference() -> None:
    expected = "aligned: right in asked language 74 % (66-80), +29 points over instruct (+21..+37)"
    assert headline(make_report()) == expected
    assert headline({**make_report(), "gates": []}) == expected


def test_headline_of_one_model_and_of_another_unit() -> None:
    report = make_report()
    bits = {
        "unit": "bits/byte",
        "models": {"base": figure(1.234, 1.2, 1.3)},
        "differences": [],
        "undecided": {},
    }
    report |= {"models": ["base"], "gates": [], "suites": [{**report["suites"][0], "metrics": {"bits_per_byte": bits}}]}
    assert headline(report) == "base: bits per byte 1.23 bits/byte"


def test_page_holds_figures_differences_gates_and_samples() -> None:
    lines = report_page(make_report()).splitlines()
    assert lines[0] == "# Evaluation: base · instruct · aligned"
    assert (
        "| right in asked language | 0.0 % [0.0, 2.5] (150 undecided) | 45.0 % [37.0, 53.0] (2 undecided) "
        "| 74.0 % [66.5, 80.3] |" in lines
    )
    assert "|  | instruct − base | aligned − base | aligned − instruct |" in lines
    assert any(line.endswith("| +29.0 points [+21.3, +37.3] |") and "+45.0" in line for line in lines)
    assert "| **FAIL** | questions: right_in_asked_language of base | at least 0.25 | not measured |" in lines
    assert any(line.startswith("| pass | questions: right_in_asked_language of aligned minus") for line in lines)
    assert "greedy answers; 150 rows, 3 left out as too long or empty." in lines
    assert any(line.startswith("| What is \\| a &lt;b>? | x y | zzz") and "…" in line for line in lines)


def test_units_have_their_own_digits() -> None:
    assert figure_text(figure(1.23456, 1, 2), "bits/byte") == "1.2346 [1.0000, 2.0000]"
    assert difference_text(figure(-0.5, -1, 0), "nats") == "-0.50 [-1.00, +0.00]"


def test_tables_are_never_broken_by_what_models_say() -> None:
    lines = table(["a", "b"], [["x | y", "line\r\nbreak\\"]])
    assert lines == ["| a | b |", "| --- | --- |", "| x \\| y | line break\\\\ |"]


def test_certificates_of_merged_models_are_linked() -> None:
    logits = {"relative_error": 1.234e-3, "mean_kl": 2e-5, "top1_agreement": 0.9971}
    one = {"model": "aligned", "page": "../aligned/certificate.md", "verdict": "pass", "logits": logits}
    report = {**make_report(), "certificates": [{**one, "rows": {"source": "held_out", "rows": 16}}]}
    line = "| aligned | pass | 0.00123 | 2e-05 | 0.9971 | held out | [certificate](../aligned/certificate.md) |"
    assert line in report_page(report)
    combined = {**one, "logits": None, "rows": None}
    assert "| aligned | pass |  |  |  | no rows |" in report_page({**report, "certificates": [combined]})
    assert "Certificates" not in report_page(make_report())
