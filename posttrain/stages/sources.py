"""From the recipe's sources to what the data room reads."""

from __future__ import annotations

from pathlib import Path

from posttrain.data.read import SourceSpec, locate
from posttrain.data.select import SelectSpec
from posttrain.data.shapes import Want
from posttrain.recipe.schema import Source

ROWS = Path(".cache") / "rows"
"""Of a run folder: the stores of its tokenised sources."""
WANTED: dict[str, Want] = {
    "pretrain": "text",
    "sft": "chat",
    "dpo": "pair",
    "bits_per_byte": "text",
    "preference": "pair",
    "generate": "raw",
}
"""Kind of a stage or suite -> the rows that it reads."""


def source_spec(source: Source, recipe_dir: Path) -> SourceSpec:
    """Turns one source of a recipe into plain values, its path resolved against the recipe's folder."""
    select = source.select
    return SourceSpec(
        path=locate(source.path, recipe_dir),
        name=source.name,
        split=source.split,
        revision=source.revision,
        shape=source.shape,
        columns=dict(source.columns),
        text_format=source.text_format,
        select=SelectSpec(rows=select.rows, side=select.side, by=select.by, seed=select.seed) if select else None,
    )
