"""Tries templates that we did not write: those that the installed TRL ships, our verdicts beside TRL's.

    python scripts/trl_templates.py [--out docs/trl-templates.md] [--only qwen]

Each template gets a small tokenizer that has, as one token each, what looks like a control token in its
text. For every template that renders a text conversation: how our mask is found (or why there is none), what
the doctor finds, what TRL's own checks say, and why the two differ wherever they do, computed from what
was rendered. Exit code 1 when a difference has no explanation, or a mask is not answer + end of turn.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import jinja2
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from posttrain.chat.jinja import render_text
from posttrain.chat.marking import mark
from posttrain.chat.render import MASKED, Rendered, render_turns
from posttrain.chat.templates import ChatTemplate, own_template
from posttrain.chat.turns import end_of_turn
from posttrain.doctor.behaviour import behaviour, missing_tools
from posttrain.doctor.probes import ANSWER, LAST, NEXT, REASON, RESULT, TOOL, USER, Probes, call
from posttrain.errors import ChatError

CHAT = [USER, ANSWER, NEXT, LAST]
THOUGHT = {**ANSWER, "reasoning_content": REASON}
EXCHANGE = [USER, call({"key": "Sentinelkey"}), RESULT]
"""What TRL's own test of history looks at: one call, and its result."""
KINDS: dict[str, tuple[list[dict[str, Any]], bool]] = {
    "": (CHAT, False),
    "reasoning": ([USER, THOUGHT, NEXT, {**LAST, "reasoning_content": REASON}], False),
    "tools": ([*EXCHANGE, LAST], True),
}
"""Conversations in which history may be rewritten, and whether they have tools."""
_CONTROL = re.compile(
    r"<\|[^<>|\s'\"{}]{1,40}\|?>|<[^<>|\s'\"{}/]{1,40}\|>|<｜[^｜<>'\"]{1,40}｜>|\[/?[A-Z_]{3,30}\]|\[gMASK\]|</?[A-Za-z_]{2,40}>"
)
_SPECIAL = re.compile(r"<\||\|>|<｜|^\[|turn|utterance")
"""Tells a special token from markup that models write themselves (`<think>`, `<tool_call>`)."""


@dataclass
class Verdicts:
    """What was found for one template, by us and by TRL."""

    mask: str = ""
    rows: list[Rendered] = field(default_factory=list)
    trained: list[str] = field(default_factory=list)
    """What our mask trains of `CHAT`; empty where we refuse."""
    openings: list[str] = field(default_factory=list)
    """What the template writes between a prompt and the text of its answer: the model writes it too."""
    refusal: str = ""
    findings: dict[str, str] = field(default_factory=dict)
    """The doctor's findings of behaviour: id to cause."""
    rewritten: list[str] = field(default_factory=list)
    """Kinds of conversation (keys of KINDS) whose earlier turns change when turns follow."""
    tools: list[str] = field(default_factory=list)
    """What is missing of a conversation with tools."""
    trl: dict[str, str] = field(default_factory=dict)
    trl_trained: list[str] = field(default_factory=list)
    """What TRL's mask trains of `CHAT`."""
    trl_text: str = ""
    """What TRL renders for training."""


def control_texts(source: str) -> list[str]:
    """Lists what looks like a control token in a template's text."""
    return sorted(set(_CONTROL.findall(source)))


