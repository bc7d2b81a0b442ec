"""The twins of a rehearsal: one per model of the recipe, with the real tokenizer where it can be had."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from posttrain.errors import UserError
from posttrain.models.hub import HubId, LocalPath, fetch_description
from posttrain.models.known_shapes import known_shape

SMALL = 64 << 20
"""Bytes of weights up to which a local model is rehearsed with as it is."""
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_BOS = "<|begin_of_text|>"
_CONTROL = re.compile(r"<\|\w+\|>")


@dataclass
class Twins:
    """Makes twins below a folder, each model's once."""

    recipe_dir: Path
    folder: Path
    seed: int
    notes: list[str] = field(default_factory=list)
    _made: dict[str, Path] = field(default_factory=dict)
    _templates: Sequence[str] = ()
    _texts: Sequence[str] = ()

    def prepare_tokenizer(self, templates: Sequence[str], rows: Iterable[dict[str, Any]]) -> None:
        """Says what a stand-in tokenizer must know: the templates' control tokens, and texts to train on."""
        self._templates, self._texts = templates, [row["text"] for row in rows]

    def of(self, reference: HubId | LocalPath, where: str) -> Path:
        """Returns the folder to rehearse with in place of a model.

        Args:
            where: key path of the reference, for errors.

        Raises:
            UserError: nothing there, an adapter, or a model of unknown shape.
        """
        key = str(reference)
        if key not in self._made:
            self._made[key] = (
                self._local(reference, where) if isinstance(reference, LocalPath) else self._hub(reference, where)
            )
        return self._made[key]

    def _local(self, reference: LocalPath, where: str) -> Path:
        folder = (self.recipe_dir / reference.path).resolve()
        if (folder / "adapter_config.json").is_file():
            raise UserError(where, f"{folder} is an adapter", "rehearse a recipe that trains it, or merge it first")
        if not (folder / "config.json").is_file():
            raise UserError(where, f"{folder} holds no model (no config.json)", "paths start from the recipe's folder")
        if sum(path.stat().st_size for path in folder.glob("*.safetensors")) <= SMALL:
            return folder
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return self._twin(str(reference.path), folder.name, config, folder, where)

    def _hub(self, reference: HubId, where: str) -> Path:
        shape, description = known_shape(reference.id), fetch_description(reference)
        if description is not None:
            config = json.loads((description / "config.json").read_text(encoding="utf-8"))
        elif shape is not None:
            config = shape.config
        else:
            todo = f"download its description once: hf download {reference.id} config.json tokenizer.json"
            raise UserError(where, f"the shape of {reference} is not known, and the hub cannot be asked", todo)
        return self._twin(str(reference), reference.id.replace("/", "--"), config, description, where)

    def _twin(self, model: str, name: str, config: dict[str, Any], source: Path | None, where: str) -> Path:
        from posttrain.models.twin import LAYERS, save_twin

        tokenizer, whose = self._tokenizer(source)
        folder = self.folder / name
        kind = config.get("model_type")
        try:
            parameters = save_twin(_text_part(config), tokenizer, folder, self.seed)
        except (KeyError, ValueError) as error:  # sizes under other names, or code of its own
            todo = f"rehearse with a model of another architecture: --set {where}=…"
            raise UserError(where, f"no twin of {model} ({kind}): {error}", todo) from None
        self.notes.append(
            f"model {model}: a random {kind} of {parameters:,} parameters in {LAYERS} layers; tokenizer: {whose}"
        )
        return folder

    def _tokenizer(self, source: Path | None) -> tuple[Any, str]:
        if source is not None and any((source / name).is_file() for name in _TOKENIZER_FILES):
            from posttrain.chat.tokenizer import load_any_tokenizer

            return load_any_tokenizer(source), "its own"
        return self._stand_in(), "a small one, trained on the made-up rows"

    def _stand_in(self) -> Any:
        """Trains a byte-level tokenizer with the control tokens of the recipe's templates; ChatML without one."""
        from posttrain.chat.templates import load_template
        from posttrain.pretraining.tokenizer import train_tokenizer

        templates = [load_template(name, self.recipe_dir) for name in self._templates or ["chatml"]]
        control: dict[str, None] = {_BOS: None}
        for template in templates:
            needed = template.facts.required_tokens or _CONTROL.findall(template.source)
            control |= dict.fromkeys(token for token in needed if not token.endswith("_token"))
        with tempfile.TemporaryDirectory() as scratch:
            tokenizer = train_tokenizer(self._texts, 512, list(control), 4096, Path(scratch))
        tokenizer.bos_token = _BOS
        if not self._templates:
            tokenizer.chat_template = templates[0].inference
        return tokenizer


def _text_part(config: dict[str, Any]) -> dict[str, Any]:
    """The language model's config of a multimodal one."""
    part = config.get("text_config")
    return part if isinstance(part, dict) and "model_type" in part else config
