"""Rows that a user gives to compare models on: any data file of ours, or rows that a stage kept."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from posttrain.certify.probes import LONGEST, Probe, Probes, read_probes
from posttrain.chat.encode import encoder_of
from posttrain.chat.render import render_conversation, render_pair
from posttrain.chat.templates import ChatTemplate, read_folder_template
from posttrain.chat.tokenizer import load_any_tokenizer
from posttrain.data.read import SourceSpec, read_source
from posttrain.data.shapes import Want
from posttrain.errors import ChatError, UserError
from posttrain.pretraining.rows import IGNORE

MOST = 64
"""Rows of a file that are read: a certificate is about files, not about data."""


def read_given_rows(file: Path, folder: Path) -> Probes:
    """Reads rows and renders them with the tokenizer (and for conversations the template) of a model folder.

    Raises:
        UserError: no such file, rows of no known shape, conversations for a model without a template.
    """
    if not file.is_file():
        raise UserError(f"--rows {file}", "no such file", "give JSON lines of texts, conversations or pairs")
    if file.suffix == ".json" and file.read_bytes()[:1024].lstrip().startswith(b'{"source"'):
        return read_probes(file)
    want = _want(file)
    rows = read_source(SourceSpec(file), want, MOST).rows
    tokenizer, template = load_any_tokenizer(folder), None
    if want != "text":
        template = read_folder_template(folder)
        if template is None:
            raise ChatError(str(folder), f"has no chat template, and {file} holds conversations", "give texts")
    probes = [Probe(ids[:LONGEST], labels[:LONGEST]) for ids, labels in _rendered(rows, want, tokenizer, template)]
    probes = [probe for probe in probes if len(probe.ids) > 1]
    if not probes:
        raise UserError(f"--rows {file}", "holds no row of two tokens", "give longer texts")
    return Probes("given", probes)


def _want(file: Path) -> Want:
    """What a file's first rows hold, by their columns; `read_source` refuses what they are not."""
    columns = {name for row in read_source(SourceSpec(file), "raw", MOST).rows for name in row.fields}
    if {"chosen", "rejected"} <= columns:
        return "pair"
    return "text" if "text" in columns else "chat"


def _rendered(
    rows: list[Any], want: Want, tokenizer: Any, template: ChatTemplate | None
) -> Iterator[tuple[list[int], list[int]]]:
    """(ids, labels) of each row: the loss of a text is on all of it, else on the (better) answers."""
    for row in rows:
        if template is None:
            ids = encoder_of(tokenizer).encode_at(row.text, []).ids
            yield ids, ids
        elif want == "chat":
            rendered = render_conversation(tokenizer, template, row.messages, row.tools)
            yield rendered.input_ids, rendered.labels
        else:
            prompt, chosen, _ = render_pair(tokenizer, template, row.prompt, row.chosen, row.rejected, row.tools)
            yield prompt + chosen, [IGNORE] * len(prompt) + chosen
