"""Runs the development recipe on real rows for several seeds and prints held-out preference accuracy.

    python scripts/real_rows/run.py [--seeds 1 2 3] [--runs-dir runs]

The data are read from POSTTRAIN_SHARED (default: the folder `shared` beside the repository). Exit code
0 when DPO raised the accuracy for every seed, 1 otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent


def run_seed(seed: int, runs_dir: Path, shared: Path, overrides: list[str]) -> tuple[Path, float]:
    """Runs the recipe with one seed; returns its run folder and wall seconds."""
    name = f"real-rows-{seed}"
    settings = [f"name={name}", f"seed={seed}", *overrides]
    command = [sys.executable, "-m", "posttrain", "run", str(HERE / "recipe.yaml"), "--runs-dir", str(runs_dir)]
    command += [word for setting in settings for word in ("--set", setting)]
    started = time.monotonic()
    subprocess.run(command, check=True, env={**os.environ, "POSTTRAIN_SHARED": str(shared)})
    return runs_dir / name, time.monotonic() - started


def main() -> int:
    """Runs all seeds and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args()
    shared = Path(os.environ.get("POSTTRAIN_SHARED", ROOT.parent / "shared")).resolve()
    if not (shared / "data").is_dir():
        sys.exit(f"{shared} has no data folder: set POSTTRAIN_SHARED")
    reports = []
    for seed in options.seeds:
        folder, seconds = run_seed(seed, options.runs_dir, shared, options.set)
        reports.append((seed, json.loads((folder / "report" / "report.json").read_text(encoding="utf-8")), seconds))
    return print_table(reports)


def print_table(reports: list[tuple[int, dict, float]]) -> int:
    """Prints accuracy before and after DPO with the paired interval of the difference; returns the exit code."""
    raised = True
    print(f"\n{'seed':<6}{'metric':<20}{'base':>8}{'instruct':>10}{'aligned':>9}   aligned - instruct [95 %]")
    for seed, report, seconds in reports:
        suite = report["suites"][0]
        for name in ("accuracy", "accuracy_per_token"):
            metric = suite["metrics"][name]
            found = {model: figure["value"] for model, figure in metric["models"].items()}
            change = next(d for d in metric["differences"] if (d["model"], d["minus"]) == ("aligned", "instruct"))
            shares = f"{found['base']:>8.1%}{found['instruct']:>10.1%}{found['aligned']:>9.1%}"
            points = f"{100 * change['value']:+.1f} points [{100 * change['low']:+.1f}, {100 * change['high']:+.1f}]"
            print(f"{seed:<6}{name:<20}{shares}   {points}")
            raised = raised and change["value"] > 0
        print(f"{'':<6}{suite['rows']} pairs, {seconds:.0f} s")
    return 0 if raised else 1


if __name__ == "__main__":
    sys.exit(main())
