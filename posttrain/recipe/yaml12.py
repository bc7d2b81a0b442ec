"""YAML 1.2 (core schema) as plain values, with the line of every key.

PyYAML's parser gives the events (libyaml's where it is compiled in); what a scalar means is decided
here, since PyYAML follows YAML 1.1: it reads `5e-6` as text, `no` as False, and lets the last of two
equal keys win. Source of the rules: YAML 1.2.2, section 10.3.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

from posttrain.errors import RecipeError

KeyPath = tuple[str | int, ...]

MAX_BYTES = 1_000_000
MAX_DEPTH = 64
MAX_VALUES = 100_000
"""Values of a file with its aliases written out; more is a mistake, or a bomb."""

_LOADER: Any = yaml.CBaseLoader if yaml.__with_libyaml__ else yaml.BaseLoader
_NULL = {"", "~", "null", "Null", "NULL"}
_BOOL = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_INFINITE = re.compile(r"([-+]?)\.(inf|Inf|INF)")
_NAN = {".nan", ".NaN", ".NAN"}
_BREAK = re.compile("[\x85\u2028\u2029\ufeff]")  # PyYAML writes them as they are, and reads them as line breaks
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")


@dataclass(frozen=True)
class Document:
    """A file's value, where each key of it stands, and what is wrong with it as YAML."""

    value: Any
    lines: dict[KeyPath, int]
    """Path of a key or list item -> its line, from 1; below an alias, nothing."""
    problems: list[tuple[int, RecipeError]]
    """(line, problem) that leave the rest readable: duplicate keys, tags, merge keys, keys that are not text."""


def decode(data: bytes, name: str) -> str:
    """Decodes a file's bytes as UTF-8, with or without a byte order mark.

    Raises:
        RecipeError: too large, or not UTF-8 (with the line of the first bad byte).
    """
    if len(data) > MAX_BYTES:
        raise RecipeError(name, f"{len(data)} bytes are too many for a recipe", "is this the right file?")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        found = f"not UTF-8 text (byte 0x{data[error.start]:02x})"
        raise RecipeError(f"{name}:{line}", found, "save the file as UTF-8") from None


def parse(text: str, name: str) -> Document:
    """Reads one YAML document.

    Args:
        text: the document.
        name: what to call it in errors.

    Raises:
        RecipeError: bad syntax, several documents, an alias without anchor, too many or too deep values.
    """
    if bad := _CONTROL.search(text):
        line, column = text.count("\n", 0, bad.start()) + 1, bad.start() - text.rfind("\n", 0, bad.start())
        found = f"control character {bad.group()!r}"
        raise RecipeError(f"{name}:{line}:{column}", found, "remove it, or write it as an escape in double quotes")
    reader = _Reader(name, yaml.parse(text, Loader=_LOADER))
    try:
        value = reader.document()
    except yaml.MarkedYAMLError as error:
        raise _syntax_error(error, text, name) from None
    return Document(value, reader.lines, reader.problems)


def resolve(text: str) -> Any:
    """Value of a plain scalar under the core schema: None, bool, int, float or the text itself.

    Raises:
        ValueError: a number that no float or int can hold.
    """
    if text in _NULL:
        return None
    if text in _BOOL:
        return _BOOL[text]
    if _INT.fullmatch(text):
        if text[:2] in ("0o", "0x"):
            return int(text[2:], 8 if text[1] == "o" else 16)
        return int(text)  # ValueError above 4300 digits
    if _FLOAT.fullmatch(text):
        if not math.isfinite(value := float(text)):
            raise ValueError(f"{text} is too large a number")
        return value
    if match := _INFINITE.fullmatch(text):
        return -math.inf if match.group(1) == "-" else math.inf
    return math.nan if text in _NAN else text


def dump(value: Any) -> str:
    """Writes plain values as YAML that `parse` reads back equal; keys keep their order.

    PyYAML alone would leave text such as `5e-6` unquoted, which is a number here.
    """
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    try:
        plain = isinstance(resolve(text), str)
    except ValueError:
        plain = False
    plain = plain and not _BREAK.search(text)
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if plain else '"')


_Dumper.add_representer(str, _represent_text)


