"""The copy of a checkpoint that is being mended: its files as they are changed, and what was said of each change."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from posttrain.artifact import write_atomically
from posttrain.chat.tokenizer import load_any_tokenizer
from posttrain.doctor.checkpoint import Checkpoint
from posttrain.models.files import read_json

CONFIG, GENERATION = "config.json", "generation_config.json"
TOKENIZER, TOKENIZER_CONFIG, SPECIAL_MAP = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
JINJA = "chat_template.jinja"


@dataclass
class Patient:
    """A model folder that may be changed. Every file is replaced as a whole, so links to the source never matter."""

    folder: Path
    was_base: bool
    """Whether the folder came without a chat template: what pretraining did decides, no habit of a chat model."""
    untrained: frozenset[int] = frozenset()
    """Ids that the stage that left the model never saw in training."""
    changes: list[str] = field(default_factory=list)

    def checkpoint(self) -> Checkpoint:
        """The folder as it is now, nothing of it remembered."""
        return Checkpoint(self.folder)

    def say(self, change: str) -> None:
        """Notes a change, in one line."""
        self.changes.append(change)

    def read(self, name: str) -> dict[str, Any]:
        """A JSON file of the folder, {} where there is none."""
        path = self.folder / name
        return read_json(path) if path.is_file() else {}

    def write(self, name: str, value: dict[str, Any]) -> None:
        """Writes a JSON file unless it says so already."""
        if value != self.read(name):
            write_atomically(self.folder / name, json.dumps(value, indent=2, ensure_ascii=False) + "\n")

    def set(self, name: str, key: str, value: Any) -> None:
        """Sets one field of a JSON file and notes it, unless it has this value already (absent = null)."""
        settings = self.read(name)
        if settings.get(key) != value:
            self.say(f"{name}, {key}: {shown(settings.get(key))} -> {shown(value)}")
            self.write(name, settings | {key: value})

    def set_config(self, key: str, value: Any) -> None:
        """Sets a field of config.json where it stands: at the top, in `text_config`, or in both."""
        config = self.read(CONFIG)
        inner = config.get("text_config")
        if isinstance(inner, dict) and key in inner:
            if inner[key] != value:
                self.say(f"{CONFIG}, text_config.{key}: {shown(inner[key])} -> {shown(value)}")
                self.write(CONFIG, config | {"text_config": inner | {key: value}})
            if key not in config:
                return
        self.set(CONFIG, key, value)

    def set_token(self, name: str, text: str) -> None:
        """Names a special token (`eos_token`, `pad_token`, ...) in every tokenizer file that names it."""
        for file in (TOKENIZER_CONFIG, SPECIAL_MAP):
            settings = self.read(file)
            said = settings.get(name)
            plain = said.get("content") if isinstance(said, dict) else said
            if plain != text and (file == TOKENIZER_CONFIG or name in settings):
                self.set(file, name, text)

    def remove(self, name: str, reason: str) -> None:
        """Removes a file of the folder and says why."""
        (self.folder / name).unlink()
        self.say(f"{name}: removed, {reason}")

    def tokenizer_spec(self) -> dict[str, Any]:
        """The parsed `tokenizer.json`; where there is none, one made from the files that are there.

        Raises:
            ChatError: the tokenizer does not load.
        """
        if not (self.folder / TOKENIZER).is_file():
            load_any_tokenizer(self.folder).backend_tokenizer.save(str(self.folder / TOKENIZER))
            self.say(f"{TOKENIZER}: made from the tokenizer's other files")
        return self.read(TOKENIZER)


def shown(value: Any) -> str:
    """A value as JSON spells it, `absent` for None."""
    return "absent" if value is None else json.dumps(value, ensure_ascii=False)
