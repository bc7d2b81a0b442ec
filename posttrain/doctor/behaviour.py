"""Defects of how a template behaves: what it refuses, drops, adds, trims, moves.

What a bundled template's facts file declares is a note; anything else has the catalogue's severity.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

from posttrain.chat.jinja import Message
from posttrain.doctor.catalogue import Finding, found
from posttrain.doctor.probes import ANSWER, LAST, NEXT, REASON, RESULT, SYSTEM, TOOL, USER, Probes, call

_LATER: Message = {"role": "system", "content": "Sentinellater"}
_SPACED: list[Message] = [
    {"role": "user", "content": "\n  Sentinelone\n  "},
    {"role": "assistant", "content": "\n  Sentineltwo\n  "},
]
_THOUGHT: Message = {**ANSWER, "reasoning_content": REASON}
_INLINE: Message = {"role": "assistant", "content": f"<think>\n{REASON}\n</think>\n\nSentineltwo"}
_ORDERS: dict[str, list[Message]] = {
    "two users in a row": [USER, NEXT],
    "an assistant first": [ANSWER, USER],
    "two assistants in a row": [USER, ANSWER, LAST],
    "a system message in the middle": [USER, ANSWER, _LATER, NEXT],
}
BYTE_ORDER_MARK = "\ufeff"
"""What some editors write first into a file: a template renders it."""
_INDENTED = re.compile(r"\n[ \t]+(?=\S)|\n\s*\n(?=<\||<｜|<\w+_of_|\[[A-Z])")
_ROLE_WORD = re.compile(r"assistant|model|gpt|\bbot\b|\bai\b", re.IGNORECASE)
_REASONING = re.compile(r"reasoning_content|[.']thinking\b|message\.reasoning|\['reasoning'\]")
_TOOLS = re.compile(r"tool_calls|(?:\bif|\bin|\band|\bor|\bnot) tools\b|\btools (?:is|\|)")


def behaviour(probes: Probes) -> Iterator[Finding]:
    """Finds what a template that renders conversations does to them."""
    yield from system(probes)
    yield from additions(probes)
    yield from orders(probes)
    yield from contents(probes)
    yield from generation_prompt(probes)
    yield from history(probes)
    yield from reasoning(probes)
    yield from tools(probes)


def system(probes: Probes) -> Iterator[Finding]:
    """Finds a system message that is refused or dropped."""
    facts = probes.template.facts
    prompt, whole, text = [SYSTEM, USER], [SYSTEM, USER, ANSWER, NEXT, LAST], SYSTEM["content"]
    if refusal := probes.refusal(prompt, prompt=True):
        remedy = "fold the system text into the first user's turn, as --fix makes the template do"
        yield _behaves(
            probes, "system-refused", f"raises on a system message: {refusal}", remedy, facts.system == "refused"
        )
        return
    tries = {
        "in a prompt": probes.has(text, prompt, prompt=True),
        "in a conversation with answers": probes.has(text, [SYSTEM, USER, ANSWER]) and probes.has(text, whole),
    }
    dropped = [where for where, kept in tries.items() if not kept]
    middle = probes.text([USER, ANSWER, _LATER, NEXT])
    if not dropped and middle is not None and _LATER["content"] not in middle:
        dropped = ["in the middle of a conversation"]
    if dropped:
        remedy = "choose a template that keeps it, or fold the system text into the user's turn"
        yield _behaves(probes, "system-dropped", f"leaves the system message out {' and '.join(dropped)}", remedy)


def additions(probes: Probes) -> Iterator[Finding]:
    """Finds texts that nobody asked for: today's date, a system text of the template's own."""
    facts = probes.template.facts
    if _writes_date(probes):
        cause = "writes today's date: the same conversation has other tokens every day"
        yield _behaves(probes, "date-in-template", cause, "fix the date, or remove it", facts.date == "today")
    elif text := default_system(probes):
        shown = text if len(text) <= 60 else f"{text[:57]}..."
        cause = f"without a system message it writes {shown!r}"
        declared = bool(facts.default_system)
        yield _behaves(probes, "system-injected", cause, "give conversations a system message of your own", declared)


def default_system(probes: Probes) -> str:
    """Returns what a template writes before the first user's turn on its own, control tokens left out; "" = nothing."""
    first = probes.start
    turn = probes.between([USER, ANSWER, NEXT], ANSWER, NEXT)
    shared = 0
    while shared < min(len(first), len(turn)) and first[-1 - shared] == turn[-1 - shared]:
        shared += 1
    own = first[: len(first) - shared] if turn else ""
    header = (probes.text([SYSTEM, USER]) or "").partition(SYSTEM["content"])[0].removeprefix(probes.bos)
    if any(character.isalpha() for character in own.removeprefix(header)):
        own = own.removeprefix(header)
    for token in sorted(probes.tokenizer.get_added_vocab(), key=len, reverse=True):
        own = own.replace(token, " ")
    return own.strip() if any(character.isalpha() for character in own) else ""


