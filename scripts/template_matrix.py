"""Proves every bundled chat template with every real tokenizer that has, or can be given, its tokens.

    python scripts/template_matrix.py [--out docs/template-matrix.md] [--conversations 200]
                                      [--templates chatml ...] [--tokenizers qwen2 ...] [--processes 2]

For each pair, on generated conversations that the template takes: the text is the same with and without
generation marks; the ids are those of transformers' `apply_chat_template`; what is trained is exactly what
the assistant says and the token that ends its turn (found by searching the text, not by the code that made
the mask); and the tokenizer saved with template and generation config, and loaded again, stops at that
token. Whether earlier turns stay when turns follow is reported, and compared with the template's facts.

Tokenizers lie in `$POSTTRAIN_SHARED/tokenizers` (default: `../shared/tokenizers`), one folder each; tokens
that a template needs and a tokenizer lacks are added to a copy of it. Exit code 1 when anything fails.
"""

from __future__ import annotations

import argparse
import copy
import os
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise, repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unicodedata import normalize

from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

from posttrain.chat.contract import agree, probe_ids, verify_saved
from posttrain.chat.corpus import Conversation, conversations
from posttrain.chat.render import MASKED, Rendered, render_turns
from posttrain.chat.templates import ChatTemplate, load_template
from posttrain.chat.tokenizer import load_any_tokenizer
from posttrain.chat.turns import required_tokens_missing
from posttrain.errors import ChatError
from posttrain.recipe.bundled import list_bundled

ROOT = Path(__file__).resolve().parent.parent
SEED = 3
_MOST_DRAWN = 8  # times the conversations wanted, to find as many that a template takes
_NAMED = {"eos_token": ("<|end_of_text|>", "<|endoftext|>", "</s>"), "bos_token": ("<|begin_of_text|>", "<s>")}
"""What a tokenizer without eos or bos token gets: the first that it has, else the last, added."""
_MARK = re.compile(r"n\d+[bdfg]\.")
"""The word that only one text of a generated conversation has."""
_THINK = re.compile(r"</?think>")
_Stretch = tuple[str, str, bool]
_QUESTION = [{"role": "user", "content": "¿Qué es l·l?"}]


@dataclass
class Cell:
    """What was found for one template with one tokenizer."""

    template: str
    tokenizer: str
    skipped: str = ""
    added: list[str] = field(default_factory=list)
    taken: int = 0
    """Conversations that were rendered."""
    refused: int = 0
    """Conversations on which the template raises."""
    declined: list[str] = field(default_factory=list)
    """Why conversations cannot be trained on that the template renders: it leaves something out, say."""
    rows: int = 0
    answers: int = 0
    equal_ids: int = 0
    cut: int = 0
    """Rows with answers that would have joined the prompt's last token, where our ids must differ."""
    kept: int = 0
    rewritten: int = 0
    """Conversations of more than one user turn whose beginnings stay, or not, when turns follow."""
    failures: list[str] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        """For the table."""
        if self.skipped:
            return f"– {self.skipped}"
        return f"**{len(self.failures)} failures**" if self.failures else f"ok{'+' if self.added else ''}"


def tokens_to_add(tokenizer: PreTrainedTokenizerFast, template: ChatTemplate) -> dict[str, list[str]]:
    """The special tokens, by kind, that a template needs and a tokenizer lacks; every tokenizer gets an eos token."""
    have = {token.content for token in tokenizer.added_tokens_decoder.values()}
    missing = required_tokens_missing(tokenizer, template)
    wanted: dict[str, list[str]] = {}
    for name, known in _NAMED.items():
        if name in missing or (name == "eos_token" and tokenizer.eos_token is None):
            wanted[name] = [next((text for text in known if text in have), known[-1])]
    others = [text for text in missing if text not in _NAMED]
    return wanted | ({"additional_special_tokens": others} if others else {})


