"""Mends what a checkpoint's files say: tokenizer files that break or contradict, sizes and flags in the configs."""

from __future__ import annotations

from typing import Any

from posttrain.chat.tokenizer import load_any_tokenizer
from posttrain.doctor.files import FLAGS
from posttrain.doctor.mend import GENERATION, JINJA, SPECIAL_MAP, TOKENIZER, TOKENIZER_CONFIG, Patient
from posttrain.errors import ChatError, CheckpointError
from posttrain.models.files import read_json

_OTHERS = ("tokenizer.model", "tekken.json", "vocab.json", "spiece.model")
"""Files from which a tokenizer can be built when its `tokenizer.json` is beyond repair."""
_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token", "cls_token", "sep_token", "mask_token")


def tokenizer(patient: Patient) -> None:
    """Writes merges in the form that every version of tokenizers reads; else builds the file from its sources."""
    path = patient.folder / TOKENIZER
    if not path.is_file():
        return
    before = path.read_bytes()
    try:
        spec: dict[str, Any] = read_json(path)
        pairs = _merge_pairs(spec["model"])
    except (CheckpointError, KeyError, TypeError):
        pairs = None
    if pairs is not None:
        spec["model"]["merges"] = pairs
        patient.write(TOKENIZER, spec)
        if patient.checkpoint().tokenizer is not None:
            patient.say(f"{TOKENIZER}: merges written as pairs")
            return
        path.write_bytes(before)
    if not any((patient.folder / name).is_file() for name in _OTHERS):
        return
    path.unlink()
    try:
        load_any_tokenizer(patient.folder).backend_tokenizer.save(str(path))
    except ChatError:
        path.write_bytes(before)
        return
    patient.say(f"{TOKENIZER}: was damaged, built again from the tokenizer's other files")


def _merge_pairs(model: dict[str, Any]) -> list[list[str]] | None:
    """Splits merges written as "left right" where left, right and both together are in the vocabulary.

    None where there is nothing to split, or a merge has no such place or several: pieces may hold spaces.
    """
    merges, vocabulary = model["merges"], model["vocab"]
    if not any(isinstance(merge, str) for merge in merges):
        return None
    pairs = []
    for merge in merges:
        if not isinstance(merge, str):
            pairs.append(list(merge))
            continue
        places = [at for at, letter in enumerate(merge) if letter == " "]
        cuts = [[merge[:at], merge[at + 1 :]] for at in places]
        known = [[a, b] for a, b in cuts if a in vocabulary and b in vocabulary and a + b in vocabulary]
        if len(known) != 1:
            return None
        pairs.append(known[0])
    return pairs


def whole_texts(patient: Patient) -> None:
    """Takes truncation and padding out of `tokenizer.json`."""
    spec = patient.tokenizer_spec()
    for key in ("truncation", "padding"):
        if spec.get(key) is not None:
            patient.write(TOKENIZER, patient.read(TOKENIZER) | {key: None})
            patient.say(f"{TOKENIZER}, {key}: removed")


def agreement(patient: Patient) -> None:
    """Lets one file speak where two contradict.

    The .jinja file has the template, `tokenizer.json` the tokens, `tokenizer_config.json` what they are for.
    Flags of added tokens are the exception: transformers goes by `tokenizer_config.json`, so the model was
    trained with those.
    """
    if (patient.folder / JINJA).is_file() and "chat_template" in patient.read(TOKENIZER_CONFIG):
        _forget(patient, "chat_template", f"{JINJA} has the template")
    _added_tokens(patient)
    if (patient.folder / SPECIAL_MAP).is_file():
        own = patient.read(TOKENIZER_CONFIG)
        for name in _NAMES:
            if name not in own and (value := patient.read(SPECIAL_MAP).get(name)) is not None:
                patient.set_token(name, value["content"] if isinstance(value, dict) else value)
        patient.remove(SPECIAL_MAP, f"{TOKENIZER_CONFIG} names the tokens")
    checkpoint = patient.checkpoint()
    place = checkpoint.embedding()
    if place is not None and checkpoint.text_config.get("vocab_size") not in (None, place.shape[0]):
        patient.set_config("vocab_size", place.shape[0])
    loaded = checkpoint.tokenizer
    for name in ("bos_token_id", "pad_token_id"):
        own_id = None if loaded is None else {"bos": loaded.bos_token_id, "pad": loaded.pad_token_id}[name[:3]]
        if own_id is not None:
            if isinstance(checkpoint.text_config.get(name), int):
                patient.set_config(name, own_id)
            if isinstance((checkpoint.generation or {}).get(name), int):
                patient.set(GENERATION, name, own_id)


def _added_tokens(patient: Patient) -> None:
    decoder = patient.read(TOKENIZER_CONFIG).get("added_tokens_decoder")
    if not isinstance(decoder, dict) or not (patient.folder / TOKENIZER).is_file():
        return
    spec = patient.read(TOKENIZER)
    for entry in spec["added_tokens"]:
        other = decoder.get(str(entry["id"]), {})
        if other.get("content") == entry["content"]:
            entry |= {flag: bool(other[flag]) for flag in FLAGS if flag in other}
    patient.write(TOKENIZER, spec)
    _forget(patient, "added_tokens_decoder", f"{TOKENIZER} has the tokens")


def _forget(patient: Patient, key: str, reason: str) -> None:
    settings = patient.read(TOKENIZER_CONFIG)
    del settings[key]
    patient.write(TOKENIZER_CONFIG, settings)
    patient.say(f"{TOKENIZER_CONFIG}, {key}: removed, {reason}")


def untied(patient: Patient) -> None:
    """Says in config.json that embedding and output matrix are two."""
    patient.set_config("tie_word_embeddings", False)


def max_length(patient: Patient) -> None:
    """Makes `model_max_length` the model's own number of positions."""
    positions = patient.checkpoint().text_config.get("max_position_embeddings")
    if isinstance(positions, int):
        patient.set(TOKENIZER_CONFIG, "model_max_length", positions)


def bos_flag(patient: Patient) -> None:
    """Makes `add_bos_token` say what encoding does."""
    loaded = patient.checkpoint().tokenizer
    if loaded is not None:
        begins = loaded.bos_token_id is not None and loaded("x")["input_ids"][:1] == [loaded.bos_token_id]
        patient.set(TOKENIZER_CONFIG, "add_bos_token", begins)


def no_eos_after_texts(patient: Patient) -> None:
    """Takes the eos token out of the end of the post-processor's templates."""
    loaded = patient.checkpoint().tokenizer
    eos = None if loaded is None else loaded.eos_token
    if eos is None:
        return
    spec = patient.tokenizer_spec()
    processor = spec.get("post_processor") or {}
    changed = False
    for step in processor.get("processors", [processor]):
        for key in ("single", "pair"):
            items = step.get(key)
            while items and items[-1].get("SpecialToken", {}).get("id") == eos:
                items.pop()
                changed = True
    if changed:
        patient.write(TOKENIZER, spec)
        patient.say(f"{TOKENIZER}, post_processor: writes no eos after texts")
    if patient.read(TOKENIZER_CONFIG).get("add_eos_token"):
        patient.set(TOKENIZER_CONFIG, "add_eos_token", False)
