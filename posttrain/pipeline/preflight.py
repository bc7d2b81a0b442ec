"""What can be known of a plan's inputs before anything of a run is written: local data, models, chat templates.

A broken preference row is found before an hour of SFT, not after it. Hub ids are left to the stages. Nothing
here imports torch; a tokenizer is loaded only where a stage chats with a local model.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from posttrain import __version__
from posttrain.artifact import Artifact, fingerprint, write_atomically
from posttrain.chat.templates import ChatTemplate, choose_template, load_template, read_folder_template
from posttrain.data.ledger import Ledger
from posttrain.data.read import SourceRows, read_source
from posttrain.errors import ChatError, CheckpointError, RecipeError, RecipeErrors, UserError
from posttrain.evaluation.questions import CheckRule, read_questions
from posttrain.models.files import (
    read_json,
    verify_adapter_files,
    verify_adapter_fits,
    verify_model_files,
    verify_tokenizer_files,
)
from posttrain.models.lineage import Lineage, lineage_of
from posttrain.pipeline.plan import Plan
from posttrain.recipe.load import LoadedRecipe
from posttrain.recipe.schema import Method, Source, Suite
from posttrain.stages.context import Job
from posttrain.stages.parents import resolve_method, template_is_settled
from posttrain.stages.samples import Samples
from posttrain.stages.sources import WANTED, source_spec


class Validated:
    """What was found whole before, by content and settings, so that the next plan does not read it again.

    Args:
        path: JSON file of the memory; written by `save` alone, once a run has really done something.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._tried: set[str] = set()
        self._new: set[str] = set()
        try:
            self._known = set(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            self._known = set()  # it may be lost: everything is read again

    @contextlib.contextmanager
    def once(self, *what: Any) -> Iterator[bool]:
        """Yields whether something is still to be checked; remembers it when the block raises nothing.

        What two stages share is checked, and refused, once.
        """
        key = fingerprint([__version__, *what])
        unknown = key not in self._known | self._tried
        self._tried.add(key)
        yield unknown
        if unknown:
            self._new.add(key)

    def save(self) -> None:
        """Writes what was found whole; silently gives up on a read-only place, as every cache."""
        if not self._new - self._known:
            return
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path, json.dumps(sorted(self._known | self._new)))


@dataclass
class Problems:
    """Problems found so far; one that two stages meet counts once."""

    found: dict[tuple[str, str], UserError] = field(default_factory=dict)

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """Notes the user's mistake that ends the block, and goes on after it."""
        try:
            yield
        except UserError as error:
            for one in error.problems if isinstance(error, RecipeErrors) else [error]:
                self.found.setdefault((one.where, one.found), one)

    def refuse(self) -> None:
        """Raises what was found: one error as it is, several together."""
        problems = list(self.found.values())
        if problems:
            raise problems[0] if len(problems) == 1 else RecipeErrors(problems)


def preflight(loaded: LoadedRecipe, planned: Plan, samples: Samples | None = None) -> Validated:
    """Reads the local inputs of every stage that a plan runs, writing nothing; returns what is worth remembering.

    Args:
        samples: keeps some rows of every training source that is read.

    Raises:
        UserError: what the stage itself would refuse, with its place; RecipeErrors when there are several.
    """
    validated, problems = Validated(planned.cache.path.with_name("validated.json")), Problems()
    finished = {stage.stage for stage in planned.stages if stage.action == "skip"}  # what is redone moves aside
    for stage in planned.stages:
        if stage.action not in ("run", "redo"):
            continue
        for label, given in stage.job.inputs.items():
            with problems.noted():
                if not given["ref"].startswith("@"):
                    _check_model(loaded, stage.job, label, validated)
                elif given["ref"][1:] in finished:
                    lineage_of(Path(given["folder"]), given["ref"])  # its own files were proved by its record
        if "data" in stage.job.config:
            _check_data(stage.job, validated, problems, samples)
        for number in range(len(stage.job.config.get("suites", ()))):
            with problems.noted():
                _check_suite(stage.job, number, validated)
    problems.refuse()
    return validated


def _check_model(loaded: LoadedRecipe, job: Job, label: str, validated: Validated) -> None:
    """Checks one model that a stage reads: whole files, a lineage that holds, a method and a template that fit."""
    given = job.inputs[label]
    if given["folder"] is None:
        return  # a hub id
    folder, where = Path(given["folder"]), loaded.where("stages", job.stage, *label.split(".", 1))
    if label == "tokenizer":
        verify_tokenizer_files(folder)
        return
    lineage = lineage_of(folder, given["ref"])
    verify_model_files(lineage.base.folder)
    for link in lineage.adapters:
        verify_adapter_files(link.folder)
        verify_adapter_fits(link.folder, lineage.base.folder)
    if job.kind == "merge" and label == "model" and not lineage.adapters and "scale" not in job.config:
        raise RecipeError(where, f"{given['ref']} is a whole model, there is nothing to merge", "leave it out")
    if job.kind in ("pretrain", "publish") and lineage.adapters:
        raise CheckpointError(where, f"{given['ref']} is an adapter", "merge it first")
    if job.kind in ("sft", "dpo"):
        _check_method(loaded, job, lineage)
    if job.kind in ("sft", "dpo", "evaluate"):
        _check_chat(loaded, job, label, lineage, validated)


