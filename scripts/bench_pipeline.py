"""Runs a recipe in a fresh folder and tells, from its records, where the wall time of every stage went.

    python scripts/bench_pipeline.py [RECIPE] [--set KEY=VALUE] [--json FILE] [--tiny]

The run is `posttrain run RECIPE` (default: quickstart), as a user starts it. Overhead is the wall time of the
command minus what is spent inside optimizer steps, generation and tensor merging. The sources of the table:

    plan           from the command's start to the first stage's job file: the parent's imports, plan and preflight
    start          from a stage's job file to its process's first line, and the imports that it had left to do
    data … recording   `provenance.parts` of the stage's record (posttrain.stages.context.Part)
    steps          `seconds` of metrics.jsonl: inside optimizer steps; the rest of `training` is set-up and checkpoints
    hand-over      from the record to the next stage's job file: sync, rename, the process's end, the parent's part

They add up to the wall time; what a stage's record leaves unexplained stands under `other`. Exit code 1 where the
overhead of the quickstart is above its limit on an idle machine, or the run fails.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from posttrain.artifact import RECORD
from posttrain.pretraining.metrics import FILE, read_metrics

LIMIT = 35.0
"""Seconds that the quickstart may take besides its work."""
WORK = ("steps", "generation", "merging")
"""What the recipe is run for."""
ORDER = (
    "plan",
    "start",
    "data",
    "loading",
    "proofs",
    "reference",
    "training",
    "steps",
    "generation",
    "scoring",
    "merging",
    "certificate",
    "saving",
    "recording",
    "other",
    "hand-over",
)
TINY = (
    "stages.base.trainer.max_steps=3",
    "stages.sft.trainer.max_steps=2",
    "stages.dpo.trainer.max_steps=2",
    "stages.report.suites[0].max_rows=4",
    "stages.report.suites[0].max_new_tokens=4",
    "stages.report.require=[]",
)
"""Settings that take the quickstart through every line of this script in seconds of work."""


@dataclass(frozen=True)
class StageTime:
    """Where one stage's wall time went."""

    stage: str
    seconds: dict[str, float]
    cpu_seconds: float
    """Of its process, all threads."""


def read_stages(run_dir: Path, begun: float, ended: float) -> list[StageTime]:
    """Reads the records of a finished run.

    Args:
        begun, ended: Unix times of the command's start and end.
    """
    records = [json.loads(path.read_text(encoding="utf-8")) for path in run_dir.glob(f"*/{RECORD}")]
    records.sort(key=lambda record: record["provenance"]["started"])
    launched = [(run_dir / record["stage"] / "job.json").stat().st_mtime for record in records]
    found = []
    for number, record in enumerate(records):
        made = record["provenance"]
        started, finished = (datetime.fromisoformat(made[name]).timestamp() for name in ("started", "finished"))
        seconds = {part: spent["seconds"] for part, spent in made["parts"].items()}
        seconds["other"] = finished - started - sum(seconds.values())
        seconds["start"] += started - launched[number]
        seconds["hand-over"] = (launched[number + 1] if number + 1 < len(records) else ended) - finished
        if "training" in seconds:
            steps = read_metrics(run_dir / record["stage"] / FILE)
            seconds["steps"] = sum(line["seconds"] for line in steps)
            seconds["training"] -= seconds["steps"]
        found.append(StageTime(record["stage"], seconds, made["cpu_seconds"]))
    return [StageTime("(parent)", {"plan": launched[0] - begun}, 0.0), *found]


def overhead(stages: list[StageTime]) -> float:
    """Wall seconds of a run besides its work."""
    return sum(spent for stage in stages for part, spent in stage.seconds.items() if part not in WORK)


def table(stages: list[StageTime]) -> str:
    """One row per part, one column per stage, sums at the edges; work last."""
    used = [part for part in ORDER if any(part in stage.seconds for stage in stages)]
    parts = [part for part in used if part not in WORK] + [part for part in used if part in WORK]
    lines = [f"{'seconds':<12}" + "".join(f"{stage.stage:>10}" for stage in stages) + f"{'sum':>10}"]
    for part in parts:
        row = [stage.seconds.get(part) for stage in stages]
        cells = "".join(f"{'' if one is None else format(one, '.2f'):>10}" for one in row)
        mark = " *" if part in WORK else ""
        lines.append(f"{part + mark:<12}{cells}{sum(one or 0.0 for one in row):>10.2f}")
    sums = [sum(stage.seconds.values()) for stage in stages]
    lines.append(f"{'sum':<12}" + "".join(f"{one:>10.2f}" for one in sums) + f"{sum(sums):>10.2f}")
    lines.append(f"{'CPU':<12}" + "".join(f"{stage.cpu_seconds:>10.2f}" for stage in stages))
    return "\n".join(lines)


def run(recipe: str, overrides: list[str], runs: Path) -> tuple[float, float, float]:
    """Runs a recipe; returns Unix times of start and end, and the CPU seconds of all its processes."""
    words = [word for override in overrides for word in ("--set", override)]
    command = [sys.executable, "-m", "posttrain", "run", recipe, "--runs-dir", str(runs), *words]
    begun = time.time()
    process = subprocess.Popen(command, stdout=sys.stderr)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(1)
    return begun, time.time(), usage.ru_utime + usage.ru_stime


def main() -> None:
    """Runs, reads, prints, judges."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="quickstart")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds of overhead allowed")
    parser.add_argument(
        "--tiny", action="store_true", help="a few steps of the quickstart: shows that this script works"
    )
    parser.add_argument("--json", type=Path, help="write every figure there")
    arguments = parser.parse_args()
    before = os.getloadavg()
    with tempfile.TemporaryDirectory(prefix="bench-pipeline-") as folder:
        overrides = [*arguments.overrides, *(TINY if arguments.tiny else ())]
        begun, ended, cpu = run(arguments.recipe, overrides, Path(folder))
        (run_dir,) = (path for path in Path(folder).iterdir() if not path.name.startswith("."))
        stages = read_stages(run_dir, begun, ended)
    spent, wall = overhead(stages), ended - begun
    print(table(stages))
    loads = [" ".join(f"{load:.1f}" for load in loads) for loads in (before, os.getloadavg())]
    print(f"{os.cpu_count()} cores, load {loads[0]} before, {loads[1]} after")
    print(f"wall {wall:.1f} s, of it work (*) {wall - spent:.1f} s; CPU {cpu:.1f} s")
    met = spent <= arguments.limit
    print(f"overhead {spent:.1f} s, limit {arguments.limit:.0f} s: {'met' if met else 'MISSED'}")
    if arguments.json:
        figures = {"wall": wall, "cpu": cpu, "overhead": spent, "limit": arguments.limit, "met": met, "load": before}
        arguments.json.write_text(json.dumps({**figures, "stages": [asdict(stage) for stage in stages]}, indent=2))
    sys.exit(not met)


if __name__ == "__main__":
    main()