def fit(tokenizer: PreTrainedTokenizerFast, wanted: dict[str, list[str]], known: dict[str, Any]) -> Any:
    """Returns a copy of a tokenizer with some tokens; `known` keeps copies, for copying takes a second."""
    if str(wanted) not in known:
        fitted = known[str(wanted)] = copy.deepcopy(tokenizer)
        named = {name: texts[0] if name in _NAMED else texts for name, texts in wanted.items()}
        fitted.add_special_tokens(named, replace_extra_special_tokens=False)
    return known[str(wanted)]


def takes(template: ChatTemplate, conversation: Conversation) -> bool:
    """Whether a conversation is one that a template's facts say it takes."""
    facts, roles = template.facts, [message["role"] for message in conversation.messages]
    if facts.roles and not set(roles) <= set(facts.roles):
        return False
    if facts.order != "free" and "system" in roles[1:]:
        return False
    turns = [role for role in roles if role in ("user", "assistant")]
    mixed = any(a == b for a, b in pairwise(turns)) or turns[:1] == ["assistant"]
    return facts.order != "alternating" or "tool" in roles or not mixed


def corpus(template: ChatTemplate, count: int) -> list[Conversation]:
    """Generated conversations that a template's facts say it takes."""
    facts = template.facts
    wanted = {"system": facts.system not in ("refused", "unknown"), "tools": facts.tools is True}
    drawn = conversations(_MOST_DRAWN * count, SEED, thinking=facts.thinking is True, **wanted)
    return [conversation for conversation in drawn if takes(template, conversation)]


def check_pair(
    template: ChatTemplate, name: str, tokenizer: PreTrainedTokenizerFast, count: int, known: dict[str, Any]
) -> Cell:
    """Checks one template with one tokenizer on `count` conversations; `known` is for `fit`."""
    wanted = tokens_to_add(tokenizer, template)
    cell = Cell(template.name, name, added=[text for texts in wanted.values() for text in texts])
    fitted = fit(tokenizer, wanted, known)
    if missing := required_tokens_missing(fitted, template):
        cell.skipped = f"cannot be given {', '.join(missing)}"
        return cell
    stop = fitted.convert_tokens_to_ids(_stop_text(fitted, template))
    for conversation in corpus(template, count):
        if cell.taken == count:
            break
        try:
            texts = [_text(fitted, source, conversation) for source in (template.inference, template.source)]
        except Exception:  # whatever a template raises is its refusal; that too many are refused is a failure
            cell.refused += 1
            continue
        try:
            rows = render_turns(fitted, template, conversation.messages, conversation.tools)
        except ChatError as error:
            must = _is_plain(conversation) and error.where != "tokenizer"
            (cell.failures if must else cell.declined).append(f"{error.where}: {error.found}")
            continue
        cell.taken += 1
        if texts[0] != texts[1]:
            cell.failures.append("the text differs with and without marks")
        _check_history(cell, fitted, template, conversation, texts[0])
        _check_rows(cell, fitted, template, conversation, rows, texts[0], stop)
    if cell.taken < count:
        others = f"{cell.refused} are refused, {len(cell.declined)} cannot be trained on"
        cell.failures.append(f"only {cell.taken} conversations are rendered; {others}")
    _check_facts(cell, template)
    given = {name: getattr(fitted, name) for name in ("eos_token", "bos_token", "pad_token", "chat_template")}
    _check_saved(cell, fitted, template, stop)
    for attribute, value in given.items():  # saving made them follow the template; the next one starts afresh
        setattr(fitted, attribute, value)
    return cell


def _stop_text(tokenizer: PreTrainedTokenizerFast, template: ChatTemplate) -> str:
    """The token that ends a turn, by the template's facts."""
    return str(tokenizer.eos_token) if template.facts.stop[0] == "eos_token" else template.facts.stop[0]


