"""Defects of a checkpoint's files: what does not load, what contradicts, which template is there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from posttrain.artifact import Artifact
from posttrain.chat.templates import strip_marks, template_digest
from posttrain.doctor.catalogue import Finding, found
from posttrain.doctor.checkpoint import Checkpoint
from posttrain.doctor.probes import ANSWER, USER, Probes
from posttrain.errors import CheckpointError
from posttrain.models.files import read_json

FLAGS = ("special", "lstrip", "rstrip", "single_word", "normalized")
_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token")
_JINJA, _TOKENIZER, _CONFIG = "chat_template.jinja", "tokenizer.json", "tokenizer_config.json"


def tokenizer_files(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Finds tokenizer files that do not load, and what is baked into them."""
    error = checkpoint.tokenizer_error
    if error is not None:
        yield found("tokenizer-broken", error.where, error.found, error.todo)
    for key in ("truncation", "padding"):
        value = checkpoint.tokenizer_head.get(key)
        if isinstance(value, dict):
            length = value.get("max_length") if key == "truncation" else value.get("strategy")
            yield found(
                "truncation-baked-in",
                f"{_TOKENIZER}, {key}",
                f"every text is {'cut at ' + str(length) + ' tokens' if key == 'truncation' else 'padded'}: {length}",
                "set it to null; --fix does",
            )
            return