def make_tokenizer(source: str) -> PreTrainedTokenizerFast:
    """Builds a tokenizer of single bytes that has a template's control tokens, a bos (written first) and an eos."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: token for token, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, special=True) for text in ("<s>", "</s>", "<pad>")])
    for text in control_texts(source):
        if backend.token_to_id(text) is None:
            special = bool(_SPECIAL.search(text))
            (backend.add_special_tokens if special else backend.add_tokens)([AddedToken(text, normalized=False)])
    bos = ("<s>", backend.token_to_id("<s>"))
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[bos])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", chat_template=source
    )


def ours(probes: Probes) -> Verdicts:
    """Finds our mask and our verdicts."""
    tokenizer, template, verdicts = probes.tokenizer, probes.template, Verdicts()
    marking = mark(tokenizer, template)
    chosen = marking.template or template
    try:
        verdicts.rows = render_turns(tokenizer, chosen, CHAT)
        verdicts.trained = [text for row in verdicts.rows for text in trained_texts(tokenizer, row)]
        verdicts.mask = "offsets"
        if marking.template is not None:
            verdicts.mask = "its own marks" if chosen.source == template.source else "marks added"
        elif len(verdicts.rows) > 1:
            verdicts.mask = "offsets, a row per answer"
    except ChatError as error:
        verdicts.mask, verdicts.refusal = "refused", error.found
    verdicts.findings = {finding.id: finding.cause for finding in behaviour(probes)}
    verdicts.rewritten = [kind for kind in KINDS if _rewrites(probes, chosen, kind)]
    verdicts.openings = [_opening(probes, CHAT[:count]) for count in (2, 4)] if verdicts.trained else []
    # Rows that are read have arguments as an object, whatever the data's spelling.
    verdicts.tools = [part for part in missing_tools(probes) if "are a string" not in part]
    return verdicts


def _opening(probes: Probes, messages: list[dict[str, Any]]) -> str:
    prompt, text = probes.text(messages[:-1], prompt=True) or "", probes.text(messages) or ""
    return text[len(prompt) : text.rindex(str(messages[-1]["content"]))]


def trained_texts(tokenizer: PreTrainedTokenizerFast, row: Rendered) -> list[str]:
    """Decodes each run of trained tokens."""
    runs = groupby(zip(row.labels, row.input_ids, strict=True), key=lambda pair: pair[0] != MASKED)
    return [tokenizer.decode([token for _, token in run]) for trained, run in runs if trained]


def _rewrites(probes: Probes, template: ChatTemplate, kind: str) -> bool:
    messages, tools = KINDS[kind]
    try:
        rows = render_turns(probes.tokenizer, template, messages, [TOOL] if tools else None)
    except ChatError as error:
        return "history" in error.found or "only when something follows" in error.found
    return len(rows) > 1


def theirs(tokenizer: PreTrainedTokenizerFast, verdicts: Verdicts) -> None:
    """Adds TRL's verdicts, and the mask that `assistant_only_loss` would train."""
    from trl import chat_template_utils as trl  # late: seven seconds

    source = str(tokenizer.chat_template)
    try:
        training = trl.get_training_chat_template(tokenizer)
        verdicts.trl["training"] = "none needed" if training is None else "a twin"
    except (ValueError, TypeError, jinja2.TemplateError) as error:
        training = None
        verdicts.trl["training"] = type(error).__name__
    checks = {
        "markers": lambda: trl.has_generation_markers(source),
        "prefix": lambda: trl.is_chat_template_prefix_preserving(tokenizer),
        "stop": lambda: trl.is_chat_template_stop_token_trained(tokenizer, training),
        "tools": lambda: trl.supports_tool_calling(tokenizer),
    }
    for name, check in checks.items():
        try:
            verdicts.trl[name] = "yes" if check() else "no"
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            verdicts.trl[name] = type(error).__name__
    if verdicts.trl["training"] in ("a twin", "none needed"):
        row = tokenizer.apply_chat_template(
            CHAT, chat_template=training, return_dict=True, return_assistant_tokens_mask=True
        )
        labels = [token if on else MASKED for token, on in zip(row["input_ids"], row["assistant_masks"], strict=True)]
        verdicts.trl_text = tokenizer.decode(row["input_ids"])
        verdicts.trl_trained = trained_texts(tokenizer, Rendered("", row["input_ids"], labels, [], 0))


# --- why they differ ---


def differences(probes: Probes, verdicts: Verdicts) -> list[str]:
    """Explains every difference between our verdicts and TRL's; "?" stands before one without explanation."""
    return [*_of_masks(probes, verdicts), *_of_stop(verdicts), *_of_history(probes, verdicts), *_of_tools(verdicts)]