def _check_method(loaded: LoadedRecipe, job: Job, lineage: Lineage) -> None:
    method = job.config.get("method")
    try:
        resolve_method(None if method is None else Method.model_validate(method), lineage, job.stage)
    except RecipeError as error:
        raise RecipeError(loaded.where("stages", job.stage, "method"), error.found, error.todo) from None


def _check_chat(loaded: LoadedRecipe, job: Job, label: str, lineage: Lineage, validated: Validated) -> None:
    """Checks that there is a template, and that the model's tokenizer (where there is one of ours) has its tokens."""
    folder = (lineage.adapters[-1] if lineage.adapters else lineage.base).folder
    where = loaded.where("stages", job.stage, "chat_template")
    template = _template(job, folder, where)
    if template is None or not (folder / "tokenizer.json").is_file():
        return
    identity = job.identity["models"][label.removeprefix("models.")] if "." in label else job.identity[label]
    with validated.once("chat", identity, template.digest) as unknown:
        if unknown:
            _check_tokens(folder, template, read_json(lineage.base.folder / "config.json"), where)


def _template(job: Job, folder: Path, where: str) -> ChatTemplate | None:
    """The template a stage uses with a model, as the stage chooses it; None where it needs none."""
    chosen, base_dir = job.config.get("chat_template"), Path(job.recipe_dir)
    if job.kind != "evaluate":
        return choose_template(folder, chosen, base_dir, where, template_is_settled(Artifact.read(folder)))
    if all(suite["kind"] == "bits_per_byte" for suite in job.config["suites"]):
        return None
    own = read_folder_template(folder)
    if own is None and chosen is None:
        raise ChatError(where, f"absent, and {folder.name} has no template of its own", "name one, e.g. chatml")
    return own or load_template(str(chosen), base_dir)


def _check_tokens(folder: Path, template: ChatTemplate, config: dict[str, Any], where: str) -> None:
    """Loads a tokenizer, and proves what needs no weights of the chat contract.

    The template's control tokens are tokens of it, with embedding rows; one of them ends every answer; a
    conversation does not begin with two BOS tokens.
    """
    from posttrain.chat.contract import check_beginning, control_tokens, end_of_turn
    from posttrain.chat.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(folder)
    try:
        end_of_turn(tokenizer, template)
        check_beginning(tokenizer, template)
    except ChatError as error:
        raise error.at(where) from None
    rows = config.get("vocab_size")
    outside = [f"{text} ({token})" for text, token in control_tokens(tokenizer, template) if rows and token >= rows]
    if outside:
        found = f"the template writes {', '.join(outside)}, but the model has {rows} embedding rows"
        raise ChatError(str(folder / "tokenizer.json"), found, "give the tokenizer that the model was trained with")


def _check_data(job: Job, validated: Validated, problems: Problems, samples: Samples | None) -> None:
    """Reads the local sources of a training stage; where all of them are local, judges what reading drops."""
    data, ledger, whole = job.config["data"], Ledger(), True
    seen = {"sources": job.identity["data"]["sources"], "max_dropped": data["max_dropped"]}
    with problems.noted(), validated.once("data", job.kind, seen) as unknown:
        errors = Problems()
        for source in data["sources"] if unknown else []:
            with errors.noted():
                rows = _read(source, job.kind, job)
                whole = whole and rows is not None
                if rows is not None:
                    ledger.read(str(source["path"]), rows.rows_in, rows.dropped)
                    if samples is not None:
                        samples.keep(job.kind, Source.model_validate(source), Path(job.recipe_dir), rows)
        errors.refuse()
        if unknown and whole:
            ledger.check_dropped(data["max_dropped"])


def _read(source: dict[str, Any], kind: str, job: Job, max_rows: int | None = None) -> SourceRows | None:
    """Reads a local source as a stage or suite of a kind does; None for a hub id."""
    spec = source_spec(Source.model_validate(source), Path(job.recipe_dir))
    return None if isinstance(spec.path, str) else read_source(spec, WANTED[kind], max_rows)


def _check_suite(job: Job, number: int, validated: Validated) -> None:
    """Reads the local rows of a suite, and the fields that its checks compare with."""
    suite = Suite.model_validate(job.config["suites"][number])
    with validated.once("suite", job.identity["suites"][number]) as unknown:
        rows: list[Any] = []
        for source in job.config["suites"][number]["data"] if unknown else []:
            left = None if suite.max_rows is None else suite.max_rows - len(rows)
            found = _read(source, suite.kind, job, left) if left != 0 else None
            if found is None and left is not None:
                break  # how many rows of the later sources count is not known here
            rows += found.rows if found else []
        if suite.kind == "generate":
            read_questions(rows, suite.prompt_field, [CheckRule(**check.model_dump()) for check in suite.checks])
