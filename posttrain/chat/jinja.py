"""Rendering a conversation's text in transformers' sandbox, with errors a user can read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from posttrain.chat.templates import ChatTemplate
from posttrain.errors import ChatError

Message = dict[str, Any]
Tools = list[dict[str, Any]] | None


def render_text(
    tokenizer: PreTrainedTokenizerFast,
    template: ChatTemplate,
    messages: Sequence[Message],
    tools: Tools = None,
    add_generation_prompt: bool = False,
) -> str:
    """Renders a conversation as transformers' `apply_chat_template(tokenize=False)` does.

    Raises:
        ChatError: the template refuses the conversation, or fails on it.
    """
    return _render(tokenizer, template, messages, tools, add_generation_prompt, marks=False)[0]


def render_marked(
    tokenizer: PreTrainedTokenizerFast,
    template: ChatTemplate,
    messages: Sequence[Message],
    tools: Tools = None,
    add_generation_prompt: bool = False,
) -> tuple[str, list[tuple[int, int]]]:
    """Renders a conversation in one go with the (start, end) characters of its generation marks.

    Raises:
        ChatError: the template refuses the conversation, or fails on it.
    """
    return _render(tokenizer, template, messages, tools, add_generation_prompt, marks=True)


def _render(
    tokenizer: PreTrainedTokenizerFast,
    template: ChatTemplate,
    messages: Sequence[Message],
    tools: Tools,
    add_generation_prompt: bool,
    marks: bool,
) -> tuple[str, list[tuple[int, int]]]:
    # keys with the value None are dropped, as transformers does: templates test for the key
    chat = [{key: value for key, value in message.items() if value is not None} for message in messages]
    try:
        texts, spans = render_jinja_template(
            conversations=[chat],
            tools=tools,
            chat_template=template.source,
            return_assistant_tokens_mask=marks,
            add_generation_prompt=add_generation_prompt,
            **tokenizer.special_tokens_map,
        )
    except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        raise ChatError(
            f"chat template {template.name}",
            f"cannot render this conversation: {error or type(error).__name__}",
            "change the row (roles, order, text contents), or choose a template that takes it",
        ) from None
    return texts[0], spans[0] if marks else []
