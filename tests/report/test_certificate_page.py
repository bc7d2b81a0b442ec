"""The certificate's page: reads well for one row as for many, for a chain as for a combination."""

from __future__ import annotations

from typing import Any

from posttrain.report.certificate import certificate_page

FIGURES: dict[str, Any] = {
    "relative_error": 3e-3,
    "max_difference": 0.1,
    "mean_difference": 0.01,
    "mean_kl": 1e-5,
    "max_kl": 1e-4,
    "top1_agreement": 0.99,
    "reference_loss": None,
    "loss": None,
    "tokens": 1,
    "rows": 1,
}


def certificate(**changes: Any) -> dict[str, Any]:
    made: dict[str, Any] = {
        "verdict": "pass",
        "merged": "instruct",
        "method": {"kind": "chain"},
        "base": {"asked": None, "mode": "original", "proved_by": ["commit 0123"], "relative_error": None},
        "dtype": "bfloat16",
        "parts": ["@base", "@sft"],
        "rows": {"source": "held_out", "rows": 1},
        "compared": {"mode": "whole", "dtype": "float32"},
        "logits": FIGURES,
        "weights": {"tensors": 21, "numbers": 16_384, "off": []},
        "inputs": {},
        "limits": {"relative_error": 0.03, "min_top1_agreement": 0.8},
        "tensors": [{"name": "a.weight", "cosine": 0.99995, "norm_ratio": 1.0, "relative_change": 0.1}],
        "advice": [],
        "files": {"config.json": {"sha256": "abc", "bytes": 1234}},
        "failures": [],
    }
    return made | changes


def test_one_row_is_one_row() -> None:
    page = certificate_page(certificate())
    assert "On 1 row that training never saw; both whole in memory, computing in float32." in page
    assert "So few rows make rough figures." in page
    assert "| 1 token |" in page
    assert "All 16,384 numbers of 21 tensors that were looked at are those of the adapters in use" in page
    assert "of 1 changed tensor, none has a cosine below 0.9999" in page
    assert "is proved by commit 0123" in page


def test_many_rows_are_not_called_few() -> None:
    page = certificate_page(certificate(rows={"source": "given", "rows": 64}))
    assert "On 64 rows that the user gave; both whole" in page
    assert "So few" not in page


def test_numbers_that_are_off_are_named_with_their_share() -> None:
    off = [{"name": f"layer.{number}.weight", "share": 0.025, "largest": 0.5} for number in range(12)]
    weights = {"tensors": 21, "numbers": 10, "off": off}
    page = certificate_page(certificate(verdict="fail", failures=["12 tensors are not"], weights=weights))
    assert page.startswith("# Certificate: instruct\n\n**FAIL**\n\n- does not hold: 12 tensors are not\n")
    assert "| layer.0.weight | 2.5 % | 0.5 |" in page
    assert "And 2 tensors more." in page


def test_a_combination_is_not_compared_with_adapters_in_use() -> None:
    method = {"kind": "ties", "weights": [1.0, 0.5], "density": 0.2, "t": None}
    one = certificate(logits=None, weights=None, method=method, inputs={"1: @a": FIGURES, "2: @b": FIGURES})
    page = certificate_page(one)
    assert "adapters in use" not in page
    assert "- weights 1, 0.5; density 0.2\n" in page
    assert "Nothing but these files computes what a combination should" in page


def test_what_nobody_proved_is_said() -> None:
    base = {
        "mode": "original",
        "proved_by": ["nothing but the word of whoever named it"],
        "relative_error": None,
        "asked": None,
    }
    page = certificate_page(certificate(base=base, rows=None, compared=None, logits=None, weights=None))
    assert "what says that this is the base of these adapters: nothing but the word of whoever named it" in page
    assert "Not compared: no rows were given." in page
    assert "is proved by" not in page
