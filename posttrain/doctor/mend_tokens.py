"""Mends special tokens: which token does what, tokens a template lacks, and rows for the tokens there are."""

from __future__ import annotations

import json
from collections.abc import Sequence

from transformers import PreTrainedTokenizerFast

from posttrain.chat.contract import choose_pad, control_tokens, set_eos, stop_ids
from posttrain.chat.encode import encoder_of
from posttrain.chat.templates import ChatTemplate
from posttrain.chat.turns import EndOfTurn, end_of_turn
from posttrain.doctor import tokens
from posttrain.doctor.checkpoint import listed
from posttrain.doctor.mend import GENERATION, TOKENIZER, TOKENIZER_CONFIG, Patient
from posttrain.doctor.probes import Probes
from posttrain.doctor.rows import NewRow, matrices, write_rows
from posttrain.doctor.vocabulary import add_token, new_row, rename_token, spare_tokens
from posttrain.doctor.weights import token_rows
from posttrain.errors import ChatError
from posttrain.models.new_tokens import NewToken, read_new_tokens, write_new_tokens

_ENDS = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "<|eot_id|>", "<|im_end|>", "<｜end▁of▁sentence｜>")
_BEGINS = ("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "<|bos|>", "<｜begin▁of▁sentence｜>")
_PAD, _BOS = "<|pad|>", "<|begin_of_text|>"


def eos(patient: Patient) -> None:
    """Gives the tokenizer the eos token that the configs name, else one of a usual name that it has."""
    checkpoint = patient.checkpoint()
    tokenizer = checkpoint.tokenizer
    if tokenizer is None or tokenizer.eos_token:
        return
    known = {token: text for text, token in tokenizer.get_vocab().items()}
    said = [*listed(checkpoint.text_config.get("eos_token_id")), *(checkpoint.stops or [])]
    names = [known[token] for token in said if token in known]
    names += [text for text in _ENDS if text in encoder_of(tokenizer).added.values()]
    if names:
        patient.set_token("eos_token", names[0])


def settle(patient: Patient) -> None:
    """Makes tokenizer, config and generation config agree on end of turn, stop ids, pad and bos, as training does."""
    checkpoint = patient.checkpoint()
    tokenizer, template = checkpoint.tokenizer, checkpoint.template
    end = None if tokenizer is None or template is None else _end(tokenizer, template)
    if tokenizer is None or template is None or end is None:
        return
    rows = checkpoint.rows or max(tokenizer.get_vocab().values()) + 1
    said = listed(checkpoint.text_config.get("eos_token_id", checkpoint.config.get("eos_token_id")))
    before = [*(checkpoint.stops or []), *said, *listed(tokenizer.eos_token_id)]
    set_eos(tokenizer, template, end)
    stops = stop_ids(tokenizer, template, before, rows)
    patient.set_token("eos_token", str(tokenizer.eos_token))
    if any(tokens.pad(checkpoint, end)):
        tokenizer.pad_token = None  # to be chosen anew
    pad_text, pad = _pad(patient, tokenizer, template, rows, stops)
    patient.set_token("pad_token", pad_text)
    if not checkpoint.has_model:
        return
    if end.id not in said or not all(0 <= token < rows for token in said):
        patient.set_config("eos_token_id", end.id)
    patient.set(GENERATION, "eos_token_id", stops)
    patient.set_config("pad_token_id", pad)
    patient.set(GENERATION, "pad_token_id", pad)
    bos, outside = tokenizer.bos_token_id, lambda token: isinstance(token, int) and not 0 <= token < rows
    if bos is not None or outside(checkpoint.text_config.get("bos_token_id")):
        patient.set_config("bos_token_id", bos)
    if bos is not None or outside((checkpoint.generation or {}).get("bos_token_id")):
        patient.set(GENERATION, "bos_token_id", bos)


def _end(tokenizer: PreTrainedTokenizerFast, template: ChatTemplate) -> EndOfTurn | None:
    try:
        return end_of_turn(tokenizer, template)
    except ChatError:
        return None


def _pad(
    patient: Patient, tokenizer: PreTrainedTokenizerFast, template: ChatTemplate, rows: int, stops: list[int]
) -> tuple[str, int]:
    """The best pad token there is; a new one where that would end answers and the matrix has a row to spare.

    What pads is never trained, so its row may be anything.
    """
    chosen = choose_pad(tokenizer, template, rows, stops)
    if chosen == stops[0]:
        spec = patient.tokenizer_spec()
        if (new := add_token(spec, _PAD)) < rows:
            patient.write(TOKENIZER, spec)
            patient.say(f"{TOKENIZER}: {_PAD} added as {new}, in a row that no token had")
            return _PAD, new
    return str(tokenizer.convert_ids_to_tokens(chosen)), chosen


def template_tokens(patient: Patient) -> None:
    """Gives the tokenizer the tokens its template writes: reserved ones renamed first, then new ones."""
    checkpoint = patient.checkpoint()
    tokenizer, template = checkpoint.tokenizer, checkpoint.template
    if tokenizer is None or template is None:
        return
    missing = tokens.missing_tokens(Probes(tokenizer, template))
    if "bos_token" in missing:
        missing = _bos(patient, tokenizer, missing)
    if not missing:
        return
    spec, spare = patient.tokenizer_spec(), spare_tokens(tokenizer, template)
    for token in missing:
        if spare:
            old = spare.pop(0)
            patient.say(f"{TOKENIZER}: {old} ({rename_token(spec, old, token)}) is now {token}")
            _rename_elsewhere(patient, old, token)
        else:
            patient.say(f"{TOKENIZER}: {token} added as {add_token(spec, token)}")
    patient.write(TOKENIZER, spec)
    begin_rows(patient, missing)


def _bos(patient: Patient, tokenizer: PreTrainedTokenizerFast, missing: Sequence[str]) -> list[str]:
    """Names a bos token, one of a usual name that is there or a new one; returns the texts of what is missing then."""
    there = encoder_of(tokenizer).added.values()
    text = next((name for name in _BEGINS if name in there), _BOS)
    patient.set_token("bos_token", text)
    tokenizer.bos_token = text
    return [token for token in [text, *missing] if token != "bos_token" and token not in there]


def _rename_elsewhere(patient: Patient, old: str, new: str) -> None:
    """Renames a token in `tokenizer_config.json`, wherever it lists tokens."""
    settings = json.dumps(patient.read(TOKENIZER_CONFIG), ensure_ascii=False)
    quoted = json.dumps(old, ensure_ascii=False)
    patient.write(TOKENIZER_CONFIG, json.loads(settings.replace(quoted, json.dumps(new, ensure_ascii=False))))


def grow(patient: Patient) -> None:
    """Gives rows to the tokens beyond the matrices."""
    checkpoint = patient.checkpoint()
    if checkpoint.tokenizer is not None and checkpoint.rows is not None:
        vocabulary = checkpoint.tokenizer.get_vocab().items()
        begin_rows(patient, [text for text, token in vocabulary if token >= (checkpoint.rows or 0)])


def untrained(patient: Patient) -> None:
    """Gives first values to the template's tokens whose rows look as if nobody trained them."""
    checkpoint = patient.checkpoint()
    if checkpoint.tokenizer is not None and checkpoint.template is not None:
        for finding in token_rows(checkpoint, Probes(checkpoint.tokenizer, checkpoint.template)):
            begin_rows(patient, finding.where.split(", "))


def never_seen(patient: Patient) -> None:
    """Gives first values to the template's tokens that no text of the pretraining here held."""
    checkpoint = patient.checkpoint()
    if patient.untrained and checkpoint.tokenizer is not None and checkpoint.template is not None:
        written = control_tokens(checkpoint.tokenizer, checkpoint.template)
        begun = {token.id for token in read_new_tokens(patient.folder)}
        begin_rows(patient, [text for text, token in written if token in patient.untrained - begun])


def begin_rows(patient: Patient, texts: Sequence[str]) -> None:
    """Writes first values for tokens' rows, growing the matrices where they end before, and notes which they are."""
    checkpoint = patient.checkpoint()
    places, tokenizer = matrices(checkpoint), checkpoint.tokenizer
    if not texts or not places or tokenizer is None:
        return
    rows = places[0].shape[0]
    end = None if checkpoint.template is None else _end(tokenizer, checkpoint.template)
    own = {tokenizer.convert_tokens_to_ids(token) for token in texts}
    usual = [tokenizer.convert_tokens_to_ids(name) for name in _ENDS if name in tokenizer.get_vocab()]
    said = [*listed(tokenizer.eos_token_id), *(checkpoint.stops or []), *usual]
    ends = [token for token in said if token not in own]
    new = [new_row(tokenizer, token, ends if end and token == end.text else (), rows) for token in texts]
    new.sort(key=lambda row: row.id)
    after = write_rows(checkpoint, new)
    if checkpoint.text_config.get("vocab_size") != after:
        patient.set_config("vocab_size", after)
    _note(patient, tokenizer, new)


def _note(patient: Patient, tokenizer: PreTrainedTokenizerFast, new: Sequence[NewRow]) -> None:
    """Adds to the list of rows that training has to train."""
    known = {token.id: token for token in read_new_tokens(patient.folder)}
    for row in new:
        sources = tuple(str(tokenizer.convert_ids_to_tokens(source)) for source in row.sources)
        known[row.id] = NewToken(row.token, row.id, sources)
        begins = f" as the mean of {', '.join(sources)}" if len(sources) > 1 else f" as {sources[0]}" if sources else ""
        patient.say(f"row {row.id} ({row.token}) begins anew{begins}, and has to be trained")
    write_new_tokens(patient.folder, known.values())