def _writes_date(probes: Probes) -> bool:
    """Whether the clock shows in a rendering: without the call, its format string stands there instead."""
    source = probes.template.source
    if "strftime_now" not in source:
        return False
    timeless = Probes(probes.tokenizer, replace(probes.template, source=re.sub(r"strftime_now\s*\(", "(", source)))
    return any(probes.text(talk) != timeless.text(talk) for talk in ([USER], [SYSTEM, USER]))


def orders(probes: Probes) -> Iterator[Finding]:
    """Finds orders of roles that are refused; a system message that is refused anywhere is another finding."""
    asked = dict(_ORDERS)
    if probes.refusal([SYSTEM, USER]):
        del asked["a system message in the middle"]
    refused = {name: why for name, talk in asked.items() if (why := probes.refusal(talk))}
    if refused:
        cause = f"raises on {', '.join(refused)}: {next(iter(refused.values()))}"
        declared = probes.template.facts.order not in ("free", "unknown")
        yield _behaves(probes, "roles-refused", cause, "join or leave out such messages in the data", declared)


def contents(probes: Probes) -> Iterator[Finding]:
    """Finds contents that lose their white space, and white space that is none of the contents'."""
    trimmed = [message["role"] for message in _SPACED if not probes.has(message["content"], _SPACED)]
    if trimmed and all(probes.has(str(message["content"]).strip(), _SPACED) for message in _SPACED):
        cause = f"trims what the {' and the '.join(trimmed)} says: code loses its indentation"
        remedy = "expect it, or choose a template that does not for code"
        yield _behaves(probes, "content-trimmed", cause, remedy, bool(probes.template.facts.trims))
    for name, text in (
        ("the first turn", _indentation_at_start(probes)),
        ("a user's turn", _indentation(probes.ending)),
        ("an answer", _indentation(probes.between([USER, ANSWER], USER, ANSWER))),
    ):
        if text:
            remedy = "write {%- and -%} in the template, as --fix does, or leave its white space out"
            yield _behaves(probes, "template-indented", f"writes {text!r} before {name}", remedy)
            return


def _indentation_at_start(probes: Probes) -> str:
    if probes.start.startswith(BYTE_ORDER_MARK):
        return BYTE_ORDER_MARK
    white = probes.start[: len(probes.start) - len(probes.start.lstrip())]
    return white if "\n" in white or len(white) > 1 else ""


def _indentation(text: str) -> str:
    match = _INDENTED.search(text)
    return match[0] if match else ""


def generation_prompt(probes: Probes) -> Iterator[Finding]:
    """Finds a generation prompt that changes nothing, or that is not how the trained text goes on."""
    after = probes.between([USER], USER, NEXT, tail=True)
    prompt = (probes.text([USER], prompt=True) or "").partition(USER["content"])[2]
    trained = probes.between([USER, ANSWER], USER, ANSWER)
    if prompt == after and _ROLE_WORD.search(trained):
        cause = "changes nothing" + ("" if trained != after else ": the header of an answer is always there")
        remedy = "write the header where add_generation_prompt asks for it"
        yield _behaves(probes, "generation-prompt-ignored", f"add_generation_prompt {cause}", remedy)
    elif not f"{trained}{ANSWER['content']}".startswith(prompt):
        cause = f"a prompt goes on with {prompt!r}, a trained text with {trained!r}"
        remedy = "write the same in both places: the model answers after what it was trained after"
        yield _behaves(probes, "generation-prompt-not-prefix", cause, remedy)


