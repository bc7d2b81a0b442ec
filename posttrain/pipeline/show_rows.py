"""`posttrain check --show`: what stages will learn from their first rows, as text or as a page."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

from posttrain.artifact import write_atomically
from posttrain.errors import UserError
from posttrain.pipeline.plan import Plan
from posttrain.recipe.describe import nearest
from posttrain.report.token_view import token_page, token_text
from posttrain.stages.preview import SHOWN_KINDS, preview


def show_rows(planned: Plan, count: int, name: str | None, html: Path | None, note: Callable[[str], None]) -> str:
    """Renders the first rows of the sft and dpo stages of a plan; returns their text, or writes a page and says so.

    The text has colours where stdout is a terminal and NO_COLOR is not set.

    Args:
        name: of this stage alone.
        note: told what is being rendered.

    Raises:
        UserError: no such stage, or rows that the stage itself would refuse.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it laments kernels that rendering does not need
    jobs = {stage.stage: stage.job for stage in planned.stages}
    shown = [job.stage for job in jobs.values() if job.kind in SHOWN_KINDS]
    if name is not None and name not in shown:
        raise UserError(f"--stage {name}", "is no sft or dpo stage of this recipe", nearest(name, shown))
    stages = []
    for one in [name] if name else shown:
        note(f"rendering the rows of {one}")
        stages.append(preview(jobs[one], jobs, count))
    if html is None:
        return "\n" + token_text(stages, colour=sys.stdout.isatty() and "NO_COLOR" not in os.environ)
    write_atomically(html, token_page(f"{planned.run_dir.name}: what the model learns", stages))
    return f"wrote {html}\n"
