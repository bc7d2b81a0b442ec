"""Measures `posttrain doctor` on a 70 B shape (sparse files) and on folders with a tokenizer alone.

    python scripts/bench_doctor.py [FOLDER ...] [--repeats 3]

Prints medians of wall and processor seconds, the peak of resident memory, and the load. Without folders,
the tokenizers of POSTTRAIN_SHARED (default: the folder `shared` beside the repository) are taken.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def measure(folder: Path, environment: dict[str, str]) -> tuple[float, float, float]:
    """Runs the doctor once; returns wall seconds, processor seconds and peak MB of its process."""
    started = time.monotonic()
    child = subprocess.Popen(
        [sys.executable, "-m", "posttrain", "doctor", str(folder), "--json"], stdout=subprocess.DEVNULL, env=environment
    )
    _, status, used = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode not in (0, 1):
        sys.exit(f"posttrain doctor {folder} ended with exit code {child.returncode}")
    return time.monotonic() - started, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024


def main() -> None:
    """Measures all folders and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="*")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    shared = Path(os.environ.get("POSTTRAIN_SHARED", ROOT.parent / "shared")) / "tokenizers"
    folders = options.folders or sorted(path.parent for path in shared.glob("*/tokenizer.json"))
    with tempfile.TemporaryDirectory() as made:
        large = Path(made) / "70b"
        subprocess.run([sys.executable, "-c", _MAKE, str(large)], check=True)  # apart: our own memory counts in a child
        print(f"load {os.getloadavg()[0]:.2f}; medians of {options.repeats}")
        print(f"{'folder':<24}{'wall s':>8}{'cpu s':>8}{'peak MB':>9}")
        for folder in [large, *folders]:
            runs = [measure(folder, dict(os.environ)) for _ in range(options.repeats)]
            wall, cpu, peak = (statistics.median(figures) for figures in zip(*runs, strict=True))
            print(f"{folder.name:<24}{wall:>8.2f}{cpu:>8.2f}{peak:>9.0f}")


_MAKE = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(ROOT / "tests" / "doctor")!r})
from test_doctor_checkpoint import sparse_70b
sparse_70b(Path(sys.argv[1]))
"""


if __name__ == "__main__":
    main()