def history(probes: Probes) -> Iterator[Finding]:
    """Finds turns that change when turns follow."""
    if (kind := history_kind(probes)) != "kept":
        declared = probes.template.facts.history == "rewritten"
        remedy = "make one row per answer (data.history: split), or choose a template that keeps history"
        yield _behaves(probes, "history-rewritten", kind, remedy, declared)


def history_kind(probes: Probes) -> str:
    """Returns `kept`, or how earlier turns change."""
    for start in ([], [SYSTEM]):
        before, after = probes.closed([*start, USER, ANSWER]), probes.text([*start, USER, ANSWER, NEXT])
        if before is None or after is None or after.startswith(before):
            continue
        at = next((i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), len(after))
        with_system = " with a system message" if start else ""
        return f"{before[at : at + 30]!r} becomes {after[at : at + 30]!r} when a user's turn follows{with_system}"
    return "kept"


def reasoning(probes: Probes) -> Iterator[Finding]:
    """Finds reasoning that is left out: in its own field where the template knows it, or inside the answer's text."""
    kinds = [("the reasoning inside an answer's text", _INLINE)]
    if _REASONING.search(probes.template.source):
        kinds.insert(0, ("reasoning_content", _THOUGHT))
    for name, message in kinds:
        last, earlier = [USER, message], [USER, message, NEXT, LAST]
        kept = {"of the last answer": probes.has(REASON, last), "of earlier answers": probes.has(REASON, earlier)}
        dropped = [where for where, there in kept.items() if not there]
        if dropped:
            cause = f"leaves out {name} {' and '.join(dropped)}"
            remedy = "make one row per answer (data.history: split), or choose a template that keeps it"
            yield _behaves(probes, "reasoning-dropped", cause, remedy, probes.bundled)
            return


def tools(probes: Probes) -> Iterator[Finding]:
    """Finds tools, calls and results that are left out or fail, where the template seems to know tools."""
    if not (_TOOLS.search(probes.template.source) if not probes.bundled else probes.template.facts.tools):
        return
    failed = missing_tools(probes)
    if failed:
        remedy = "choose a template that writes tools, their calls and their results"
        yield _behaves(probes, "tools-dropped", "; ".join(failed), remedy, probes.bundled)


def missing_tools(probes: Probes) -> list[str]:
    """Says which parts of a conversation with tools a template does not write."""
    name, failed = TOOL["function"]["name"], []
    if not probes.has(name, [USER], prompt=True, tools=True):
        failed.append(f"the list of tools {_how(probes.refusal([USER], prompt=True, tools=True))}")
    talk = [USER, call({"key": "Sentinelkey"})]
    if not _writes_call(probes, talk):
        text = [USER, call('{"key": "Sentinelkey"}')]
        hint = " (as a JSON string they are written)" if _writes_call(probes, text) else ""
        failed.append(f"a call whose arguments are an object {_how(probes.refusal(talk, tools=True))}{hint}")
        talk = text
    talk = [*talk, RESULT]
    if not probes.has(RESULT["content"], talk, tools=True):
        failed.append(f"a tool's result {_how(probes.refusal(talk, tools=True))}")
    return failed


def _writes_call(probes: Probes, talk: list[Message]) -> bool:
    return all(probes.has(text, talk, tools=True) for text in (TOOL["function"]["name"], "Sentinelkey"))


def _how(refusal: str) -> str:
    return f"fails: {refusal}" if refusal else "is left out"


def _behaves(probes: Probes, id: str, cause: str, remedy: str, declared: bool = False) -> Finding:
    severity = "note" if declared and probes.bundled else None
    return found(id, f"template {probes.template.name}", cause, remedy, severity)  # type: ignore[arg-type]
