"""Where a run's wall time went is read from its records (`scripts/bench_pipeline.py`), and nothing is counted twice."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from runs_support import Project

from posttrain.artifact import Artifact
from posttrain.stages.context import Clock

ROOT = Path(__file__).resolve().parent.parent
BEGUN = 1_800_000_000.0


def script() -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("bench_pipeline", ROOT / "scripts" / "bench_pipeline.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_pipeline"] = module  # its dataclass looks itself up there
    spec.loader.exec_module(module)
    return module


BENCH = script()


def record(
    run_dir: Path, stage: str, launched: float, started: float, finished: float, parts: dict[str, float]
) -> Path:
    """Leaves what a finished stage leaves, its times counted from the run's beginning."""
    folder = run_dir / stage
    folder.mkdir(parents=True)
    (folder / "job.json").write_text("{}")
    os.utime(folder / "job.json", (BEGUN + launched, BEGUN + launched))
    made: dict[str, Any] = {
        name: datetime.fromtimestamp(BEGUN + moment, UTC).isoformat(timespec="milliseconds")
        for name, moment in (("started", started), ("finished", finished))
    }
    made |= {"cpu_seconds": 1.0, "parts": {part: {"seconds": one, "cpu_seconds": one} for part, one in parts.items()}}
    (folder / "stage.json").write_text(json.dumps({"stage": stage, "provenance": made}))
    return folder


def test_every_second_of_a_run_stands_in_one_place(tmp_path: Path) -> None:
    sft = record(tmp_path, "sft", 1.0, 3.0, 13.5, {"start": 2.0, "loading": 1.0, "training": 7.0})
    lines = [{"step": 1, "seconds": 4.0}, {"step": 2, "seconds": 2.0}]
    (sft / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    record(tmp_path, "merged", 14.0, 14.5, 16.0, {"start": 0.0, "merging": 1.0, "certificate": 0.5})
    stages = BENCH.read_stages(tmp_path, BEGUN, BEGUN + 16.25)
    assert [stage.stage for stage in stages] == ["(parent)", "sft", "merged"]
    assert stages[0].seconds == {"plan": 1.0}
    assert stages[1].seconds == pytest.approx(
        {"start": 4.0, "loading": 1.0, "training": 1.0, "steps": 6.0, "other": 0.5, "hand-over": 0.5}
    )
    assert stages[2].seconds["hand-over"] == pytest.approx(0.25)
    assert sum(sum(stage.seconds.values()) for stage in stages) == pytest.approx(16.25)
    assert BENCH.overhead(stages) == pytest.approx(16.25 - 6.0 - 1.0)  # without steps and merging
    shown = BENCH.table(stages)
    assert "steps *" in shown
    assert shown.splitlines()[-2].split()[-1] == "16.25"


def test_a_clock_gives_each_moment_to_one_part() -> None:
    begun, clock = time.monotonic(), Clock()
    clock.enter("data")
    time.sleep(0.02)
    clock.enter("loading")
    clock.enter("data")
    time.sleep(0.02)
    parts, ended = clock.parts(), time.monotonic()
    assert list(parts) == ["start", "data", "loading"]
    assert parts["data"]["seconds"] >= 0.04
    assert sum(part["seconds"] for part in parts.values()) == pytest.approx(ended - begun, abs=0.005)


def test_records_tell_where_a_real_run_spent_its_time(project: Project) -> None:
    begun = time.time()
    project.go()
    ended = time.time()
    artifact = Artifact.read(project.run_dir / "sft")
    assert artifact is not None
    assert {"start", "recording"} <= artifact.record.provenance["parts"].keys()
    stages = BENCH.read_stages(project.run_dir, begun, ended)
    assert [stage.stage for stage in stages] == ["(parent)", "sft", "instruct", "dpo", "aligned"]
    assert sum(sum(stage.seconds.values()) for stage in stages) == pytest.approx(ended - begun, abs=0.05)
    assert all(spent > -0.05 for stage in stages for spent in stage.seconds.values())
