"""`posttrain init`: what it looks at, what it chooses, and that what it writes loads, checks and rehearses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from in_process import run_in_process
from typer.testing import CliRunner

from posttrain import cli
from posttrain.chat.tokenizer import load_any_tokenizer
from posttrain.cli import app
from posttrain.data.read import SourceSpec, read_source
from posttrain.data.select import SelectSpec
from posttrain.draft import init_recipe
from posttrain.errors import UserError
from posttrain.models.twin import save_twin
from posttrain.pretraining.tokenizer import train_tokenizer
from posttrain.recipe.load import load_recipe
from posttrain.rehearse import prepare

CHATS: dict[str, Any] = {
    "messages": lambda n: {"messages": [{"role": "user", "content": f"q {n}"}, {"role": "assistant", "content": "a"}]},
    "sharegpt": lambda n: {"conversations": [{"from": "human", "value": f"q {n}"}, {"from": "gpt", "value": "a"}]},
    "alpaca": lambda n: {"instruction": f"q {n}", "input": "more" if n % 2 else "", "output": "a"},
    "prompt_completion": lambda n: {"prompt": f"q {n}", "completion": "a"},
}
ROWS = 40


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No network and an empty hub cache, in a working directory of the test's own."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "no-cache"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def write_rows(name: str, row: Any, rows: int = ROWS) -> str:
    Path(name).write_text("".join(json.dumps(row(number)) + "\n" for number in range(rows)))
    return name


def pair(number: int) -> dict[str, str]:
    return {"question": f"q {number}", "better": "a", "worse": "b"}


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A tiny Llama in a folder, with ChatML's tokens and no template."""
    control = ["<|im_start|>", "<|im_end|>"]
    train_tokenizer([f"question {n} and answer" for n in range(50)], 320, control, 512, tmp_path / "tokenizer")
    shape = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2,
             "intermediate_size": 128, "max_position_embeddings": 512, "vocab_size": 320}  # fmt: skip
    save_twin(shape, load_any_tokenizer(tmp_path / "tokenizer"), Path("model"), 0)
    return "model"


def stages(path: Path) -> dict[str, Any]:
    return load_recipe(path, [], {}).recipe.stages


@pytest.mark.parametrize("task", ["sft", "dpo", "both"])
def test_local_files_check_and_rehearse(task: str, model: str, tmp_path: Path) -> None:
    data = [write_rows("chats.jsonl", CHATS["messages"])] if task != "dpo" else []
    data += [write_rows("pairs.jsonl", pair)] if task != "sft" else []
    Path("recipes").mkdir()
    out = Path("recipes/mine.yaml")
    draft = init_recipe(model, data, task, out)
    assert any("full" in line for line in draft.chosen)
    kinds = [stage.kind for stage in stages(out).values()]
    assert kinds == [kind for kind in ("sft", "dpo") if task in (kind, "both")] + ["evaluate", "publish"]
    checked = CliRunner().invoke(app, ["check", str(out), "--gpu", "24GB"])
    assert checked.exit_code == 0, checked.output
    rehearsal, _ = prepare(load_recipe(out), tmp_path / "out")
    assert list(run_in_process(rehearsal, tmp_path / "run")) == list(stages(out))


@pytest.mark.parametrize(("hub", "method"), [("Qwen/Qwen2.5-0.5B", "full"), ("Qwen/Qwen3-8B", "qlora")])
def test_hub_names_check_and_rehearse(hub: str, method: str, tmp_path: Path) -> None:
    out = Path("mine.yaml")
    init_recipe(hub, ["owner/chats:train_sft", "owner/pairs"], "both", out)
    found = stages(out)
    assert found["sft"].method.kind == method
    assert found["sft"].data.sources[0].split == "train_sft"
    checked = CliRunner().invoke(app, ["check", str(out), "--gpu", "h200"])
    assert checked.exit_code == 0, checked.output
    rehearsal, _ = prepare(load_recipe(out), tmp_path / "out")
    assert list(run_in_process(rehearsal, tmp_path / "run")) == list(found)


