"""Turns a recipe into its rehearsal: what is too large or not here is replaced, and each replacement said."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.chat.templates import names_file
from posttrain.data.read import locate
from posttrain.models.hub import LocalPath, StageRef, parse_reference
from posttrain.models.twin import tiny_config
from posttrain.recipe.environment import escape
from posttrain.recipe.yaml12 import dump
from posttrain.rehearse.made_up import ROWS, made_up_questions, made_up_rows
from posttrain.rehearse.twins import Twins

if TYPE_CHECKING:
    from posttrain.recipe.load import LoadedRecipe
    from posttrain.recipe.yaml12 import KeyPath

STEPS, BATCH = 3, 4
MAX_LENGTH, TEXT_LENGTH = 1024, 64
"""Tokens of a row at most; of a packed row of texts, so that a few texts make several."""
NEW_TOKENS, QUESTIONS = 8, 8
_DEFAULT_SHAPE = {"pretrain": "text", "bits_per_byte": "text", "sft": "messages", "dpo": "preference"} | {
    "preference": "preference"
}
_GPU_ONLY = ("paged", "8bit", "bnb", "fused", "apex")
"""In the name of an optimizer that does not run on a CPU."""


def rehearsal_of(loaded: LoadedRecipe, out_dir: Path) -> tuple[str, list[str]]:
    """Writes twins and made-up rows below `out_dir`, and returns the rehearsal as YAML and what was substituted.

    Raises:
        UserError: a model is neither here nor of a known shape, or an adapter would need its own base.
    """
    work = _Substitution(loaded.folder, out_dir, Twins(loaded.folder, out_dir / "twins", loaded.recipe.seed))
    recipe = escape(loaded.recipe.model_dump(mode="json", by_alias=True, exclude_unset=True))
    given = copy.deepcopy(recipe)
    templates = {stage.get("chat_template") for stage in recipe["stages"].values()} - {None}
    work.twins.prepare_tokenizer(sorted(templates), made_up_rows("text", {}))
    recipe |= {"precision": "fp32", "runtime": {"device": "cpu"}}
    for name, stage in recipe["stages"].items():
        work.stage(name, stage)
    _hide(recipe, given, loaded.secrets)
    header = "# A rehearsal: made from another recipe, with stand-ins for what is large. Not for training.\n"
    return header + dump(recipe), work.told()


@dataclass
class _Substitution:
    """The work on one recipe; stages are changed in place."""

    recipe_dir: Path
    out_dir: Path
    twins: Twins
    notes: list[str] = field(default_factory=list)
    made: int = 0
    """Made-up rows so far: no two sources share a question."""

    def told(self) -> list[str]:
        """Everything that was substituted, one line each, settings last."""
        settings = (
            f"settings: CPU, fp32, one process, {STEPS} optimizer steps of {BATCH} rows, at most {MAX_LENGTH} tokens"
            f" a row, {QUESTIONS} rows a suite, {NEW_TOKENS} new tokens an answer; limits on dropped rows are off"
        )
        return [*self.twins.notes, *self.notes, settings]

    def stage(self, name: str, stage: dict[str, Any]) -> None:
        """Changes one stage."""
        kind = stage["kind"]
        stage.pop("runtime", None)
        for key in ("model", "tokenizer", "base_model"):
            if isinstance(stage.get(key), str):
                stage[key] = self._model(stage[key], f"stages.{name}.{key}", weights=key != "tokenizer")
        if stage.get("chat_template") and names_file(stage["chat_template"]):
            stage["chat_template"] = str((self.recipe_dir / stage["chat_template"]).resolve())
        if "trainer" in stage or "data" in stage:
            self._training(name, kind, stage)
        if kind == "merge" and "models" in stage:
            stage["models"] = {
                label: self._model(ref, f"stages.{name}.models.{label}") for label, ref in stage["models"].items()
            }
        if kind == "evaluate":
            self._evaluation(name, stage)
        if kind == "publish":
            self._publication(name, stage)

    def _training(self, name: str, kind: str, stage: dict[str, Any]) -> None:
        data = stage["data"]
        longest = TEXT_LENGTH if kind == "pretrain" else MAX_LENGTH
        data |= {"max_length": min(data.get("max_length", longest), longest), "max_dropped": 1.0}
        data.pop("held_out", None)
        data["sources"] = [
            self._source(source, _DEFAULT_SHAPE[kind], f"{name}-{number}")
            for number, source in enumerate(data["sources"])
        ]
        trainer = stage.setdefault("trainer", {})
        if any(word in str(trainer.get("optim", "")) for word in _GPU_ONLY):
            self.notes.append(f"optimizer of {name}: {trainer['optim']} -> adamw_torch (it needs a GPU)")
            trainer["optim"] = "adamw_torch"
        for key in ("num_train_epochs", "torch_compile", "tf32"):
            trainer.pop(key, None)
        trainer |= {"max_steps": STEPS, "global_batch_size": BATCH, "save_steps": STEPS - 1, "logging_steps": 1}
        if "init" in stage:
            stage["init"] = _tiny_init(stage["init"])
            self.notes.append(f"size block of {name}: two layers of {stage['init']['hidden_size']}")

    def _evaluation(self, name: str, stage: dict[str, Any]) -> None:
        stage["models"] = {
            label: self._model(ref, f"stages.{name}.models.{label}") for label, ref in stage["models"].items()
        }
        for suite in stage["suites"]:
            label = f"{name}-{suite['name']}"
            suite["data"] = [
                self._source(source, _DEFAULT_SHAPE.get(suite["kind"], "raw"), f"{label}-{number}", suite)
                for number, source in enumerate(suite["data"])
            ]
            suite |= {
                "max_rows": min(suite.get("max_rows", QUESTIONS), QUESTIONS),
                "max_length": min(suite.get("max_length", MAX_LENGTH), MAX_LENGTH),
                "max_new_tokens": min(suite.get("max_new_tokens", NEW_TOKENS), NEW_TOKENS),
            }
        if stage.pop("require", None):
            self.notes.append(f"gates of {name}: none, since random models hold none")

    def _publication(self, name: str, stage: dict[str, Any]) -> None:
        if stage.pop("hub", None):
            self.notes.append(f"upload of {name}: none, to a folder only")
        stage["to"] = str(self.out_dir / "published")

    def _model(self, text: str, where: str, weights: bool = True) -> str:
        reference = parse_reference(text)
        if isinstance(reference, StageRef):
            return text
        if isinstance(reference, LocalPath) and not weights:
            return self._spelled((self.recipe_dir / reference.path).resolve())  # small as it is
        return self._spelled(self.twins.of(reference, where))

    def _source(
        self, source: dict[str, Any], shape: str, label: str, suite: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Replaces a hub source by made-up rows, and limits a local one to a few rows."""
        changed = {key: value for key, value in source.items() if key not in ("weight", "rows")}
        found = locate(source["path"], self.recipe_dir)
        if isinstance(found, Path):
            return changed | {"path": str(found)} if suite else changed | {"path": str(found), "rows": ROWS}
        named = source.get("shape", "auto")
        if suite and suite["kind"] == "generate":
            shape = "questions"
            rows = made_up_questions(suite.get("prompt_field", "prompt"), suite.get("checks", []), self.made)
        else:
            shape = shape if named == "auto" else named
            rows = made_up_rows(shape, source.get("columns", {}), source.get("text_format"), self.made)
        self.made += ROWS
        self.notes.append(f"data of {label}: {source['path']} -> {ROWS} made-up rows ({shape})")
        for key in ("name", "split", "revision"):
            changed.pop(key, None)
        if "select" in changed:
            changed["select"] = {**changed["select"], "rows": min(changed["select"]["rows"], ROWS // 2)}
        return changed | {"path": self._spelled(_write_rows(rows, self.out_dir / "data" / f"{label}.jsonl"))}

    def _spelled(self, path: Path) -> str:
        """A path as the rehearsal's recipe spells it: relative where it lies beside that, so that it can move."""
        return f"./{path.relative_to(self.out_dir)}" if path.is_relative_to(self.out_dir) else str(path)


def _hide(recipe: dict[str, Any], given: dict[str, Any], secrets: dict[KeyPath, tuple[str, str]]) -> None:
    """Puts `${NAME}` back where a secret of the environment stands unchanged."""
    for path, (text, _) in secrets.items():
        node: Any = recipe
        before: Any = given
        try:
            for part in path[:-1]:
                node, before = node[part], before[part]
            unchanged = node[path[-1]] == before[path[-1]]
        except (KeyError, IndexError):
            continue  # it was left out of the rehearsal
        if unchanged:
            node[path[-1]] = text


def _tiny_init(init: dict[str, Any]) -> dict[str, Any]:
    tiny = tiny_config({"num_key_value_heads": init["num_attention_heads"], **init}, vocab_size=0)
    return {key: tiny[key] for key in {**init, "num_key_value_heads": None} if key in tiny}


def _write_rows(rows: list[dict[str, Any]], path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows), encoding="utf-8")
    return path
