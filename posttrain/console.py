"""What people see while a recipe runs: a live table in a terminal, plain lines anywhere else."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from rich.live import Live
    from rich.table import Table

State = Literal["waiting", "running", "done", "skipped", "failed", "stopped"]

STEP_LINE_SECONDS = 10.0
"""Least time between two lines of training progress where there is no terminal."""


class Console(Protocol):
    """What a run tells people."""

    def begin(self, stages: list[str]) -> None:
        """The stages of the run, in order."""

    def start(self, stage: str, reason: str) -> None:
        """A stage's process starts; `reason` may say that it resumes."""

    def event(self, stage: str, event: dict[str, Any]) -> None:
        """Something a stage said; see `posttrain.stages.context.Events`."""

    def finish(self, stage: str, state: State, headline: str, seconds: float, table: str = "") -> None:
        """A stage has its output (`done`, `skipped`), or its gates did not hold (`failed`).

        Args:
            headline: its figures in one line.
            table: text of several lines that is shown at the end of the run.
        """

    def note(self, text: str) -> None:
        """One line of news."""

    def close(self) -> None:
        """Ends the display and shows the tables of the stages that have one."""


@dataclass
class Pace:
    """Time left, from the steps that this process was seen to take."""

    _first: tuple[float, int] | None = None

    def left(self, step: int, total: int | None, now: float) -> float | None:
        """Returns the seconds left at some step, or None while there is nothing to go by."""
        if self._first is None or step < self._first[1]:
            self._first = (now, step)
        since, start = self._first
        if not total or step <= start:
            return None
        return (total - step) * (now - since) / (step - start)


def open_console(quiet: bool = False, stream: IO[str] | None = None) -> Console:
    """Returns the display that fits: nothing when quiet, live in a terminal, else plain lines."""
    stream = stream or sys.stdout
    if quiet:
        return Silent()
    return LiveTable(stream) if stream.isatty() else Lines(stream)


def duration(seconds: float | None) -> str:
    """Spells a duration: `8.2s`, `3m 05s`, `2h 14m`."""
    if seconds is None:
        return ""
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes}m {rest:02d}s" if minutes < 60 else f"{minutes // 60}h {minutes % 60:02d}m"


def figures(event: dict[str, Any]) -> str:
    """Spells the figures of a `step` event: loss and tokens per second."""
    parts = []
    if event.get("loss") is not None:
        parts.append(f"loss {event['loss']:.4f}")
    if event.get("tokens_per_second") is not None:
        parts.append(f"{event['tokens_per_second']:,.0f} tokens/s")
    return "  ".join(parts)


class Silent:
    """Says nothing: errors go to stderr by another way."""

    def begin(self, stages: list[str]) -> None:
        """See `Console`, as everywhere here."""

    def start(self, stage: str, reason: str) -> None: ...

    def event(self, stage: str, event: dict[str, Any]) -> None: ...

    def finish(self, stage: str, state: State, headline: str, seconds: float, table: str = "") -> None: ...

    def note(self, text: str) -> None: ...

    def close(self) -> None: ...


@dataclass
class Lines:
    """One line per phase and finished stage, and a step line now and then."""

    stream: IO[str]
    _width: int = 0
    _last_step: float = 0.0
    _pace: Pace = field(default_factory=Pace)
    _tables: list[str] = field(default_factory=list)

    def begin(self, stages: list[str]) -> None:
        self._width = max(map(len, stages), default=0)

    def start(self, stage: str, reason: str) -> None:
        self._pace, self._last_step = Pace(), 0.0
        if reason:
            self._say(stage, reason)

    def event(self, stage: str, event: dict[str, Any]) -> None:
        if event["event"] in ("phase", "note"):
            self._say(stage, event["text"])
        elif event["event"] == "step":
            self._step(stage, event)

    def _step(self, stage: str, event: dict[str, Any]) -> None:
        now, step, total = time.monotonic(), event["step"], event.get("total")
        left = self._pace.left(step, total, now)
        if now - self._last_step < STEP_LINE_SECONDS and step != total:
            return
        self._last_step = now
        remaining = f"  {duration(left)} left" if left else ""
        self._say(stage, f"step {step}{f'/{total}' if total else ''}  {figures(event)}{remaining}")

    def finish(self, stage: str, state: State, headline: str, seconds: float, table: str = "") -> None:
        took = f" in {duration(seconds)}" if state == "done" else ""
        self._say(stage, f"{state}{took}{f': {headline}' if headline else ''}")
        self._tables += [table] if table else []

    def note(self, text: str) -> None:
        self._say("", text)

    def _say(self, stage: str, text: str) -> None:
        print(f"{stage:<{self._width}}  {text}".rstrip(), file=self.stream, flush=True)

    def close(self) -> None:
        for table in self._tables:
            print(f"\n{table}", file=self.stream, flush=True)


@dataclass
class _Row:
    state: State = "waiting"
    detail: str = ""
    step: int = 0
    total: int | None = None
    left: float | None = None
    began: float = 0.0
    seconds: float | None = None
    pace: Pace = field(default_factory=Pace)


_STYLE = {
    "waiting": "dim",
    "running": "bold cyan",
    "done": "green",
    "skipped": "dim green",
    "failed": "bold red",
    "stopped": "yellow",
}


class LiveTable:
    """Every stage in one table that redraws itself: state, progress, figures, time left."""

    def __init__(self, stream: IO[str]) -> None:
        from rich.console import Console as RichConsole

        self._console = RichConsole(file=stream, highlight=False)
        self._rows: dict[str, _Row] = {}
        self._tables: list[str] = []
        self._live: Live | None = None

    def begin(self, stages: list[str]) -> None:
        from rich.live import Live

        self._rows = {stage: _Row() for stage in stages}
        self._live = Live(get_renderable=self._table, console=self._console, refresh_per_second=4)
        self._live.start()

    def start(self, stage: str, reason: str) -> None:
        self._rows[stage] = _Row("running", reason, began=time.monotonic())

    def event(self, stage: str, event: dict[str, Any]) -> None:
        row = self._rows[stage]
        if event["event"] == "phase":
            row.detail, row.total = event["text"], None
        elif event["event"] == "note":
            self.note(f"{stage}: {event['text']}")
        elif event["event"] == "step":
            row.step, row.total, row.detail = event["step"], event.get("total"), figures(event)
            row.left = row.pace.left(row.step, row.total, time.monotonic())

    def finish(self, stage: str, state: State, headline: str, seconds: float, table: str = "") -> None:
        self._rows[stage] = _Row(state, headline, seconds=seconds if state != "skipped" else None)
        self._tables += [table] if table else []

    def note(self, text: str) -> None:
        self._console.print(text, style="dim", markup=False)

    def close(self) -> None:
        if self._live is not None:
            for row in self._rows.values():
                row.state = "stopped" if row.state == "running" else row.state
            self._live.stop()
        for table in self._tables:
            self._console.print(f"\n{table}", markup=False)

    def _table(self) -> Table:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
        now = time.monotonic()
        for stage, row in self._rows.items():
            spent = now - row.began if row.state == "running" else row.seconds
            bar = ProgressBar(total=row.total, completed=row.step, width=20) if row.total else Text("")
            steps = f"{row.step}/{row.total}" if row.total else ""
            left = f"{duration(row.left)} left" if row.left else ""
            table.add_row(
                Text(stage, _STYLE[row.state]),
                Text(row.state, _STYLE[row.state]),
                bar,
                Text(steps),
                Text(row.detail),
                Text(duration(spent), "dim"),
                Text(left, "dim"),
            )
        return table
