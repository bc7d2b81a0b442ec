"""Chat templates: the bundled ones, a user's file, and the form that is saved in a model folder.

A template may carry `{% generation %}` marks around what the assistant says. Folders are saved WITHOUT
them: transformers renders marked templates, other engines (vLLM, llama.cpp) need not.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import yaml

from posttrain.errors import ChatError

_MARK = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")
_MAX_CHARS = 200_000
_SUFFIXES = (".jinja", ".jinja2", ".j2")


@dataclass(frozen=True)
class TemplateFacts:
    """What is known of a template without rendering it; of a user's own file nothing is.

    Every bundled template states every field in its `.yaml` file, and tests hold the template to them.
    """

    family: str = "unknown"
    required_tokens: tuple[str, ...] = ()
    """Texts that must be one token each; `eos_token` and `bos_token` mean the tokenizer's own."""
    stop: tuple[str, ...] = ()
    """Tokens that end generation beside the end of turn, where the tokenizer has them."""
    bos: Literal["none", "template", "unknown"] = "unknown"
    """Whether the template writes the beginning-of-text token; nothing else ever adds it."""
    system: Literal["native", "concatenated", "folded", "refused", "unknown"] = "unknown"
    """What becomes of a first system message: a block of its own, put before a user's text, or an error."""
    default_system: str | None = None
    """What the system block says when the conversation has none, `{date}` for the date; "" = no block."""
    date: Literal["none", "fixed", "today", "unknown"] = "unknown"
    """Whether a date is written; `fixed`: the same every day, unless the caller gives `date_string`."""
    roles: tuple[str, ...] = ()
    """Roles that it writes; on others it raises, or writes them as they are named."""
    order: Literal["free", "system first", "alternating", "unknown"] = "unknown"
    """Orders that it takes: any; any, but system only at the beginning; user and assistant in turn."""
    tools: bool | None = None
    """Whether it writes tools, tool calls and tool results."""
    thinking: bool | None = None
    """Whether it writes the reasoning of an assistant's message."""
    history: Literal["kept", "rewritten", "unknown"] = "unknown"
    """`kept`: a prompt and its answer stay as they were rendered when turns follow, whatever they are."""
    trims: bool | None = None
    """Whether contents lose their outer white space."""
    kwargs: tuple[str, ...] = ()
    """Variables that a caller may set, beside messages, tools and add_generation_prompt."""
    marks: Literal["exact", "offsets", "unproved"] = "unproved"
    """`exact`: a test proves that the marks hold answer + end of turn, and that history is never rewritten;
    `offsets`: they hold that too, but history is rewritten, so that spans are still proved by offsets."""
    checked_against: tuple[str, ...] = ()
    """Templates not written by us that it was found to render like, byte for byte."""
    departs: tuple[str, ...] = ()
    """Where it renders otherwise than they do, on purpose, and why."""
    digests: tuple[str, ...] = ()
    """SHA-256 of such texts, so that a model folder that holds one of them is known by these facts too."""
    sources: tuple[str, ...] = ()


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja chat template and what is known of it."""

    name: str
    source: str
    """Jinja text, marks included."""
    facts: TemplateFacts = TemplateFacts()
    saved: str | None = None
    """The text for model folders, where it is not `source` without its marks (see `marking`)."""

    @property
    def inference(self) -> str:
        """The text that is saved in model folders: the same rendering, no marks."""
        return strip_marks(self.source) if self.saved is None else self.saved

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of `inference`: what records name and `verify_saved` expects."""
        return template_digest(self.inference)


def template_digest(source: str) -> str:
    """SHA-256 (hex) of a template's text, exactly as it stands."""
    return hashlib.sha256(source.encode()).hexdigest()


@lru_cache(maxsize=64)
def strip_marks(source: str) -> str:
    """Removes the generation marks of a template; every rendering stays the same byte for byte.

    White space beside a mark is data to Jinja unless the mark has a dash on that side. Marks that
    cannot be cut out without touching such white space become `{% if true %}` ... `{% endif %}`.
    """
    marks = list(_MARK.finditer(source))
    if all(_cuts_cleanly(source, mark) for mark in marks):
        pieces, at = [], 0
        for mark in marks:
            before = source[at : mark.start()]
            pieces.append(before.rstrip() if mark[1] == "-" else before)
            at = mark.end()
            if mark[3] == "-":
                at += len(source[at:]) - len(source[at:].lstrip())
        return "".join(pieces) + source[at:]
    return _MARK.sub(lambda mark: f"{{%{mark[1]} {'endif' if mark[2] else 'if true'} {mark[3]}%}}", source)


def _cuts_cleanly(source: str, mark: re.Match[str]) -> bool:
    left = mark[1] == "-" or (not mark[1] and not source[: mark.start()][-1:].isspace())
    right = mark[3] == "-" or (not mark[3] and not source[mark.end() :][:1].isspace())
    return left and right


def load_template(name_or_path: str, base_dir: Path) -> ChatTemplate:
    """Loads a bundled template by bare name, else a `.jinja` file relative to `base_dir`.

    Raises:
        UserError: no bundled template of that name (the nearest are suggested).
        ChatError: the file is missing, empty, no text, or no Jinja (with the line).
    """
    if not names_file(name_or_path):
        return _load_bundled(name_or_path)
    return _read_own(base_dir / Path(name_or_path).expanduser())


