"""The facts files of the ChatML, Llama, Qwen and end-of-text families: every line is held against the template."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jinja2.meta
import jinja2.sandbox
import pytest
import yaml
from chat_first_families import NAMES, TINY, WITH_TOOLS, attempt, say, write
from chat_tiny import bundled

from posttrain.chat.corpus import Conversation
from posttrain.chat.jinja import Message
from posttrain.chat.templates import TemplateFacts
from posttrain.chat.turns import end_of_turn, required_tokens_missing
from posttrain.recipe.bundled import find_bundled, list_bundled


def facts_file(name: str) -> dict[str, Any]:
    return yaml.safe_load(find_bundled("chat_templates", name).with_suffix(".yaml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", NAMES)
def test_facts_are_complete(name: str) -> None:
    fields = {field.name for field in dataclasses.fields(TemplateFacts)}
    assert set(facts_file(name)) == fields
    facts = bundled(name).facts
    assert "unknown" not in dataclasses.asdict(facts).values()
    assert None not in dataclasses.asdict(facts).values()
    assert facts.sources
    assert all(re.fullmatch(r"[0-9a-f]{64}", digest) for digest in facts.digests)
    # every text that looks like a control token, and every token variable, is required, and nothing else
    literals = set(re.findall(r"<\|\w+\|>", bundled(name).source))
    variables = {text for text in ("bos_token", "eos_token") if text in bundled(name).source}
    optional = {"bos_token"} if name in ("plain", "alpaca") else set()
    words = {"<|assistant|>"} if name in ("zephyr", "tulu", "olmo2") else set()
    assert set(facts.required_tokens) == (literals - words) | (variables - optional)
    assert required_tokens_missing(TINY, bundled(name)) == []
    end = end_of_turn(TINY, bundled(name)).text
    assert facts.stop[0] == ("eos_token" if end == "</s>" else end)


@pytest.mark.parametrize("name", NAMES)
def test_facts_about_beginning_system_date_and_white_space(name: str) -> None:
    facts, source = bundled(name).facts, bundled(name).source
    text = write(source, say("uQUESTION"))[0]
    assert text.startswith("<s>") == (facts.bos == "template")
    assert text.count("<s>") == (facts.bos == "template")
    default = str(facts.default_system).replace("{date}", "1714")
    assert default in write(source, say("uQUESTION"), date_string="1714")[0]
    assert ("system" in text.split("QUESTION")[0]) == (facts.default_system != "" and name != "alpaca")
    system = write(source, say("sSYSTEM", "uQUESTION"))[0]
    assert system.index("SYSTEM") < system.index("QUESTION")
    assert (write(source, say("uQ"), date_string="1714")[0] != write(source, say("uQ"))[0]) == (facts.date == "fixed")
    assert "strftime" not in source
    assert ("  QUESTION  " not in write(source, say("sS", "u  QUESTION  "))[0]) == facts.trims


@pytest.mark.parametrize("name", NAMES)
def test_facts_about_roles_and_their_order(name: str) -> None:
    facts, source = bundled(name).facts, bundled(name).source
    others = {"system", "user", "assistant", "tool", "ipython", "developer"} - set(facts.roles)
    for role in facts.roles:
        talk = Conversation([*say("uQ").messages, {"role": role, "content": "TEXT"}], None)
        if role != "system" or facts.order == "free":
            assert "TEXT" in write(source, talk)[0]
    for role in others:
        talk = Conversation([*say("uQ").messages, {"role": role, "content": "TEXT"}], None)
        text, refused = attempt(source, talk)
        assert role in (text or refused)
    for turns in (["uA", "uB"], ["uA", "aB", "aC"], ["aB", "uA"], ["uA", "sB"]):
        taken = attempt(source, say(*turns))[0] is not None
        assert taken == (facts.order == "free" or "sB" not in turns)


@pytest.mark.parametrize("name", NAMES)
def test_facts_about_tools_thinking_history_and_variables(name: str) -> None:
    facts, source = bundled(name).facts, bundled(name).source
    assert facts.tools == (name in WITH_TOOLS)
    thinks: Message = {"role": "assistant", "content": "Bai.", "reasoning_content": "Agian."}
    talk = Conversation([*say("uBai?").messages, thinks], None)
    assert ("Agian" in write(source, talk)[0]) == facts.thinking
    stays = all(
        write(source, Conversation([*talk.messages, *say("uQ", "aA").messages][: 2 + more], None))[0].startswith(
            write(source, talk)[0].removesuffix("\n")
        )
        for more in (1, 2)
    )
    assert stays == (facts.history == "kept")
    assert (facts.marks == "exact") == (facts.history == "kept")
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
    variables = jinja2.meta.find_undeclared_variables(environment.parse(bundled(name).inference))
    given = {"messages", "tools", "add_generation_prompt", "bos_token", "eos_token", "raise_exception", "namespace"}
    assigned = set(re.findall(r"set (\w+) =", source)) - set(facts.kwargs)
    assert variables - given - assigned == set(facts.kwargs)


def test_every_bundled_template_has_its_own_text() -> None:
    digests = [bundled(name).digest for name in list_bundled("chat_templates")]
    assert len(set(digests)) == len(digests)