@pytest.mark.parametrize(
    ("hub", "method", "template"),
    [
        ("Qwen/Qwen2.5-0.5B", "full", "chatml"),
        ("google/gemma-3-4b-pt", "lora", "gemma3"),
        ("mistralai/Mistral-7B-v0.1", "qlora", "zephyr"),
        ("meta-llama/Llama-3.1-8B", "qlora", "llama3.1"),
        ("BSC-LT/salamandra-2b", "full", "salamandra"),
        ("allenai/OLMo-2-1124-7B", "qlora", "olmo2"),
        ("microsoft/Phi-3-mini-4k-instruct", "lora", None),
    ],
)
def test_method_and_template_follow_the_model(hub: str, method: str, template: str | None) -> None:
    init_recipe(hub, [write_rows("chats.jsonl", CHATS["messages"])], "sft", Path("mine.yaml"))
    sft = stages(Path("mine.yaml"))["sft"]
    assert (sft.method.kind, sft.chat_template) == (method, template)
    assert sft.trainer["learning_rate"] == (2e-5 if method == "full" else 2e-4)


def test_a_template_that_rewrites_answers_gets_a_row_for_each() -> None:
    init_recipe("Qwen/Qwen3-8B", [write_rows("chats.jsonl", CHATS["messages"])], "sft", Path("mine.yaml"))
    assert stages(Path("mine.yaml"))["sft"].data.history == "split"


def test_the_vocabulary_decides_and_an_own_template_stays(model: str) -> None:
    data = [write_rows("chats.jsonl", CHATS["messages"])]
    init_recipe(model, data, "sft", Path("one.yaml"))
    assert stages(Path("one.yaml"))["sft"].chat_template == "chatml"
    Path("model/chat_template.jinja").write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    init_recipe(model, data, "sft", Path("two.yaml"))
    assert stages(Path("two.yaml"))["sft"].chat_template is None


def test_columns_under_other_names_are_mapped_and_lengths_measured() -> None:
    chats = write_rows("chats.jsonl", lambda n: {"question": f"q {n} " * 300, "answer": "a " * 300})
    init_recipe("Qwen/Qwen2.5-0.5B", [chats, write_rows("pairs.jsonl", pair)], "both", Path("mine.yaml"))
    found = stages(Path("mine.yaml"))
    sft, dpo = found["sft"].data, found["dpo"].data
    assert sft.sources[0].columns == {"prompt": "question", "completion": "answer"}
    assert dpo.sources[0].columns == {"prompt": "question", "chosen": "better", "rejected": "worse"}
    assert (sft.max_length, dpo.max_length) == (1024, 256)


@pytest.mark.parametrize("shape", list(CHATS))
def test_what_is_asked_was_not_trained_on(shape: str) -> None:
    """The trained side is read as conversations, the asked one as raw rows: both must be sides of one split."""
    path = Path(write_rows("rows.jsonl", CHATS[shape]))
    for rows, side in ((30, "train"), (7, "heldout")):
        chosen = SelectSpec(rows, side)  # type: ignore[arg-type]
        other = SelectSpec(rows, "heldout" if side == "train" else "train")
        trained = read_source(SourceSpec(path, select=chosen), "chat").rows
        asked = read_source(SourceSpec(path, select=other), "raw").rows
        numbers = [row.origin.row for row in trained] + [row.origin.row for row in asked]
        assert sorted(numbers) == list(range(1, ROWS + 1))


def test_one_file_may_hold_both() -> None:
    both = write_rows(
        "both.jsonl", lambda n: {**CHATS["messages"](n), "prompt": f"q {n}", "chosen": "a", "rejected": "b"}
    )
    init_recipe("Qwen/Qwen2.5-0.5B", [both], "both", Path("mine.yaml"))
    found = stages(Path("mine.yaml"))
    assert [found[name].data.sources[0].shape for name in ("sft", "dpo")] == ["messages", "preference"]