def _text(tokenizer: PreTrainedTokenizerFast, source: str, conversation: Conversation, **more: Any) -> Any:
    """A conversation's text, or ids with `tokenize`, as transformers renders it."""
    options = {"tools": conversation.tools, "chat_template": source, "tokenize": False, **more}
    return tokenizer.apply_chat_template(conversation.messages, **options)


def _is_plain(conversation: Conversation) -> bool:
    """Whether a conversation is what every template must take: user and assistant in turn, nothing but contents."""
    roles = [message["role"] for message in conversation.messages]
    turns = roles[1:] if roles[0] == "system" else roles
    in_turn = all(role == ("user", "assistant")[number % 2] for number, role in enumerate(turns))
    inside = any("</think>" in message["content"] for message in conversation.messages)
    return in_turn and conversation.tools is None and not inside and all(len(one) == 2 for one in conversation.messages)


def _shape(conversation: Conversation) -> str:
    return "(" + " ".join(message["role"] for message in conversation.messages) + ")"


def _check_history(
    cell: Cell, tokenizer: PreTrainedTokenizerFast, template: ChatTemplate, conversation: Conversation, text: str
) -> None:
    """Counts whether every beginning of a conversation, up to its last end of turn, is the beginning of its text."""
    later = [number for number, one in enumerate(conversation.messages) if number and one["role"] == "user"]
    stop, kept = _stop_text(tokenizer, template), True
    if not later:
        return
    for number in later:
        first = Conversation(conversation.messages[:number], conversation.tools)
        try:
            beginning = _text(tokenizer, template.inference, first)
        except Exception:  # a beginning that the template refuses says nothing about history
            continue
        kept = kept and text.startswith(beginning[: beginning.rfind(stop) + len(stop)])
    cell.kept, cell.rewritten = cell.kept + kept, cell.rewritten + (not kept)


def _check_rows(
    cell: Cell,
    tokenizer: PreTrainedTokenizerFast,
    template: ChatTemplate,
    conversation: Conversation,
    rows: Sequence[Rendered],
    whole: str,
    stop: int,
) -> None:
    """Checks ids and masks of a conversation's rows: one row with all answers, or one per answer up to it."""
    answers = [number for number, one in enumerate(conversation.messages) if one["role"] == "assistant"]
    parts = [(len(conversation.messages), answers)] if rows[0].text == whole else [(at + 1, [at]) for at in answers]
    if len(rows) != len(parts):
        cell.failures.append(f"{len(rows)} rows for {len(answers)} answers {_shape(conversation)}")
        return
    for row, (end, wanted) in zip(rows, parts, strict=True):
        part = Conversation(conversation.messages[:end], conversation.tools)
        cell.rows, cell.answers = cell.rows + 1, cell.answers + len(wanted)
        text = _text(tokenizer, template.inference, part)
        same = row.input_ids == _text(tokenizer, template.inference, part, tokenize=True, return_dict=False)
        cell.equal_ids, cell.cut = cell.equal_ids + same, cell.cut + bool(row.straddled)
        if row.text != text:
            cell.failures.append(f"another text than transformers' {_shape(part)}")
        elif not same and not row.straddled:
            cell.failures.append(f"other ids than transformers' {_shape(part)}")
        trained = list(_trained(tokenizer, row, text, stop))
        found = _judge(trained, [part.messages[number] for number in wanted], template, tokenizer)
        cell.failures += [f"{one} {_shape(part)}" for one in found]


def _trained(tokenizer: PreTrainedTokenizerFast, row: Rendered, text: str, stop: int) -> Iterator[_Stretch]:
    """Yields what stands before each trained stretch, the stretch, and whether it ends with the stop token.

    The text is cut by the tokenizer's own offsets; decoded where our ids are not those of the whole text.
    """
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    same, offsets = encoded["input_ids"] == row.input_ids, encoded["offset_mapping"]
    first = None
    for at, label in enumerate([*row.labels, MASKED]):
        if label != MASKED and first is None:
            first = at
        if first is not None and (label in (MASKED, stop)):
            last = at if label == stop else at - 1
            stopped = row.input_ids[last] == stop
            if same:
                yield text[: offsets[first][0]], text[offsets[first][0] : offsets[last][1]], stopped
            else:
                some = row.input_ids[: last + 1]
                parts = (
                    tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in (some[:first], some[first:])
                )
                yield *parts, stopped
            first = None