def _of_masks(probes: Probes, verdicts: Verdicts) -> Iterator[str]:
    mine, others = verdicts.trained, verdicts.trl_trained
    if verdicts.refusal:
        if others:
            yield f"mask: we refuse; TRL trains {others[-1]!r} all the same"
        return
    if not others:
        yield "mask: TRL has none, it knows templates by their exact text and this one has no training twin"
        return
    if verdicts.trl_text != probes.text(CHAT):
        yield "mask: TRL trains on other text than the template that is saved writes at inference"
    if len(mine) != len(others):
        yield f"? mask: TRL trains {others!r}, we {mine!r}"
        return
    yield from dict.fromkeys(
        reason for pair in zip(mine, others, strict=True) if pair[0] != pair[1] for reason in _beside(*pair)
    )


def _beside(mine: str, other: str) -> Iterator[str]:
    """Says what TRL trains beside an answer and its end of turn."""
    front, found, back = other.partition(mine)
    if not found and mine.startswith(other):
        yield f"mask: TRL does not train the end of turn {mine[len(other) :]!r}"
    elif not found:
        yield f"? mask: TRL trains {other!r}, we {mine!r}"
    if found and front.strip():
        yield f"mask: TRL trains {front!r}, which the template writes before every answer"
    elif found and front:
        yield f"mask: TRL opens the marks before the end of the header, {front!r}"
    if found and back.strip():
        yield f"mask: TRL trains {back!r} after the end of turn"
    elif found and back:
        yield f"mask: TRL trains the white space after the end of turn, {back!r}"


def _of_stop(verdicts: Verdicts) -> Iterator[str]:
    stop, trained = verdicts.trl["stop"] == "yes", bool(verdicts.trained)
    if trained and not stop:
        if not verdicts.trl_trained:
            yield "stop: TRL finds no marks to look at; our mask ends with the end of turn"
        elif verdicts.trl_trained[0] != verdicts.trained[0]:
            yield "stop: TRL's marks end before the end of turn, ours hold it"
        else:
            yield "? stop: TRL says no"
    if stop and not trained:
        yield "stop: TRL looks at the last token of its marks alone; we have no mask"


def _of_history(probes: Probes, verdicts: Verdicts) -> Iterator[str]:
    says = verdicts.trl["prefix"]
    if says not in ("yes", "no"):
        yield f"history: TRL's test of a tool exchange ends in the template's {says}"
    elif says == "yes" and verdicts.rewritten:
        kinds = " and ".join(kind or "ordinary turns" for kind in verdicts.rewritten)
        yield f"history: TRL tests one tool exchange only; rewritten with {kinds}"
    elif says == "no" and not verdicts.rewritten:
        yield _why_not_prefix(probes)


def _why_not_prefix(probes: Probes) -> str:
    """Explains TRL's "no" where nothing is rewritten for us, from the two texts that it compares."""
    before, after = probes.text(EXCHANGE[:2]), probes.text(EXCHANGE, prompt=True)
    if before is None or after is None:
        return "history: the template refuses TRL's tool exchange"
    at = next((i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), len(before))
    end = probes.end
    if end is not None and end.text in before[:at][-len(end.text) - 1 :]:
        return f"history: TRL counts {before[at:]!r}, which closes the whole text after the end of turn"
    if not probes.has(str(RESULT["content"]), EXCHANGE, tools=True):
        return "history: TRL tests a tool exchange, which the template does not write"
    return f"? history: {before[at : at + 30]!r} becomes {after[at : at + 30]!r}"


def _of_tools(verdicts: Verdicts) -> Iterator[str]:
    says, missing = verdicts.trl["tools"] == "yes", verdicts.tools
    if says and missing:
        if any("are an object" in part for part in missing):
            yield "tools: TRL takes calls whose arguments are JSON text for enough; objects fail"
        if any(part.startswith("the tools") for part in missing):
            yield "tools: TRL looks at calls and results; the tools on offer are left out"
    if not says and not missing:
        yield "? tools: TRL says no"