@dataclass
class _Reader:
    """Builds the value from parser events, once, front to back."""

    name: str
    events: Iterator[Any]
    lines: dict[KeyPath, int] = field(default_factory=dict)
    problems: list[tuple[int, RecipeError]] = field(default_factory=list)
    anchors: dict[str, tuple[Any, int]] = field(default_factory=dict)
    """Anchor -> its value and the number of values in it."""
    values: int = 0

    def document(self) -> Any:
        """Reads the whole stream, which must hold one document; None when it holds none."""
        next(self.events)  # stream start
        event = next(self.events)
        if isinstance(event, yaml.StreamEndEvent):
            return None
        value = self.node(next(self.events), ())
        next(self.events)  # document end
        event = next(self.events)
        if not isinstance(event, yaml.StreamEndEvent):
            raise self.stop(event, "a second document starts here", "keep one document: remove the `---`")
        return value

    def node(self, event: Any, path: KeyPath, *, silent: bool = False) -> Any:
        """Reads the node that starts with `event`; a silent one leaves no lines (it was already refused)."""
        if isinstance(event, yaml.AliasEvent):
            return self.alias(event)
        self.count(event, 1)
        if len(path) > MAX_DEPTH:
            raise self.stop(event, f"nested deeper than {MAX_DEPTH} levels", "a recipe needs six")
        before = self.values
        if event.tag is not None:
            self.note(event, f"the tag `{_short_tag(event.tag)}`", "remove it: a recipe holds plain values only")
        if isinstance(event, yaml.ScalarEvent):
            value = self.scalar(event)
        elif isinstance(event, yaml.SequenceStartEvent):
            value = self.sequence(path, silent=silent)
        else:
            value = self.mapping(path, silent=silent)
        if event.anchor is not None:
            self.anchors[event.anchor] = (value, self.values - before + 1)
        return value

    def scalar(self, event: Any) -> Any:
        """A quoted scalar is text; a plain one (its tag refused) is what the core schema says."""
        if event.style:  # quotes, or a block
            return event.value
        try:
            return resolve(event.value)
        except ValueError:
            raise self.stop(event, f"{event.value[:20]}… is too large a number", "") from None

    def sequence(self, path: KeyPath, *, silent: bool) -> list[Any]:
        """Reads the items up to the end of a list."""
        items: list[Any] = []
        while not isinstance(event := next(self.events), yaml.SequenceEndEvent):
            here = (*path, len(items))
            if not silent:
                self.lines[here] = event.start_mark.line + 1
            items.append(self.node(event, here, silent=silent))
        return items

    def mapping(self, path: KeyPath, *, silent: bool) -> dict[str, Any]:
        """Reads the pairs up to the end of a mapping; a refused key is noted and its value skipped."""
        pairs: dict[str, Any] = {}
        first: dict[str, int] = {}
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            key = self.node(event, (*path, "?"), silent=True)
            line = event.start_mark.line + 1
            refused = self.refuse_key(event, key, first)
            if not refused:
                first[key] = line
                if not silent:
                    self.lines[(*path, key)] = line
            value = self.node(next(self.events), (*path, str(key)), silent=silent or refused)
            if not refused:
                pairs[key] = value
        return pairs

    def refuse_key(self, event: Any, key: Any, first: dict[str, int]) -> bool:
        """Notes what is wrong with a key and says whether anything is."""
        if not isinstance(key, str):
            shown = "a list or mapping" if isinstance(key, (dict, list)) else f"`{event.value}`, which is not text"
            self.note(event, f"a key is {shown}", "keys are names: put it in quotes if it is one")
        elif key == "<<" and not event.style:
            self.note(event, "merge key `<<` (YAML 1.1)", "repeat the keys, or use an alias for a whole value")
        elif key in first:
            line = event.start_mark.line + 1
            found = f"`{key}` stands twice, on line {first[key]} and on line {line}"
            self.note(event, found, "keep one of the two")
        else:
            return False
        return True

    def alias(self, event: Any) -> Any:
        """Returns the anchored value, and counts it as if it were written out."""
        if event.anchor not in self.anchors:
            todo = "anchor it (`&name`) on an earlier, finished value, or quote the text"
            raise self.stop(event, f"`*{event.anchor}` refers to no anchor before it", todo)
        value, size = self.anchors[event.anchor]
        self.count(event, size)
        return value

    def count(self, event: Any, size: int) -> None:
        """Adds to the number of values and stops at the limit."""
        self.values += size
        if self.values > MAX_VALUES:
            raise self.stop(event, f"more than {MAX_VALUES} values, aliases written out", "this is not a recipe")

    def note(self, event: Any, found: str, todo: str) -> None:
        """Remembers a problem that leaves the rest readable."""
        error = self.stop(event, found, todo)
        self.problems.append((event.start_mark.line + 1, error))

    def stop(self, event: Any, found: str, todo: str) -> RecipeError:
        """Builds the error for an event's place."""
        mark = event.start_mark
        return RecipeError(f"{self.name}:{mark.line + 1}:{mark.column + 1}", found, todo)


def _short_tag(tag: str) -> str:
    return tag.replace("tag:yaml.org,2002:", "!!")


def _syntax_error(error: yaml.MarkedYAMLError, text: str, name: str) -> RecipeError:
    mark = error.problem_mark or error.context_mark
    line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
    rows = text.splitlines()
    row = rows[line - 1] if line <= len(rows) else ""
    found = error.problem or error.context or "not YAML"
    if error.context and error.context_mark and error.context_mark.line + 1 != line:
        found += f" ({error.context} that starts on line {error.context_mark.line + 1})"
    character = row[column - 1 : column]
    found = "a tab in the indentation" if character == "\t" else found
    return RecipeError(f"{name}:{line}:{column}", found, _syntax_remedy(found, row, character))


def _syntax_remedy(found: str, row: str, character: str) -> str:
    if character == "\t":
        return "indent with spaces, not tabs"
    if "cannot start any token" in found:
        return f"put text that starts with {character} in quotes"
    if "${" in row:
        return 'put text with ${NAME} in quotes: "${NAME}"'
    if "mapping values are not allowed" in found:
        return "check the indentation of this line and the one before; put text with `: ` in quotes"
    return "check indentation, quotes and brackets, here and on the lines before"
