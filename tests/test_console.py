"""What people see: plain lines without a terminal, a table in one, nothing when quiet."""

from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.console import Console, Lines, LiveTable, Pace, Silent, duration, figures, open_console

STEP = {"event": "step", "step": 3, "total": 9, "loss": 1.23456, "tokens_per_second": 12345.6}


def tell(console: Console) -> None:
    """One run with a finished, a skipped and a stopped stage."""
    console.begin(["base", "sft", "dpo"])
    console.finish("base", "skipped", "loss 2.1", 0.0)
    console.start("sft", "resumes from its last checkpoint")
    console.event("sft", {"event": "phase", "text": "reading rows"})
    console.event("sft", STEP)
    console.event("sft", {**STEP, "step": 4})
    console.event("sft", {**STEP, "step": 9})
    console.event("sft", {"event": "note", "text": "2 rows dropped"})
    console.event("sft", {"event": "done", "headline": "loss 1.0"})
    console.finish("sft", "done", "loss 1.0", 61.0, "model  loss\nsft    1.0")
    console.start("dpo", "")
    console.note("moved dpo to .aside/dpo-1")
    console.close()


def test_lines_are_one_per_event_that_matters() -> None:
    stream = io.StringIO()
    tell(Lines(stream))
    said = stream.getvalue().splitlines()
    assert said[0] == "base  skipped: loss 2.1"
    assert said[1:4] == [
        "sft   resumes from its last checkpoint",
        "sft   reading rows",
        "sft   step 3/9  loss 1.2346  12,346 tokens/s",
    ]
    assert said[4] == "sft   step 9/9  loss 1.2346  12,346 tokens/s"  # step 4 came too soon after step 3
    assert said[5:] == [
        "sft   2 rows dropped",
        "sft   done in 1m 01s: loss 1.0",
        "      moved dpo to .aside/dpo-1",
        "",
        "model  loss",
        "sft    1.0",
    ]


def test_a_terminal_shows_every_stage_and_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.setenv("TERM", "xterm")

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    console = open_console(stream=stream)
    assert isinstance(console, LiveTable)
    tell(console)
    said = stream.getvalue()
    for text in ("skipped", "done", "stopped", "1m 01s", "2 rows dropped", "loss 1.0", "sft    1.0"):
        assert text in said


def test_a_live_row_shows_step_figures_and_time_left() -> None:
    from rich.console import Console as RichConsole

    table = LiveTable(io.StringIO())
    table.begin(["sft"])
    table.start("sft", "")
    table.event("sft", STEP)
    table.event("sft", {**STEP, "step": 4})
    rich = RichConsole(file=io.StringIO(), width=140, record=True)
    rich.print(table._table())
    table.close()
    text = rich.export_text()
    assert "4/9" in text
    assert "loss 1.2346  12,346 tokens/s" in text
    assert "left" in text


def test_quiet_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    console = open_console(quiet=True)
    assert isinstance(console, Silent)
    tell(console)
    assert capsys.readouterr().out == ""


def test_durations_and_figures() -> None:
    assert [duration(seconds) for seconds in (None, 8.24, 185, 8040)] == ["", "8.2s", "3m 05s", "2h 14m"]
    assert figures({"event": "step", "step": 1}) == ""


@given(st.integers(1, 1000), st.integers(2, 1000), st.floats(0.01, 100))
def test_time_left_is_exact_at_an_even_pace(start: int, steps: int, seconds: float) -> None:
    pace, total = Pace(), start + steps
    assert pace.left(start, total, 0.0) is None
    left = pace.left(start + 1, total, seconds)
    assert left == pytest.approx((steps - 1) * seconds)
