"""Tokenised rows of a run, kept by what decides their tokens: what was made once is read again."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

from posttrain import __version__
from posttrain.artifact import fingerprint, sha256
from posttrain.data.files import source_files
from posttrain.data.hub import resolve_revision
from posttrain.data.read import open_source
from posttrain.pretraining.store import FORMAT, Store, open_store
from posttrain.recipe.schema import Source
from posttrain.stages.context import Context
from posttrain.stages.conversion import Conversion, store_rows
from posttrain.stages.sources import ROWS, source_spec
from posttrain.stages.workers import cpu_count

_LIBRARIES = ("transformers", "tokenizers", "jinja2")
_SHARES = ("weight", "rows", "path", "revision")
"""Settings of a source that decide how often its rows are seen, or where they lie, and not what they are."""


def tokenised_source(
    number: int, source: Source, name: str, context: Context, conversion: Conversion[Any]
) -> tuple[Store, list[str]]:
    """Returns the tokenised rows of a stage's source, read from the run's cache or made now, and its files.

    Args:
        number: place of the source among the stage's.
        name: of the source, for people.

    Raises:
        PosttrainError: of the first row, in order, that is broken.
    """
    spec = source_spec(source, context.recipe_dir)
    folder = store_folder(number, source, context, conversion)
    store = open_store(folder)
    if store is None:
        context.events("phase", text=f"reading {name}")
        opened = open_source(spec, conversion.want)
        processes = context.runtime.dataset_num_proc or cpu_count()
        store = store_rows(opened, conversion, folder, processes, context.events, name)
        return store, opened.files
    if isinstance(spec.path, str):
        return store, [f"{spec.path}@{spec.revision}" if spec.revision else spec.path]
    return store, [str(file) for file in source_files(spec.path)]


def store_folder(number: int, source: Source, context: Context, conversion: Conversion[Any]) -> Path:
    """Where the tokenised rows of a stage's source lie, or will."""
    return context.run_dir / ROWS / rows_key(_identity(number, source, context), conversion)


def rows_key(source: dict[str, Any], conversion: Conversion[Any]) -> str:
    """Key of a store: its format, the code and libraries that make it, the data by content, and what decides tokens."""
    return fingerprint(
        {
            "format": FORMAT,
            "versions": {"posttrain": __version__, **{name: version(name) for name in _LIBRARIES}},
            "source": source,
            "want": conversion.want,
            "decides": conversion.decides,
        }
    )


def _identity(number: int, source: Source, context: Context) -> dict[str, Any]:
    """What a source's rows are, by content: as the pipeline found it, else found now."""
    known = context.identity.get("data")
    if known is not None:
        return {key: value for key, value in known["sources"][number].items() if key not in _SHARES}
    settings = source.model_dump(mode="json", exclude_none=True, exclude=set(_SHARES))
    spec = source_spec(source, context.recipe_dir)
    if isinstance(spec.path, str):
        return {**settings, "hub": spec.path, "commit": resolve_revision(spec.path, spec.revision)}
    return {**settings, "content": [["".join(file.suffixes), sha256(file)] for file in source_files(spec.path)]}
