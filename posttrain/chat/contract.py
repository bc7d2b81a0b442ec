"""The chat contract: tokenizer, template, config and generation config agree, and the saved folder proves it."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import PreTrainedTokenizerFast

from posttrain.chat.encode import encoder_of
from posttrain.chat.files import read_json
from posttrain.chat.jinja import Message, render_text
from posttrain.chat.render import render_conversation, render_prompt
from posttrain.chat.templates import ChatTemplate, read_folder_template, template_digest
from posttrain.chat.tokenizer import load_tokenizer
from posttrain.chat.turns import EndOfTurn, end_of_turn, missing_tokens_remedy, required_tokens_missing
from posttrain.errors import ChatError

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig

__all__ = [
    "EndOfTurn",
    "agree",
    "check_beginning",
    "choose_pad",
    "control_tokens",
    "end_of_turn",
    "missing_tokens_remedy",
    "probe_ids",
    "required_tokens_missing",
    "set_eos",
    "stop_ids",
    "verify_saved",
]

_SYSTEM: Message = {"role": "system", "content": "Answer in the language of the question."}
_PROBE: list[Message] = [
    {"role": "user", "content": "¿Qué es l·l? Zer da hau?\n\n  1 €"},
    {"role": "assistant", "content": "Una letra: ela geminada. 😀"},
    {"role": "user", "content": "Grazas"},
    {"role": "assistant", "content": "De nada."},
]
_SPARE = (
    re.compile(r"pad", re.IGNORECASE),
    re.compile(r"reserved|unused|placeholder|extra_id|extra_token|control_\d|dummy", re.IGNORECASE),
)


def agree(
    tokenizer: PreTrainedTokenizerFast,
    template: ChatTemplate,
    config: PretrainedConfig,
    generation_config: GenerationConfig,
) -> list[str]:
    """Makes tokenizer, config and generation config follow the template, and says what was changed.

    The end of turn becomes `eos_token` and the first of `generation_config.eos_token_id`, before what was
    there; a pad token is chosen among those that exist. No token is added, no matrix resized.

    Raises:
        ChatError: the template needs tokens the tokenizer lacks, or that have no row in the embedding matrix.
    """
    end, rows, said = end_of_turn(tokenizer, template), config.get_text_config().vocab_size, []
    _check_rows(control_tokens(tokenizer, template), rows)
    _check_marks(tokenizer, template)
    previous = [*_listed(generation_config.eos_token_id), *_listed(config.eos_token_id)]
    previous += _listed(tokenizer.eos_token_id)
    if tokenizer.chat_template != template.inference:
        tokenizer.chat_template = template.inference
        said.append(f"chat template: {template.name} ({template.digest[:12]})")
    said += set_eos(tokenizer, template, end)
    stops = stop_ids(tokenizer, template, previous, rows)
    said += _changed("generation_config.eos_token_id", generation_config.eos_token_id, stops)
    generation_config.eos_token_id = stops
    said += _changed("config.eos_token_id", config.eos_token_id, end.id)
    config.eos_token_id = end.id
    pad = choose_pad(tokenizer, template, rows, stops)
    said += _changed("tokenizer.pad_token", tokenizer.pad_token, tokenizer.convert_ids_to_tokens(pad))
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
    config.pad_token_id = generation_config.pad_token_id = pad
    if tokenizer.bos_token_id is not None:
        said += _changed("config.bos_token_id", config.bos_token_id, tokenizer.bos_token_id)
        config.bos_token_id = generation_config.bos_token_id = tokenizer.bos_token_id
    return said + _bos_note(tokenizer, template)


def control_tokens(tokenizer: PreTrainedTokenizerFast, template: ChatTemplate) -> list[tuple[str, int]]:
    """Lists the control tokens that the template itself writes, as (text, id), in order of appearance."""
    encoder = encoder_of(tokenizer)
    ids = encoder.encode(_probe_text(tokenizer, template))[0]
    return [(encoder.added[token], token) for token in dict.fromkeys(ids) if token in encoder.added]


def check_beginning(tokenizer: PreTrainedTokenizerFast, template: ChatTemplate) -> None:
    """Raises ChatError where conversations begin with two BOS tokens; contents cannot bring one in."""
    for messages in ([_SYSTEM, *_PROBE[:1]], _PROBE[:1]):
        try:
            ids = render_prompt(tokenizer, template, messages)
        except ChatError:  # some families refuse a system message
            continue
        if tokenizer.bos_token_id is not None and ids[:2] == [tokenizer.bos_token_id] * 2:
            raise ChatError(
                f"chat template {template.name}",
                f"begins a conversation with {tokenizer.bos_token!r} twice",
                "write it once in the template; `posttrain doctor` tells where it comes from",
            )


def probe_ids(tokenizer: PreTrainedTokenizerFast, template: ChatTemplate) -> list[int]:
    """Ids of a fixed two-turn conversation: what `verify_saved` compares before and after saving."""
    try:
        return render_conversation(tokenizer, template, _PROBE).input_ids
    except ChatError:  # a template that rewrites history trains single answers only
        return render_conversation(tokenizer, template, _PROBE[:2]).input_ids


def verify_saved(folder: Path, digest: str, trained_last_ids: Collection[int] | None, probe: list[int]) -> None:
    """Proves from a saved folder's JSON files alone that the model in it stops and reads what it was trained on.

    Args:
        folder: holds tokenizer.json, tokenizer_config.json, chat_template.jinja and generation_config.json.
        digest: `ChatTemplate.digest` of the template trained with.
        trained_last_ids: last ids of the trained spans, over all rows; None where nothing was trained here.
        probe: `probe_ids` of the tokenizer and template in memory.

    Raises:
        ChatError: the first thing that does not hold.
    """
    path = folder / "chat_template.jinja"
    template = read_folder_template(folder)
    if template is None or not path.is_file():
        raise ChatError(str(path), "is missing", "save the tokenizer with its chat template")
    if (found := template_digest(path.read_bytes().decode())) != digest:
        raise ChatError(str(path), f"digest {found[:12]}, trained with {digest[:12]}", "save the template trained with")
    tokenizer = load_tokenizer(folder)
    if probe_ids(tokenizer, template) != probe:
        raise ChatError(str(folder), "the saved tokenizer gives other ids than the one trained with", "save it again")
    end = end_of_turn(tokenizer, template)
    path = folder / "generation_config.json"
    stops = read_json(path).get("eos_token_id")
    if not isinstance(stops, list) or end.id not in stops:
        raise ChatError(str(path), f"eos_token_id {stops} lacks the end of turn {end.id} ({end.text})", "add it")
    if trained_last_ids is not None and end.id not in trained_last_ids:
        raise ChatError(
            str(folder),
            f"the end of turn {end.id} ({end.text}) was never trained: no row ended with it",
            "raise max_length: every answer was cut before its end",
        )


def _probe_text(tokenizer: PreTrainedTokenizerFast, template: ChatTemplate) -> str:
    try:
        return render_text(tokenizer, template, [_SYSTEM, *_PROBE[:3]], add_generation_prompt=True)
    except ChatError:  # some families refuse a system message
        return render_text(tokenizer, template, _PROBE[:3], add_generation_prompt=True)


def _check_rows(tokens: list[tuple[str, int]], rows: int) -> None:
    outside = [f"{text} ({token})" for text, token in tokens if token >= rows]
    if outside:
        raise ChatError(
            "config.json",
            f"{rows} embedding rows, but the template writes {', '.join(outside)}",
            "choose a template whose tokens have rows, for instance one that ends turns with eos_token",
        )


def _check_marks(tokenizer: PreTrainedTokenizerFast, template: ChatTemplate) -> None:
    saved = ChatTemplate(template.name, template.inference)
    if render_text(tokenizer, saved, _PROBE) != render_text(tokenizer, template, _PROBE):
        raise ChatError(
            f"chat template {template.name}",
            "renders differently without its generation marks",
            "move variables that are set between the marks outside them",
        )


def set_eos(tokenizer: PreTrainedTokenizerFast, template: ChatTemplate, end: EndOfTurn) -> list[str]:
    """Makes the end of turn the tokenizer's eos_token, where that changes nothing the template writes; says so."""
    old, before = tokenizer.eos_token, render_text(tokenizer, template, _PROBE)
    tokenizer.eos_token = end.text
    if render_text(tokenizer, template, _PROBE) == before:
        return _changed("tokenizer.eos_token", old, end.text)
    tokenizer.eos_token = old  # a template that writes eos_token elsewhere (Phi-3) was trained with the old one
    return [f"tokenizer.eos_token: stays {old!r}, which the template writes; generation stops at {end.text!r} too"]