def _judge(
    trained: list[_Stretch], answers: list[dict[str, Any]], template: ChatTemplate, tokenizer: PreTrainedTokenizerFast
) -> Iterator[str]:
    """Yields what is wrong with the trained stretches of a row, by what its assistant messages say."""
    if len(trained) != len(answers):
        yield f"{len(trained)} trained stretches for {len(answers)} answers"
        return
    stop, asked = _stop_text(tokenizer, template), Conversation(_QUESTION, None)
    prompt = _text(tokenizer, template.inference, asked, add_generation_prompt=True)
    opening = prompt[len(_text(tokenizer, template.inference, asked)) :].rstrip()
    for (before, stretch, stopped), answer in zip(trained, answers, strict=True):
        said, end = stretch.rstrip(), stop.strip()  # a token may eat the white space after it
        if not stopped or not said.endswith(end):
            yield f"a trained stretch does not end with the end of turn: {stretch[-30:]!r}"
            continue
        if not before.rstrip().endswith(opening):
            yield f"a trained stretch does not begin where a generation prompt ends: {before[-30:]!r}"
        said, content = (normalize("NFC", one) for one in (said.removesuffix(end), answer["content"]))  # as Qwen's do
        more = str([answer.get(key) for key in ("reasoning_content", "tool_calls")])
        if set(_MARK.findall(said)) - set(_MARK.findall(content + more)):
            yield f"other texts are trained: {stretch[:60]!r}"
        elif any(part.strip() not in said for part in _THINK.split(content)):
            yield f"an answer is not trained whole: {stretch[:60]!r}"
        elif len(answer) == 2 and not template.facts.thinking and not _is(said, content, template, tokenizer):
            yield f"{stretch[:60]!r} is trained for {content[:60]!r}"