# --- the table ---


def examine(path: Path) -> tuple[Probes, Verdicts] | str:
    """Compares the verdicts on one template, or says why it renders no text conversation."""
    source = path.read_bytes().decode()
    tokenizer = make_tokenizer(source)
    template = own_template(source, str(path))
    if template is None:
        return "is empty"
    probes = Probes(tokenizer, ChatTemplate(path.stem, template.source))
    try:
        text = render_text(tokenizer, probes.template, [USER, ANSWER])
    except ChatError as error:
        return error.found
    if USER["content"] not in text or ANSWER["content"] not in text:
        return "leaves out contents that are text: it wants lists of parts"
    verdicts = ours(probes)
    theirs(tokenizer, verdicts)
    return probes, verdicts


def wrong_mask(probes: Probes, verdicts: Verdicts) -> str:
    """Says what a mask trains that is not an answer, from its prompt to its end of turn; "" = nothing."""
    if verdicts.refusal:
        return ""
    end = end_of_turn(probes.tokenizer, probes.template).text
    answers = zip(verdicts.openings, (ANSWER, LAST), strict=True)
    expected = [f"{opening}{answer['content']}{end}" for opening, answer in answers]
    return "" if verdicts.trained == expected else f"trains {verdicts.trained!r}, not {expected!r}"


def table_row(name: str, verdicts: Verdicts, why: list[str]) -> str:
    """One line of the table."""
    found, trl = verdicts.findings, verdicts.trl
    history = "kept" if not verdicts.rewritten else f"rewritten ({', '.join(k or 'turns' for k in verdicts.rewritten)})"
    system = next((found[id] for id in ("system-refused", "system-dropped") if id in found), "kept")
    prompt = next((id.removeprefix("generation-prompt-") for id in found if id.startswith("generation-")), "prefix")
    opening = f", from {verdicts.openings[-1]!r} on" if any(verdicts.openings) else ""
    cells = [
        name,
        f"refused: {verdicts.refusal}" if verdicts.refusal else verdicts.mask + opening,
        "yes" if verdicts.trained else "no",
        history,
        system,
        prompt,
        "no" if verdicts.tools else "yes",
        *(trl[key] for key in ("markers", "prefix", "stop", "tools", "training")),
        "<br>".join(why) or "none",
    ]
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def main(arguments: list[str]) -> int:
    """Writes the table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="file for the table; default: standard output")
    parser.add_argument("--only", default="", help="regular expression for names of templates")
    options = parser.parse_args(arguments)
    found = importlib.util.find_spec("trl")
    if found is None or found.origin is None:
        print("trl is not installed", file=sys.stderr)
        return 2
    head = "template | our mask | stop trained | history | system | prompt | tools"
    head += " | TRL markers | TRL prefix | TRL stop | TRL tools | TRL training template | differences, explained"
    lines = [f"| {head} |", "|---" * (head.count("|") + 1) + "|"]
    skipped, wrong = [], []
    for path in sorted((Path(found.origin).parent / "chat_templates").glob("*.jinja")):
        if not re.search(options.only, path.stem):
            continue
        result = examine(path)
        if isinstance(result, str):
            skipped.append(f"- {path.stem}: {result}")
            continue
        why = differences(*result)
        lines.append(table_row(path.stem, result[1], why))
        wrong += [f"- {path.stem}: {reason}" for reason in [wrong_mask(*result)] if reason]
        wrong += [f"- {path.stem}: {reason}" for reason in why if reason.startswith("?")]
    lines += ["", f"{len(lines) - 2} templates. Not text conversations, so not in the table:", "", *skipped]
    lines += ["", f"Wrong masks and unexplained differences: {len(wrong)}.", *wrong]
    text = "\n".join(lines) + "\n"
    if options.out is None:
        print(text, end="")
    else:
        options.out.write_text(text, encoding="utf-8")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
