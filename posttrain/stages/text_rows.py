"""How texts become rows of `pretrain`. No torch: `posttrain check` samples by it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from posttrain.chat.tokenizer import tokenizer_digest
from posttrain.errors import ChatError
from posttrain.pretraining.rows import Row
from posttrain.pretraining.store import stored_row
from posttrain.recipe.schema import Data
from posttrain.stages.conversion import Conversion, Refused, Tokenised


def conversion(tokenizer: Any, data: Data) -> Conversion[Row]:
    """How a stage makes tokens of texts; where rows are wrapped, a document may have any length.

    Raises:
        ChatError: the tokenizer has no token that ends a document.
    """
    if tokenizer.eos_token_id is None:
        found = "has no eos_token, so nothing would end a document"
        raise ChatError(tokenizer.name_or_path, found, "name one of its tokens in tokenizer_config.json")
    limit = None if data.packing in (None, "wrap") else data.max_length
    cut = data.long_rows == "truncate"
    decides = {"tokenizer": tokenizer_digest(tokenizer), "limit": limit, "cut": None if limit is None else cut}
    return Conversion("text", lambda rows: tokenise(rows, tokenizer, limit, cut), stored_row, decides, False)


def tokenise(rows: list[Any], tokenizer: Any, limit: int | None, cut: bool) -> Iterator[Tokenised | Refused]:
    """Tokens of each document and its end of sequence; control tokens that a text spells stay text."""
    backend, before = tokenizer.backend_tokenizer, tokenizer.backend_tokenizer.encode_special_tokens
    backend.encode_special_tokens = True
    try:
        encoded = backend.encode_batch_fast([row.text for row in rows])
    finally:
        backend.encode_special_tokens = before
    end = tokenizer.eos_token_id
    for ids in (one.ids for one in encoded):
        if not ids or ids[-1] != end:
            ids.append(end)
        length = len(ids)
        if limit is not None and length > limit and not cut:
            yield Refused("longer than max_length", length)
            continue
        ids = ids[:limit]
        supervised = len(ids) - 1  # the first token of a row is never predicted
        yield Tokenised(ids, (1, len(ids)) if supervised else (), supervised, length - len(ids))
