"""Templates we did not write (the installed TRL's): our mask against one that is found by searching the text.

What is expected is computed with transformers' `apply_chat_template` and string search alone, from the
templates' files; TRL is imported by the slow test only.
"""

from __future__ import annotations

import functools
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import jinja2
import pytest

from posttrain.chat.marking import mark
from posttrain.chat.render import MASKED, render_turns
from posttrain.chat.templates import ChatTemplate, strip_marks
from posttrain.errors import ChatError

ROOT = Path(__file__).resolve().parents[2]
PARTS_ONLY = ("idefics3", "llava_next", "smolvlm")
"""Families of images, whose contents must be lists of parts."""
CHATS = {
    "two turns": [
        {"role": "user", "content": "Sentinelone"},
        {"role": "assistant", "content": "Sentineltwo"},
        {"role": "user", "content": "Sentinelthree"},
        {"role": "assistant", "content": "Sentinelfour"},
    ],
    "system": [
        {"role": "system", "content": "Sentinelzero"},
        {"role": "user", "content": "Sentinelone"},
        {"role": "assistant", "content": "Sentineltwo"},
    ],
    "reasoning": [
        {"role": "user", "content": "Sentinelone"},
        {"role": "assistant", "content": "Sentineltwo", "reasoning_content": "Sentinelreason"},
    ],
}


def folder() -> Path:
    """Folder of the templates, found without importing TRL."""
    found = importlib.util.find_spec("trl")
    if found is None or found.origin is None:
        pytest.skip("trl is not installed", allow_module_level=True)
    return Path(found.origin).parent / "chat_templates"


FILES = sorted(folder().glob("*.jinja"))


@functools.cache
def script() -> ModuleType:
    """The module of `scripts/trl_templates.py`."""
    spec = importlib.util.spec_from_file_location("trl_templates", ROOT / "scripts" / "trl_templates.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@functools.cache
def tokenizer_of(path: Path):
    """A tokenizer with the template's control tokens."""
    return script().make_tokenizer(path.read_bytes().decode())


def text_of(path, messages, prompt=False):
    """What transformers renders; None where the template refuses."""
    source = strip_marks(path.read_bytes().decode())
    try:
        return tokenizer_of(path).apply_chat_template(
            messages, chat_template=source, tokenize=False, add_generation_prompt=prompt
        )
    except (jinja2.TemplateError, TypeError, AttributeError, LookupError, ValueError):
        return None


def closing(path, text, answer):
    """The first control token after an answer, with what stands before it; "" = none."""
    after = text[text.rindex(answer) + len(answer) :]
    tokens = sorted(tokenizer_of(path).get_added_vocab(), key=len, reverse=True)
    match = re.match(rf"(?s).*?(?:{'|'.join(map(re.escape, tokens))})", after)
    return match[0] if match else ""


def expected_answers(path, messages):
    """What should be trained of each answer, and the reason why that cannot be ("" = it can)."""
    user = {"role": "user", "content": "Sentinelnext"}
    answers, start = [], [m for m in messages if m["role"] != "system"]
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        answer = message["content"]
        before, after = text_of(path, messages[:index], prompt=True), text_of(path, messages[: index + 1])
        if before is None or after is None:
            return [], "refuses the conversation"
        if any(
            str(value) not in after
            for m in messages[: index + 1]
            if m is message or m["role"] != "assistant"
            for key, value in m.items()
            if key != "role"
        ):
            return [], "leaves something out"
        if not after.startswith(before):
            return [], "prompt is no prefix"
        followed = text_of(path, [start[0], {"role": "assistant", "content": answer}, user])
        token = closing(path, followed, answer)
        alone = closing(path, text_of(path, [start[0], {"role": "assistant", "content": answer}]), answer)
        if not token or token != alone:
            return [], "no end of turn that is always there"
        answers.append(after[len(before) : after.rindex(answer)] + answer + token)
    return answers, ""


def trained(tokenizer, row):
    """Texts of the trained runs of a row."""
    runs, run = [], []
    for label in [*row.labels, MASKED]:
        if label != MASKED:
            run.append(label)
        elif run:
            runs.append(tokenizer.decode(run))
            run = []
    return runs


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_mask_is_the_answer_and_its_end_or_is_refused_for_a_reason(path, chat):
    messages, tokenizer = CHATS[chat], tokenizer_of(path)
    expected, refusal = expected_answers(path, messages)
    template = ChatTemplate(path.stem, path.read_bytes().decode())
    for known in (template, mark(tokenizer, template).template):
        if known is None:
            continue
        if refusal:
            with pytest.raises(ChatError):
                render_turns(tokenizer, known, messages)
        else:
            rows = render_turns(tokenizer, known, messages)
            assert [text for row in rows for text in trained(tokenizer, row)] == expected


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_one_row_holds_all_answers_unless_history_is_rewritten(path):
    messages, tokenizer = CHATS["two turns"], tokenizer_of(path)
    expected, refusal = expected_answers(path, messages)
    if refusal:
        return
    whole, prompt = text_of(path, messages), text_of(path, messages[:3], prompt=True)
    first = text_of(path, messages[:1], prompt=True) + expected[0]
    kept = whole.startswith(first) and whole.startswith(prompt)
    rows = render_turns(tokenizer, ChatTemplate(path.stem, path.read_bytes().decode()), messages)
    assert len(rows) == (1 if kept else 2)


def test_what_is_no_text_conversation_is_known():
    lost = {path.stem for path in FILES if "Sentineltwo" not in (text_of(path, CHATS["two turns"]) or "")}
    assert all(name.startswith(PARTS_ONLY) for name in lost)
    assert len(FILES) - len(lost) > 50


def test_most_templates_get_marks():
    marked = [
        path.stem for path in FILES if mark(tokenizer_of(path), ChatTemplate("x", path.read_bytes().decode())).template
    ]
    assert {"llama3", "llama3_1", "qwen2_5", "gemma", "gemma3", "phi3", "qwen3_8", "lfm2", "qwen3_instruct_2507"} <= {
        *marked
    }
    assert not {"qwen3", "gptoss", "glm4moe", "deepseekv3", "qwen3_5_think"} & {*marked}  # history, prompt, closing
    assert len(marked) >= 30


@pytest.mark.parametrize(
    ("trl", "reason"),
    [
        ("Answer<|end|>", None),
        ("\nAnswer<|end|>", "before the end of the header"),
        ("<think>Answer<|end|>", "writes before every answer"),
        ("Answer<|end|>\n", "white space after"),
        ("Answer<|end|>\n</s>", "'\\n</s>' after the end of turn"),
        ("Answer", "does not train the end of turn"),
        ("Question", "?"),
    ],
)
def test_each_difference_of_masks_has_its_reason(trl, reason):
    found = list(script()._beside("Answer<|end|>", trl)) if trl != "Answer<|end|>" else []
    assert len(found) == (reason is not None)
    assert reason is None or reason in found[0]


@pytest.mark.slow
def test_every_difference_from_trl_is_explained(tmp_path):
    assert script().main(["--out", str(tmp_path / "table.md")]) == 0
    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    rows = [
        line.split(" | ") for line in table.splitlines() if line.startswith("| ") and not line.startswith("| template")
    ]
    assert len(rows) > 60
    assert all("a twin" in row or "none needed" in row or "exact text" in row[-1] for row in rows)
    assert "tests one tool exchange only" in table