def stop_ids(
    tokenizer: PreTrainedTokenizerFast, template: ChatTemplate, previous: Iterable[int], rows: int
) -> list[int]:
    """Ids that end generation: the end of turn first, then what the family stops at, then what was there before."""
    ids = {text: token for token, text in encoder_of(tokenizer).added.items()}
    known = [ids[text] for text in template.facts.stop if text in ids]
    stops = [end_of_turn(tokenizer, template).id, *known, *previous]
    return [token for token in dict.fromkeys(stops) if 0 <= token < rows]


def choose_pad(tokenizer: PreTrainedTokenizerFast, template: ChatTemplate, rows: int, stops: list[int]) -> int:
    """Id of the best pad token there is; our masks never look at it, but other tools mask it everywhere."""
    encoder, end = encoder_of(tokenizer), stops[0]
    written = {token for _, token in control_tokens(tokenizer, template)}
    own = tokenizer.pad_token_id
    if own is not None and 0 <= own < rows and own not in written:
        return own
    spare = [token for token in encoder.added if token < rows and token not in written and token not in stops]
    for name in _SPARE:
        for token in spare:
            if name.search(encoder.added[token]):
                return token
    unknown = tokenizer.unk_token_id
    if unknown in spare and unknown not in encoder.encode(_probe_text(tokenizer, template) + "\t漢字 ٱلْ 🏴‍☠️")[0]:
        return unknown
    return next((token for token in stops[1:] if token not in written), end)


def _bos_note(tokenizer: PreTrainedTokenizerFast, template: ChatTemplate) -> list[str]:
    bos = tokenizer.bos_token_id
    plain_begins = bos is not None and tokenizer("x")["input_ids"][:1] == [bos]
    chat_begins = encoder_of(tokenizer).encode(_probe_text(tokenizer, template))[0][:1] == [bos]
    if plain_begins and not chat_begins:
        return [f"note: plain text begins with {tokenizer.bos_token!r}, a conversation in this template does not"]
    return []


def _changed(what: str, old: object, new: object) -> list[str]:
    return [] if old == new else [f"{what}: {old!r} -> {new!r}"]


def _listed(ids: int | Iterable[int] | None) -> list[int]:
    if ids is None:
        return []
    return [ids] if isinstance(ids, int) else list(ids)
