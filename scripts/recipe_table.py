"""Memory and time of the shipped recipes on kinds of GPUs, as `posttrain check` predicts them, into docs/recipes.md.

    python scripts/recipe_table.py [--check]

No network, no GPU. `--check` writes nothing, and ends with 1 where the page says something else.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parent.parent / "docs" / "recipes.md"
BEGIN, END = "<!-- begin: scripts/recipe_table.py -->", "<!-- end: scripts/recipe_table.py -->"
KINDS = {
    "t4": "T4",
    "rtx4090": "RTX 4090",
    "a100-40gb": "A100 40",
    "a100-80gb": "A100 80",
    "h100": "H100",
    "h200": "H200",
}
GIB, GB, HOUR = 1 << 30, 10**9, 3600
WITHOUT = ("quickstart",)
"""Made for a CPU, from scratch."""


def predicted(name: str, kind: str, runs: Path) -> tuple[list[Any], int, Any]:
    """(training stages, bytes of disk, device) of a recipe on a kind of GPU; fp16 on one that has no bf16."""
    from posttrain.estimate.devices import find_device
    from posttrain.pipeline.forecast import TRAINING, forecast
    from posttrain.pipeline.plan import plan
    from posttrain.recipe.load import load_recipe

    device = find_device(kind)
    loaded = load_recipe(name, [] if device.bf16 else ["precision=fp16"], {})
    found = forecast(plan(loaded, runs / name, leave_open=True), device)
    return [stage for stage in found.stages if stage.kind in TRAINING], found.as_dict()["disk"], device


def tables(names: list[str]) -> str:
    """The tables as markdown: memory, then time."""
    memory, hours = [], []
    with tempfile.TemporaryDirectory() as runs:
        for name in names:
            found = {kind: predicted(name, kind, Path(runs)) for kind in KINDS}
            stages, disk, _ = found["h200"]
            spread = stages[0].spread
            many = "1" if spread.processes == 1 else f"{spread.processes}, {spread.kind}"
            many += ", offloaded" if spread.weights_on_host else ""
            cells = [" / ".join(map(gib, each)) for each, *_ in found.values()]
            memory.append([f"`{name}`", many, *cells, f"{disk / GB:,.0f} GB"])
            cells = [" / ".join(rate(stage, gpu) for stage in each) for each, _, gpu in found.values()]
            most = " / ".join(whole(stage) for stage in stages)
            hours.append([f"`{name}`", *cells, most])
    head = list(KINDS.values())
    return "\n".join(
        [
            "Memory of each GPU, GiB:",
            "",
            *table(["recipe", "GPUs", *head, "disk"], memory),
            "",
            "Hours for 10^9 tokens, all GPUs of the recipe together; last, the whole stage on H200 at most:",
            "",
            *table(["recipe", *head, "whole"], hours),
        ]
    )


def gib(stage: Any) -> str:
    """The memory that a stage takes; `no` where it does not fit, `<` where it does in smaller pieces than asked for."""
    if not stage.fits:
        return "no"
    return f"{stage.memory.device / GIB:.0f}" if stage.piece.tokens <= stage.largest else "<"


def rate(stage: Any, device: Any) -> str:
    """Hours for 10^9 tokens where a stage fits."""
    from posttrain.estimate.cost import cost

    if not stage.fits:
        return "no"
    seconds = cost(stage.flops_per_token, 10**9, device, devices=stage.spread.processes).seconds
    return f"{seconds / HOUR:.1f}" if seconds < 100 * HOUR else f"{seconds / HOUR:.0f}"


def whole(stage: Any) -> str:
    """Hours of a stage if every row had the greatest length; `?` where the recipe does not say how many rows."""
    if not stage.fits:
        return "no"
    return "?" if stage.seconds is None else f"{stage.seconds / HOUR:.1f}"


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a markdown table."""
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def with_tables(page: str, made: str) -> str:
    """The page with new tables between its two marks."""
    before, _, rest = page.partition(BEGIN)
    _, mark, after = rest.partition(END)
    if not mark:
        raise SystemExit(f"{PAGE} has no {BEGIN} … {END}")
    return f"{before}{BEGIN}\n{made}\n{END}{after}"


def main() -> int:
    """Writes the tables, or compares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as empty:
        os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HOME": empty}  # before any import of the hub's library
        from posttrain.recipe.bundled import list_bundled

        made = tables([name for name in list_bundled("recipes") if name not in WITHOUT])
    page = PAGE.read_text(encoding="utf-8")
    new = with_tables(page, made)
    if options.check:
        return int(new != page)
    PAGE.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