def template_files(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Finds a template that is absent, unreadable, not the default, or not the one that was trained with."""
    error = checkpoint.own_template_error
    if checkpoint.chosen is None and error is not None and not _damaged_config(checkpoint):
        if "none called default" in error.found:
            yield found("no-default-template", error.where, error.found, "call one of them default")
        else:
            yield found("template-broken", error.where, error.found, error.todo)
    elif checkpoint.template is None and not _damaged_config(checkpoint):
        named = sorted(path.stem for path in (checkpoint.folder / "chat_templates").glob("*.jinja"))
        if named:
            cause = f"templates {', '.join(named)}, none called default"
            yield found("no-default-template", "chat_templates/", cause, f"write one as {_JINJA}")
        else:
            yield _no_template(checkpoint)
    yield from _as_trained(checkpoint)


def _damaged_config(checkpoint: Checkpoint) -> bool:
    """Whether tokenizer_config.json cannot be read: that is said of the tokenizer already."""
    path = checkpoint.folder / _CONFIG
    return path.is_file() and not checkpoint.tokenizer_config and checkpoint.tokenizer_error is not None


def _no_template(checkpoint: Checkpoint) -> Finding:
    suggestion = "plain"
    if checkpoint.tokenizer is not None:
        from posttrain.doctor.vocabulary import suggest_template

        suggestion = suggest_template(checkpoint.tokenizer, checkpoint.config)
    return found(
        "no-template",
        str(checkpoint.folder),
        f"neither {_JINJA} nor a chat_template in {_CONFIG}: a base model",
        f"by its vocabulary, {suggestion} fits: judge it with --template {suggestion}, or let --fix give it",
    )


def _as_trained(checkpoint: Checkpoint) -> Iterator[Finding]:
    artifact = Artifact.read(checkpoint.folder)
    if artifact is None or checkpoint.own_source is None:
        return
    trained = artifact.record.files.get(_JINJA, {}).get("sha256")  # templates are saved without marks
    here = template_digest(strip_marks(checkpoint.own_source))
    if trained is not None and trained != here:
        yield found(
            "template-not-as-trained",
            _JINJA,
            f"its SHA-256 is {here[:12]}, the stage trained with {str(trained)[:12]}",
            "restore the template that the stage saved, or run the stage again",
        )


def renders(probes: Probes) -> Iterator[Finding]:
    """Finds a template that renders no conversation at all, or leaves out what is said."""
    where = f"template {probes.template.name}"
    todo = "correct the template, or choose another one with --template"
    for messages, prompt in (([USER], True), ([USER, ANSWER], False)):
        if refusal := probes.refusal(messages, prompt):
            yield found("template-broken", where, f"renders no conversation: {refusal}", todo)
            return
        if missing := [m["role"] for m in messages if not probes.has(m["content"], messages, prompt)]:
            yield found("template-broken", where, f"leaves out what the {missing[0]} says", todo)
            return


def disagreements(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Finds what two files of the checkpoint say differently; at most one finding per pair of files."""
    config = checkpoint.tokenizer_config
    in_config = _default_template(config.get("chat_template"))
    jinja = checkpoint.folder / _JINJA
    if in_config is not None and jinja.is_file() and jinja.read_bytes().decode("utf-8", "replace") != in_config:
        yield _disagree(
            f"{_JINJA}, {_CONFIG}",
            "two different chat templates; transformers reads the .jinja file, older tools the other",
            "remove chat_template from tokenizer_config.json",
        )
    if cause := _added_tokens(checkpoint):
        yield _disagree(f"{_TOKENIZER}, {_CONFIG}", cause, "save the tokenizer again from what it is loaded as")
    path = checkpoint.folder / "special_tokens_map.json"
    if path.is_file():
        other = _content_of(read_json(path))
        named = {name: text for name, text in _content_of(config).items() if name in other}
        differ = [f"{name} is {other[name]!r} in one, {text!r} in the other" for name, text in named.items()]
        differ = [line for line, (name, text) in zip(differ, named.items(), strict=True) if other[name] != text]
        if differ:
            yield _disagree(f"{path.name}, {_CONFIG}", differ[0], f"remove {path.name}: transformers 5 needs none")


def id_disagreements(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Finds special token ids, and row counts, that config.json and the other files say differently.

    Of stop tokens nothing is said here: several may be right at once.
    """
    tokenizer = checkpoint.tokenizer
    if unknown := list(_unknown_tokens(checkpoint)):
        yield from unknown
        return
    for file, settings in (("config.json", checkpoint.text_config), ("generation_config.json", checkpoint.generation)):
        for name in ("bos_token_id", "pad_token_id"):
            said = (settings or {}).get(name)
            own = (
                None if tokenizer is None else {"bos": tokenizer.bos_token_id, "pad": tokenizer.pad_token_id}[name[:3]]
            )
            if isinstance(said, int) and isinstance(own, int) and said != own:
                yield _disagree(f"{file}, {name}", f"is {said}, the tokenizer's is {own}", f"set it to {own}")
                return
    place, said = checkpoint.embedding(), checkpoint.text_config.get("vocab_size")
    if place is not None and isinstance(said, int) and said != place.shape[0]:
        cause = f"is {said}, the embedding matrix has {place.shape[0]} rows"
        yield _disagree("config.json, vocab_size", cause, f"set it to {place.shape[0]}")


def _unknown_tokens(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Finds special tokens that tokenizer.json does not hold: loading adds them silently, under new ids."""
    tokenizer, entries = checkpoint.tokenizer, checkpoint.tokenizer_head.get("added_tokens")
    if tokenizer is None or not isinstance(entries, list):
        return
    known = {entry["content"] for entry in entries}
    for name in _NAMES:
        text = tokenizer.special_tokens_map.get(name)
        if text and text not in known and tokenizer.backend_tokenizer.model.token_to_id(text) is None:
            cause = f"{text!r} is no token of {_TOKENIZER}; loading gives it the new id {checkpoint.vocabulary[text]}"
            yield _disagree(f"{_CONFIG}, {name}", cause, f"name a token that {_TOKENIZER} has")
            return


def _disagree(where: str, cause: str, remedy: str) -> Finding:
    return found("files-disagree", where, cause, remedy)


def _default_template(value: Any) -> str | None:
    if isinstance(value, list):
        value = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
    if isinstance(value, dict):
        value = value.get("default")
    return value if isinstance(value, str) else None


def _added_tokens(checkpoint: Checkpoint) -> str:
    """Says which added token the two tokenizer files describe differently; "" when they agree."""
    decoder = checkpoint.tokenizer_config.get("added_tokens_decoder")
    entries = checkpoint.tokenizer_head.get("added_tokens")
    if not isinstance(decoder, dict) or not isinstance(entries, list):
        return ""
    own = {str(entry["id"]): entry for entry in entries}
    for token, entry in decoder.items():
        other = own.get(token)
        if other is None:
            continue  # a file may leave tokens of the vocabulary itself out
        if other["content"] != entry.get("content"):
            return f"token {token} is {other['content']!r} in one, {entry.get('content')!r} in the other"
        flags = [flag for flag in FLAGS if flag in entry and bool(other.get(flag)) != bool(entry[flag])]
        if flags:
            return f"{other['content']!r} has {flags[0]} {other.get(flags[0])} in one, {entry[flags[0]]} in the other"
    return ""


def _content_of(settings: dict[str, Any]) -> dict[str, str]:
    values = {name: settings.get(name) for name in _NAMES}
    plain = {name: value.get("content") if isinstance(value, dict) else value for name, value in values.items()}
    return {name: value for name, value in plain.items() if isinstance(value, str)}


def check_readable(checkpoint: Checkpoint) -> None:
    """Raises CheckpointError where a file that everything rests on is damaged: that is no defect, but no checkpoint."""
    for name in ("config.json", "generation_config.json"):
        if (checkpoint.folder / name).is_file():
            read_json(checkpoint.folder / name)
    if checkpoint.has_model and not checkpoint.config.get("model_type"):
        raise CheckpointError(f"{checkpoint.folder}/config.json", "has no model_type", "give a transformers checkpoint")
