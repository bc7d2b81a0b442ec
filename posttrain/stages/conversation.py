"""The chat side of a stage: which tokenizer and template it works with, and what is saved of them."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from posttrain.chat.contract import (
    EndOfTurn,
    agree,
    check_beginning,
    control_tokens,
    end_of_turn,
    missing_tokens_remedy,
    required_tokens_missing,
)
from posttrain.chat.templates import ChatTemplate, choose_template
from posttrain.chat.tokenizer import load_any_tokenizer, tokenizer_digest
from posttrain.errors import ChatError
from posttrain.models.lineage import Lineage
from posttrain.stages.context import Context
from posttrain.stages.parents import template_is_settled


@dataclass(frozen=True)
class Chat:
    """Tokenizer and template that belong together."""

    tokenizer: Any
    template: ChatTemplate
    end: EndOfTurn

    @property
    def control_ids(self) -> list[int]:
        """Ids of the control tokens that the template writes."""
        return sorted({token for _, token in control_tokens(self.tokenizer, self.template)})

    def decides(self) -> dict[str, str]:
        """What decides the tokens of a conversation: the tokenizer, and the template with its marks."""
        dated = "strftime_now" in self.template.source
        return {
            "tokenizer": tokenizer_digest(self.tokenizer),
            "template": self.template.source,
            "marks": self.template.facts.marks,
            "date": date.today().isoformat() if dated else "",
        }

    def as_dict(self) -> dict[str, str]:
        """What a stage's record says of it: template and digest, end of turn, and how answers are found."""
        return {
            "template": self.template.name,
            "digest": self.template.digest,
            "end_of_turn": self.end.text,
            "masks": "marks" if self.template.facts.marks == "exact" else "offsets",
        }


def open_chat(parents: Lineage, chosen: str | None, context: Context) -> Chat:
    """Opens the tokenizer of the newest link of a lineage, and the stage's template.

    Args:
        chosen: bundled name or file from the recipe; None = the model's own.

    Raises:
        ChatError: no template anywhere, tokens that the tokenizer lacks, another template than the one an
            earlier stage of ours has trained, or one that begins conversations with two BOS tokens.
    """
    folder = (parents.adapters[-1] if parents.adapters else parents.base).folder
    tokenizer = load_any_tokenizer(folder)
    where = f"stages.{context.stage}.chat_template"
    settled = template_is_settled(context.inputs["model"].artifact)
    template = choose_template(folder, chosen, context.recipe_dir, where, settled)
    if missing := required_tokens_missing(tokenizer, template):
        lacks = ", ".join(map(repr, missing))
        raise ChatError(
            where, f"{template.name} needs {lacks}, which the tokenizer lacks", missing_tokens_remedy(template)
        )
    end = end_of_turn(tokenizer, template)
    check_beginning(tokenizer, template)
    return Chat(tokenizer, _marked(tokenizer, template, context), end)


def _marked(tokenizer: Any, template: ChatTemplate, context: Context) -> ChatTemplate:
    """The template with marks where they can be proved; what is saved of it, and its digest, stay the same."""
    if template.facts.marks != "unproved":
        return template
    from posttrain.chat.marking import mark  # only templates that are not ours need it

    marking = mark(tokenizer, template)
    if marking.template is not None and marking.template.digest == template.digest:
        return marking.template
    reason = marking.reason or "marks would change the text that is saved"
    context.events("note", text=f"{template.name}: answers are found by rendering, not by marks: {reason}")
    return template


def settle(chat: Chat, model: Any, context: Context) -> None:
    """Makes tokenizer, config and generation config agree with the template, and says what changed."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    for line in agree(chat.tokenizer, chat.template, base.config, base.generation_config):
        context.events("note", text=line)
        print(line, flush=True)


def save_chat(chat: Chat, model: Any, folder: Path) -> None:
    """Saves tokenizer, template (without marks) and generation config beside an adapter or model."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    chat.tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(chat.template.inference, encoding="utf-8")
    base.generation_config.save_pretrained(folder)