def _is(said: str, content: str, template: ChatTemplate, tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether what is trained is the content: trimmed where the template trims, after a space where it writes one."""
    eats = any(token.rstrip for token in tokenizer.added_tokens_decoder.values())  # Phi-3's eat what follows them
    if template.facts.trims or eats:
        return said.strip() == content.strip()
    return said in (content, f" {content}", content.removeprefix(" "))  # offsets may leave a first space out


def _check_facts(cell: Cell, template: ChatTemplate) -> None:
    found = "rewritten" if cell.rewritten else "kept"
    if template.facts.history != found:
        cell.failures.append(f"facts say that history is {template.facts.history}; it is {found}")


def _check_saved(cell: Cell, tokenizer: PreTrainedTokenizerFast, template: ChatTemplate, stop: int) -> None:
    """Saves tokenizer, template and generation config, loads them again, and asks whether generation would stop."""
    rows = -(-len(tokenizer) // 64) * 64
    config, generation = LlamaConfig(vocab_size=rows, eos_token_id=None), GenerationConfig()
    prompt = {"add_generation_prompt": True, "return_dict": False}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        try:
            before = tokenizer.apply_chat_template(_QUESTION, chat_template=template.inference, **prompt)
            agree(tokenizer, template, config, generation)
            tokenizer.save_pretrained(folder)
            (folder / "chat_template.jinja").write_text(template.inference, encoding="utf-8")
            generation.save_pretrained(folder)
            verify_saved(folder, template.digest, {stop}, probe_ids(tokenizer, template))
            again = load_any_tokenizer(folder)
            stops = GenerationConfig.from_pretrained(folder).eos_token_id
        except ChatError as error:
            cell.failures.append(f"saved: {error}")
            return
    if stop not in stops:
        cell.failures.append(f"saved: the stop set {stops} lacks the end of turn {stop}")
    if again.apply_chat_template(_QUESTION, **prompt) != before:
        cell.failures.append("saved: the prompt has other ids when loaded again")


def check_tokenizer(folder: Path, templates: Sequence[str], count: int) -> list[Cell]:
    """Checks every template with one folder's tokenizer."""
    tokenizer, cells = load_any_tokenizer(folder), []
    known: dict[str, Any] = {}
    for name in templates:
        cells.append(check_pair(load_template(name, Path()), folder.name, tokenizer, count, known))
        print(f"{folder.name:14} {name:20} {cells[-1].verdict}", file=sys.stderr, flush=True)
    return cells


def table(cells: Sequence[Cell], seconds: float, count: int) -> str:
    """The matrix and its details as Markdown."""
    tokenizers = list(dict.fromkeys(cell.tokenizer for cell in cells))
    templates = list(dict.fromkeys(cell.template for cell in cells))
    found = {(cell.template, cell.tokenizer): cell for cell in cells}
    lines = [
        "# Template matrix",
        "",
        f"`scripts/template_matrix.py`: {len(cells)} pairs, {count} generated conversations each, {seconds:.0f} s.",
        "`ok+`: tokens that the tokenizer lacks were added to a copy of it.",
        "",
        f"| template | {' | '.join(tokenizers)} |",
        f"|---|{'---|' * len(tokenizers)}",
    ]
    lines += [f"| {name} | {' | '.join(found[name, one].verdict for one in tokenizers)} |" for name in templates]
    lines += ["", "| template | history | rows | answers | ids as transformers' | answers cut from the prompt |"]
    lines += ["|---|---|---|---|---|---|"]
    for name in templates:
        mine = [cell for cell in cells if cell.template == name]
        sums = {key: sum(getattr(cell, key) for cell in mine) for key in ("rows", "answers", "equal_ids", "cut")}
        kept, rewritten = sum(cell.kept for cell in mine), sum(cell.rewritten for cell in mine)
        history = f"rewritten in {rewritten} of {kept + rewritten}" if rewritten else "kept"
        lines += [f"| {name} | {history} | {' | '.join(f'{number:,}' for number in sums.values())} |"]
    lines += ["", "Conversations that a template renders and that cannot be trained on, with how many:", ""]
    reasons = [re.split("['\"]", re.sub(r", message \d+", "", one))[0] for cell in cells for one in cell.declined]
    lines += [f"* {reason} ({times})" for reason, times in Counter(reasons).most_common()]
    for cell in cells:
        for failure in dict.fromkeys(cell.failures):
            lines += ["", f"* {cell.template} with {cell.tokenizer}: {failure} ({cell.failures.count(failure)} times)"]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = Path(os.environ.get("POSTTRAIN_SHARED", ROOT.parent / "shared")) / "tokenizers"
    parser.add_argument("--out", type=Path, help="write the table here too")
    parser.add_argument("--conversations", type=int, default=200, metavar="N")
    parser.add_argument("--templates", nargs="+", default=list_bundled("chat_templates"), metavar="NAME")
    parser.add_argument("--tokenizers", nargs="+", metavar="NAME")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, metavar="N")
    options = parser.parse_args(arguments)
    folders = sorted(path for path in shared.glob("*/") if not options.tokenizers or path.name in options.tokenizers)
    began = time.monotonic()
    with ProcessPoolExecutor(options.processes, get_context("spawn")) as pool:
        columns = pool.map(check_tokenizer, folders, repeat(options.templates), repeat(options.conversations))
        cells = [cell for column in columns for cell in column]
    page = table(cells, time.monotonic() - began, options.conversations)
    print(page)
    if options.out:
        options.out.write_text(page, encoding="utf-8")
    return 1 if not cells or any(cell.failures for cell in cells) else 0


if __name__ == "__main__":
    sys.exit(main())
