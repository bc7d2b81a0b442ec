"""A small recipe over fake stages, for the tests of pipeline, launcher and command line."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from posttrain.artifact import Artifact
from posttrain.console import Lines
from posttrain.pipeline.run import Request, run_recipe
from posttrain.recipe.load import LoadedRecipe, load_recipe

FAKES = Path(__file__).parent / "fakes"

RECIPE = """
name: demo
runtime: {device: cpu, threads: 1}
precision: fp32
stages:
  sft:
    kind: sft
    model: ./base
    chat_template: ./chat.jinja
    data: {sources: [{path: ./chat.jsonl}], max_length: 64}
    method: {lora: {r: 4}}
  instruct: {kind: merge, model: "@sft"}
  dpo:
    kind: dpo
    model: "@sft"
    data: {sources: [{path: ./pairs.jsonl}], max_length: 64}
    trainer: {beta: 0.1}
  aligned: {kind: merge, model: "@dpo"}
"""


class Project:
    """A folder with a recipe and its inputs, and ways to run it in this process or as a user would."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.runs = folder, folder / "runs"
        self.run_dir = self.runs / "demo"
        (folder / "base").mkdir(parents=True)
        (folder / "base/config.json").write_text('{"model_type": "llama"}')
        header = b'{"w": {"dtype": "U8", "shape": [7], "data_offsets": [0, 7]}}'
        (folder / "base/model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"weights")
        (folder / "base/tokenizer.model").write_text("not read: fakes do not chat")
        (folder / "chat.jinja").write_text("{{ messages }}")
        (folder / "chat.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
        (folder / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
        self.recipe = folder / "recipe.yaml"
        self.recipe.write_text(RECIPE)

    def load(self, *overrides: str) -> LoadedRecipe:
        """Loads the recipe."""
        return load_recipe(self.recipe, list(overrides), os.environ)

    def go(self, *overrides: str, **request: Any) -> str:
        """Runs the recipe in this process and returns what the console said."""
        stream = io.StringIO()
        console = Lines(stream)
        try:
            run_recipe(self.load(*overrides), self.runs, Request(**request), console)
        finally:
            console.close()
        return stream.getvalue()

    def command(self, *words: str) -> list[str]:
        """The command line of `posttrain run` on this project."""
        return [sys.executable, "-m", "posttrain", "run", str(self.recipe), "--runs-dir", str(self.runs), *words]

    def shell(self, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
        """Runs the recipe as a user would."""
        environment = {**os.environ, **env}
        return subprocess.run(self.command(*words), capture_output=True, text=True, env=environment, timeout=60)

    def start(self, *words: str, **env: str) -> subprocess.Popen[str]:
        """Starts a run in a group of its own and returns at once."""
        return subprocess.Popen(
            self.command(*words),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **env},
            start_new_session=True,
        )

    def value(self, stage: str) -> str:
        """What a fake stage computed."""
        return (self.run_dir / stage / "model.safetensors").read_text()[:64]

    def fingerprints(self) -> dict[str, str]:
        """Fingerprint of every finished stage."""
        found = [Artifact.read(path) for path in sorted(self.run_dir.iterdir()) if path.is_dir()]
        return {one.record.stage: one.record.fingerprint for one in found if one}

    def stages_run(self) -> dict[str, int]:
        """How often each finished stage's process was started, by its log."""
        return {path.parent.name: path.read_text().count("\nfake ") for path in self.run_dir.glob("*/log.txt")}

    def tree(self) -> list[str]:
        """Every path below the project."""
        return sorted(str(path.relative_to(self.folder)) for path in self.folder.rglob("*"))