def test_too_few_rows_are_all_trained_on() -> None:
    init_recipe("Qwen/Qwen2.5-0.5B", [write_rows("few.jsonl", CHATS["messages"], 19)], "sft", Path("mine.yaml"))
    found = stages(Path("mine.yaml"))
    assert list(found) == ["sft", "release"]
    assert found["sft"].data.sources[0].select is None


def test_odd_names_survive() -> None:
    Path("a b").mkdir()
    data = write_rows("a b/${HOME}: 'x'.jsonl", CHATS["messages"])
    init_recipe("Qwen/Qwen2.5-0.5B", [data], "sft", Path("mine.yaml"))
    assert stages(Path("mine.yaml"))["sft"].data.sources[0].path == f"./{data}"


@pytest.mark.parametrize(
    ("change", "where", "found"),
    [
        ({"task": "rl"}, "--task", "no task"),
        ({"model": "owner/unheard-of"}, "--model", "not known"),
        ({"model": "./nothing"}, "--model", "no folder"),
        ({"model": "."}, "--model", "holds no model"),
        ({"data": ["nothing.jsonl"]}, "--data", "no such file"),
        ({"data": ["odd.jsonl"]}, "--data", "no known row shape"),
        ({"data": ["chats.jsonl", "chats.jsonl"]}, "--data", "given 2 times"),
        ({"data": ["owner/chats:"]}, "--data", "names no split"),
        ({"task": "dpo"}, "--data", "chats.jsonl"),
        ({"task": "both", "data": ["owner/chats"]}, "--data", "two tasks"),
        ({"out": Path("mine.txt")}, "--out", "no YAML"),
        ({"out": Path("odd name.yaml")}, "--out", "cannot name"),
        ({"out": Path("no/where.yaml")}, "--out", "folder"),
    ],
)
def test_answers_that_cannot_be_used(change: dict[str, Any], where: str, found: str) -> None:
    write_rows("odd.jsonl", lambda n: {"something": n})
    answers = {"model": "Qwen/Qwen2.5-0.5B", "data": [write_rows("chats.jsonl", CHATS["messages"])], "task": "sft"}
    with pytest.raises(UserError) as caught:
        init_recipe(**{**answers, "out": Path("mine.yaml"), **change})  # type: ignore[arg-type]
    assert where in str(caught.value)
    assert found in str(caught.value)
    assert caught.value.todo
    assert not list(Path().rglob("*.yaml"))


def given(out: str) -> list[str]:
    return ["init", "--model", "Qwen/Qwen2.5-0.5B", "--data", "chats.jsonl", "--task", "sft", "--out", out]


def test_nothing_is_overwritten(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    write_rows("chats.jsonl", CHATS["messages"])
    Path("mine.yaml").write_text("precious")
    monkeypatch.setattr("sys.argv", ["posttrain", *given("mine.yaml")])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 2
    assert "exists already" in capsys.readouterr().err
    assert Path("mine.yaml").read_text() == "precious"


def test_without_a_terminal_nobody_is_asked() -> None:
    asked = CliRunner().invoke(app, ["init", "--model", "Qwen/Qwen2.5-0.5B"])
    assert isinstance(asked.exception, UserError)
    assert asked.exception.where == "--data, --task, --out"


def test_a_terminal_is_asked_for_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    write_rows("chats.jsonl", CHATS["messages"])
    answers = iter(["Qwen/Qwen2.5-0.5B", "sft", "chats.jsonl", "mine.yaml"])
    monkeypatch.setattr("typer.prompt", lambda *_, **__: next(answers))
    monkeypatch.setattr("sys.stdin", Terminal())
    cli.init_()
    assert list(stages(Path("mine.yaml"))) == ["sft", "report", "release"]


class Terminal:
    """A standard input with someone behind it."""

    def isatty(self) -> bool:
        return True