def names_file(name_or_path: str) -> bool:
    """Whether a `chat_template` means a file, and not a bundled template (whose name may have a dot: `llama3.1`)."""
    return "/" in name_or_path or name_or_path.endswith(_SUFFIXES)


def read_folder_template(folder: Path) -> ChatTemplate | None:
    """Reads a model folder's own template, or returns None; `chat_template.jinja` wins, as in transformers.

    Raises:
        ChatError: the file cannot be read, or there are several templates and none is the default.
    """
    path = folder / "chat_template.jinja"
    if path.is_file():
        return _read_own(path)
    config = folder / "tokenizer_config.json"
    if not config.is_file():
        return None
    from posttrain.chat.files import read_json

    value = read_json(config).get("chat_template")
    return own_template(value, str(config))


def own_template(value: Any, where: str) -> ChatTemplate | None:
    """Builds the template of a tokenizer from its `chat_template` attribute (None, text, or several by name).

    Raises:
        ChatError: several templates, and none is called `default`.
    """
    if isinstance(value, list):  # as older tokenizer_config.json files write several
        named = [entry for entry in value if isinstance(entry, dict)]
        value = {str(entry.get("name")): entry.get("template") for entry in named}
    if not value:
        return None
    if isinstance(value, dict):
        if "default" not in value:
            raise ChatError(where, f"templates {', '.join(value)}, none called default", "name one as chat_template")
        value = value["default"]
    if not value:
        return None
    if not isinstance(value, str):
        found = f"chat_template is a {type(value).__name__}, not a text"
        raise ChatError(where, found, "write the template's Jinja text")
    _check_syntax(value, f"{where}, chat_template")
    return recognise(value, "the model's own")


def choose_template(folder: Path, chosen: str | None, base_dir: Path, where: str, settled: bool) -> ChatTemplate:
    """Returns the template that a model folder is trained with: the chosen one, else its own.

    Args:
        chosen: bundled name or file; None = the model's own.
        where: place of the choice in the recipe.
        settled: the model was trained with its own template here; another one is refused.

    Raises:
        ChatError: no template anywhere, or another than the settled one.
    """
    own = read_folder_template(folder)
    if chosen is None:
        if own is None:
            raise ChatError(where, f"absent, and {folder.name} has no template of its own", "name one, e.g. chatml")
        return own
    template = load_template(chosen, base_dir)
    if settled and own is not None and template.digest != own.digest:
        raise ChatError(where, f"{template.name} is not the template {folder.name} was trained with", "leave it out")
    return template


def recognise(source: str, name: str) -> ChatTemplate:
    """Returns the bundled template that a text is (marked or not), else one under its own name.

    Of a family's own text, known by its digest, the bundled template's facts hold, but for the marks;
    of any other text nothing is known.
    """
    from posttrain.recipe.bundled import list_bundled

    digest = template_digest(strip_marks(source))
    for bundled in map(_load_bundled, list_bundled("chat_templates")):
        if bundled.digest == digest:
            return bundled
        if digest in bundled.facts.digests:
            return ChatTemplate(f"{bundled.name} (the family's own)", source, replace(bundled.facts, marks="unproved"))
    return ChatTemplate(name, source)


@lru_cache(maxsize=128)
def _load_bundled(name: str) -> ChatTemplate:
    from posttrain.recipe.bundled import find_bundled  # late: only this needs to know where bundled files lie

    path = find_bundled("chat_templates", name)
    facts = yaml.safe_load(path.with_suffix(".yaml").read_text(encoding="utf-8"))
    frozen: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in facts.items()}
    return ChatTemplate(name, _read(path), TemplateFacts(**frozen))


def _read_own(path: Path) -> ChatTemplate:
    text = _read(path)
    _check_syntax(text, str(path))
    return recognise(text, path.name)


def _check_syntax(source: str, where: str) -> None:
    """Raises ChatError at the line where a text is no Jinja template."""
    import jinja2.sandbox

    # Marks are transformers' own tag; replaced in place, they leave the line numbers as they are.
    plain = _MARK.sub(lambda mark: "{% endif %}" if mark[2] else "{% if true %}", source)
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
    try:
        environment.compile(plain)
    except jinja2.TemplateSyntaxError as error:
        raise ChatError(f"{where}:{error.lineno}", f"not Jinja ({error.message})", "correct the template") from None
    except RecursionError:
        raise ChatError(where, "nested too deeply to be read as Jinja", "is this a chat template?") from None


def _read(path: Path) -> str:
    try:
        text = path.read_bytes().decode("utf-8")  # bytes: newlines are part of a template
    except (OSError, UnicodeDecodeError) as error:
        raise ChatError(str(path), f"cannot be read ({error})", "give a bundled name or a .jinja file") from None
    if not text.strip() or len(text) > _MAX_CHARS:
        found = f"{len(text):,} characters" if text.strip() else "holds no text"
        raise ChatError(str(path), found, "a chat template is a Jinja text of 1 to 200,000")
    return text
