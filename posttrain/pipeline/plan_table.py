"""A plan as text for people."""

from __future__ import annotations

from typing import Any

from posttrain.pipeline.plan import Plan, explain, show
from posttrain.recipe.load import LoadedRecipe

_HIDDEN = {"kind", "version", "seed", "precision", "trainer", "chat_template", "models"}


def plan_text(planned: Plan) -> str:
    """One line per stage: what happens to it, and why."""
    width = max(len(stage.stage) for stage in planned.stages)
    lines = []
    for stage in planned.stages:
        why = "; ".join(explain(stage)) if stage.action == "refuse" else stage.reason or stage.headline
        failed = f"did not hold: {'; '.join(stage.failed)}" if stage.failed else ""
        lines.append(f"{stage.stage:<{width}}  {stage.job.kind:<8}  {stage.action:<7}  {failed or why}".rstrip())
    return "\n".join(lines)


def check_text(loaded: LoadedRecipe, planned: Plan) -> str:
    """What each stage reads and is set to, what happens to it, and which hub ids are still open."""
    recipe = loaded.recipe
    lines = [f"{recipe.name}: {len(planned.stages)} stages, seed {recipe.seed}, {recipe.precision}"]
    for stage in planned.stages:
        lines += ["", f"{stage.stage} ({stage.job.kind})"]
        lines += [f"  {line}" for line in _settings(stage.identity, stage.job.spelled_inputs())]
        if "learning_rate" in stage.job.trainer:
            given = "learning_rate" in recipe.stages[stage.stage].model_dump().get("trainer", {})
            lines.append(f"  learning_rate: {stage.job.trainer['learning_rate']:g}{'' if given else ' (default)'}")
    lines += ["", plan_text(planned)]
    if planned.pins.unreachable:
        lines += ["", "no network, and no copy in the cache: a run needs these first, here only their names are known"]
        lines += [f"  {one}" for one in planned.pins.unreachable]
    return "\n".join(lines)


def _settings(identity: dict[str, Any], inputs: dict[str, str]) -> list[str]:
    """Spells what a stage reads and is set to, without digests."""
    lines = [f"{label}: {ref}" for label, ref in inputs.items()]
    return lines + [f"{key}: {show(value)}" for key, value in identity.items() if key not in {*_HIDDEN, *inputs}]
