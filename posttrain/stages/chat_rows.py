"""How conversations become rows of `sft`. No torch: `posttrain check` samples by it."""

from __future__ import annotations

from collections.abc import Iterator

from posttrain.chat.render import Rendered, render_conversations
from posttrain.chat.system import fold_system
from posttrain.data.rows import ChatRow, Message
from posttrain.errors import ChatError
from posttrain.pretraining.rows import Row
from posttrain.pretraining.store import stored_row
from posttrain.recipe.schema import Data
from posttrain.stages.conversation import Chat
from posttrain.stages.conversion import Conversion, Refused, Tokenised


def conversion(chat: Chat, data: Data) -> Conversion[Row]:
    """How a stage makes tokens of conversations."""
    decides = {
        **chat.decides(),
        **data.model_dump(include={"max_length", "long_rows", "history", "system"}, exclude_none=True),
    }
    return Conversion("chat", lambda rows: tokenise(rows, chat, data), stored_row, decides)


def tokenise(rows: list[ChatRow], chat: Chat, data: Data) -> Iterator[Tokenised | Refused]:
    """Renders conversations; what is longer than `max_length` is cut at its end, or refused.

    With `history: split`, a conversation whose template rewrites history gives one result per answer.

    Raises:
        ChatError: naming file and row of a conversation that the template cannot take.
    """
    fold, split = data.system == "fold", data.history == "split"
    conversations = ((_messages(row, fold), row.tools) for row in rows)
    rendered = render_conversations(chat.tokenizer, chat.template, conversations, split)
    for row, made in zip(rows, rendered, strict=True):
        if isinstance(made, ChatError):
            raise ChatError(str(row.origin), f"{made.where}: {made.found}", made.todo)
        for number, one in enumerate(made, start=1):
            yield _fit(one, data, (number, len(made)))


def _messages(row: ChatRow, fold: bool) -> list[Message]:
    if not fold:
        return row.messages
    try:
        return fold_system(row.messages)
    except ChatError as error:
        raise error.at(str(row.origin)) from None


def _fit(rendered: Rendered, data: Data, part: tuple[int, int]) -> Tokenised | Refused:
    length, limit = len(rendered.input_ids), data.max_length
    if length > limit and data.long_rows == "drop":
        return Refused("longer than max_length", length, part)
    cuts: list[int] = []
    for start, stop in rendered.runs:
        start, stop = max(start, 1), min(stop, limit)  # the first token of a row is never predicted
        if start < stop:
            cuts += (start, stop)
    if not cuts:
        return Refused("no trained token within max_length", length, part)
    supervised = sum(cuts[1::2]) - sum(cuts[::2])
    return Tokenised(rendered.input_ids[:limit], cuts, supervised, max(length - limit, 0), part)
