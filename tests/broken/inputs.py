"""Broken data, checkpoints and adapters beside a recipe that is right: three of the seven kinds."""

# ruff: noqa: E501
from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from broken.case import Case, edited
from broken.whole import (
    CHATS,
    HIDDEN,
    PAIRS,
    QUESTIONS,
    RECIPE,
    TOKENS,
    base_weights,
    links,
    make_adapter,
    make_base,
    record,
    write_json,
    write_rows,
    write_tensors,
    write_tokenizer,
)

SFT_DATA = "    data: {sources: [{path: ./chats.jsonl}], max_length: 64}\n"
Break = Callable[[Path], None]


def line_of(text: str) -> int:
    """Line of the recipe on which a text stands."""
    return RECIPE[: RECIPE.index(text)].count("\n") + 1


def rows(name: str, whole: list[Any], **changed: Any) -> Break:
    """Writes rows of which some are others: `r7=...` replaces row 7."""
    others = {int(key[1:]): row for key, row in changed.items()}
    return lambda folder: write_rows(folder / name, [others.get(n, row) for n, row in enumerate(whole, 1)])


def data(name: str, content: bytes) -> Break:
    """Writes a file in place of the chats, and lets the recipe name it."""

    def write(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
        (folder / "recipe.yaml").write_text(RECIPE.replace("./chats.jsonl", f"./{name}"))

    return write


def cut(name: str, by: int) -> Break:
    """Cuts bytes off the end of a file."""

    def write(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:-by])

    return write


def gone(name: str) -> Break:
    """Removes a file or folder."""

    def remove(folder: Path) -> None:
        shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()

    return remove


def text(name: str, content: str) -> Break:
    """Replaces a text file."""
    return lambda folder: (folder / name).write_text(content) and None


def changed(name: str, **values: Any) -> Break:
    """Changes keys of a JSON object; None removes one."""

    def write(folder: Path) -> None:
        found = json.loads((folder / name).read_text()) | values
        write_json(folder / name, {key: value for key, value in found.items() if value is not None})

    return write


def two_kinds(folder: Path) -> None:
    """A folder of data in which two formats lie."""
    data("two/a.jsonl", b"{}")(folder)
    (folder / "two/b.csv").write_text("a")
    (folder / "recipe.yaml").write_text(RECIPE.replace("./chats.jsonl", "./two"))


def _lines(whole: list[Any]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in whole).encode()


ANSWERLESS = {"messages": [{"role": "user", "content": "Zer da?"}, {"role": "assistant", "content": " "}]}
STRANGER = {"messages": [{"role": "usr", "content": "Zer da?"}]}
EQUAL = {"prompt": "q", "chosen": "a", "rejected": "a"}
LONG = [row for _ in range(20) for row in CHATS]

DATA = [
    Case("missing column", rows("pairs.jsonl", PAIRS, r7={"prompt": "q", "chosen": "a"}), "pairs.jsonl:7: ", "no column `rejected`"),
    Case("some answers empty", rows("chats.jsonl", CHATS, r2=ANSWERLESS, r9=ANSWERLESS), "chats.jsonl: ", "2 of 20 rows (10.0 %) were dropped: empty answer (2)"),
    Case("all answers empty", rows("chats.jsonl", [ANSWERLESS] * 5), "chats.jsonl:1: ", "not one of 5 rows is usable"),
    Case("chosen == rejected", rows("pairs.jsonl", PAIRS, r1=EQUAL, r20=EQUAL), "pairs.jsonl: ", "chosen equals rejected (2)"),
    Case("all chosen == rejected", rows("pairs.jsonl", [EQUAL] * 3), "pairs.jsonl:1: ", "chosen equals rejected (3)"),
    Case("truncated JSON lines", cut("pairs.jsonl", 9), "pairs.jsonl:20: ", "the file ends inside this line"),
    Case("truncated JSON", data("chats.json", json.dumps(CHATS).encode()[:-9]), "chats.json: ", "not valid JSON (Unterminated string starting at line 1"),
    Case("truncated gzip", data("chats.jsonl.gz", gzip.compress(_lines(LONG), mtime=0)[:-40]), "chats.jsonl.gz:", "gzip data that is cut off or damaged"),
    Case("not gzip", data("chats.jsonl.gz", _lines(CHATS)), "chats.jsonl.gz:1: ", "gzip data that is cut off or damaged"),
    Case("Latin-1", data("l.jsonl", _lines(CHATS[:4]) + '{"messages": "ñ"}'.encode("latin-1")), "l.jsonl:5: ", "not UTF-8 (byte 0xf1"),
    Case("UTF-16", data("u.jsonl", _lines(CHATS).decode().encode("utf-16")), "u.jsonl:1: ", "UTF-16 text"),
    Case("nested 50,000 deep", data("d.jsonl", _lines(CHATS[:2]) + b"[" * 50_000 + b"]" * 50_000), "d.jsonl:3: ", "brackets nested more than 100 deep"),
    Case("nested JSON file", data("d.json", b"[" * 50_000 + b"]" * 50_000), "d.json: ", "brackets nested more than 100 deep"),
    Case("NaN", data("n.jsonl", b'{"prompt": "q", "completion": NaN}\n'), "n.jsonl:1: ", "NaN is not JSON"),
    Case("half a character", data("h.jsonl", b'{"prompt": "\\ud83d", "completion": "a"}\n'), "h.jsonl:1: ", "half of a surrogate pair"),
    Case("unknown role", rows("chats.jsonl", CHATS, r4=STRANGER), "chats.jsonl:4: ", "the unknown role 'usr'"),
    Case("messages are a number", rows("chats.jsonl", CHATS, r20={"messages": 3}), "chats.jsonl:20: ", "`messages` is a number"),
    Case("a row that is a list", rows("pairs.jsonl", PAIRS, r3=[1]), "pairs.jsonl:3: ", "a row that is a list"),
    Case("texts for conversations", rows("chats.jsonl", [{"text": "a"}]), "chats.jsonl:1: ", "rows of shape text, where conversations are needed"),
    Case("unknown columns", rows("pairs.jsonl", [{"a": 1, "b": 2}]), "pairs.jsonl:1: ", "no known row shape among the columns `a`, `b`"),
    Case("no rows", data("e.jsonl", b""), "e.jsonl: ", "holds no rows"),
    Case("ragged CSV", data("c.csv", b"prompt,completion\nq,a\nq\n"), "c.csv:2: ", "1 cells (up to line 3) under 2 columns"),
    Case("damaged Parquet", data("p.parquet", b"PAR1" + b"\0" * 50), "p.parquet: ", "not a readable Parquet file"),
    Case("a format never read", data("x.xlsx", b"PK"), "x.xlsx: ", "not a data file we read"),
    Case("a folder of two kinds", two_kinds, "two: ", "files of several kinds"),
    Case("field of a check", rows("questions.jsonl", QUESTIONS, r5={"prompt": "q"}), "questions.jsonl:5: ", "no field `answers`"),
    Case("type of a field", rows("questions.jsonl", QUESTIONS, r2={"prompt": "q", "answers": "a"}), "questions.jsonl:2: ", "`answers` is a str"),
    Case("no prompt", rows("questions.jsonl", QUESTIONS, r1={"prompt": "", "answers": ["a"]}), "questions.jsonl:1: ", "`prompt` is empty"),
    Case("no such file", gone("texts.txt"), f"recipe.yaml:{line_of('./texts.txt')}  stages.report.suites[1].data[0].path: ", "no file or folder"),
    Case("a column that is not there", edited("", SFT_DATA, SFT_DATA.replace("jsonl}", "jsonl, columns: {messages: dialog}}"), "", "").break_it, "chats.jsonl:1: ", "no column `dialog` (columns: {messages: dialog})"),
]  # fmt: skip

ABSENT = {
    "metadata": {},
    "weight_map": {"model.norm.weight": "model-second.safetensors", "lm_head.weight": "model-second.safetensors"},
}


def only_pickled(folder: Path) -> None:
    """Weights in the form that is never read, because reading it runs code."""
    for path in (folder / "base").glob("*.safetensors*"):
        path.unlink()
    (folder / "base/pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")


def bare(folder: Path) -> None:
    """A folder with nothing of a model in it."""
    shutil.rmtree(folder / "base")
    (folder / "base").mkdir()
    (folder / "base/README.md").write_text("soon")


def template(content: str, name: str = "mine.jinja") -> Break:
    """A template of the user's own."""

    def write(folder: Path) -> None:
        (folder / name).write_text(content)
        (folder / "recipe.yaml").write_text(
            RECIPE.replace("    chat_template: chatml\n    data", f"    chat_template: ./{name}\n    data")
        )

    return write


SECOND = "base/model-second.safetensors"
CHECKPOINTS = [
    Case("missing shard", gone(SECOND), f"{SECOND}: ", "is missing"),
    Case("truncated shard", cut(SECOND, 1), f"{SECOND}: ", "where its header promises"),
    Case("shard cut in its header", lambda folder: cut(SECOND, (folder / SECOND).stat().st_size - 90)(folder), f"{SECOND}: ", "holds 90 bytes, less than its header"),
    Case("empty shard", text(SECOND, ""), f"{SECOND}: ", "holds 0 bytes, less than its header"),
    Case("not safetensors", text(SECOND, "<!DOCTYPE html><html>Not found</html>"), f"{SECOND}: ", "less than its header"),
    Case("damaged header", lambda folder: (folder / SECOND).write_bytes(b"\x10" + b"\0" * 7 + b"[1, 2, 3, 4, 5] "), f"{SECOND}: ", "no readable header"),
    Case("Git LFS pointer", text(SECOND, "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"), f"{SECOND}: ", "is a Git LFS pointer"),
    Case("index names an absent tensor", lambda folder: write_json(folder / "base/model.safetensors.index.json", ABSENT), f"{SECOND}: ", "does not hold lm_head.weight, which the index promises"),
    Case("index without its map", text("base/model.safetensors.index.json", "{}"), "base/model.safetensors.index.json: ", "has no weight_map"),
    Case("index that leaves its folder", text("base/model.safetensors.index.json", '{"weight_map": {"a": "../a"}}'), "base/model.safetensors.index.json: ", "'../a' is no file name"),
    Case("only pickled weights", only_pickled, "base/model.safetensors: ", "there is only pytorch_model.bin, which is never read"),
    Case("no weights", lambda folder: [path.unlink() for path in (folder / "base").glob("*.safetensors*")], "base/model.safetensors: ", "is missing"),
    Case("no config", gone("base/config.json"), "base/config.json: ", "is missing"),
    Case("truncated config", cut("base/config.json", 5), "base/config.json: ", "is not JSON"),
    Case("nested config", text("base/config.json", "[" * 100_000), "base/config.json: ", "is not JSON"),
    Case("config of something else", text("base/config.json", '{"a": 1}'), "base/config.json: ", "has no model_type"),
    Case("no tokenizer", gone("base/tokenizer.json"), "base/tokenizer.json: ", "is missing"),
    Case("truncated tokenizer", cut("base/tokenizer.json", 5), "base/tokenizer.json: ", "is not JSON"),
    Case("no tokenizer in its file", text("base/tokenizer.json", '{"a": 1}'), "base: ", "tokenizer does not load"),
    Case("tokenizer without the template's tokens", lambda folder: write_tokenizer(folder / "base", TOKENS[:1]), f"recipe.yaml:{line_of('    chat_template: chatml')}  stages.sft.chat_template: ", "needs <|im_start|>"),
    Case("tokenizer of a larger model", changed("base/config.json", vocab_size=2), "base/tokenizer.json: ", "the template writes <|im_end|> (2), but the model has 2 embedding rows"),
    Case("template that is no Jinja", template("a\n{% for m in messages %}\n{{ m }\n"), "mine.jinja:3: ", "not Jinja"),
    Case("template with an unknown filter", template("{{ messages }}\n{{ messages | shout }}\n"), "mine.jinja:2: ", "No filter named 'shout'"),
    Case("template without content", template(" "), "mine.jinja: ", "holds no text"),
    Case("nothing of a model", bare, f"recipe.yaml:{line_of('    model: ./base')}  stages.sft.model: ", "holds no model"),
    Case("no such folder", gone("base"), f"recipe.yaml:{line_of('    model: ./base')}  stages.sft.model: ", "no file or folder"),
    Case("a file for a folder", lambda folder: (shutil.rmtree(folder / "base"), (folder / "base").write_text("")), f"recipe.yaml:{line_of('    model: ./base')}  stages.sft.model: ", "is a file"),
]  # fmt: skip


def other_size(folder: Path) -> None:
    """The base under the adapter is twice as wide as the one it was trained on."""
    make_base(folder / "earlier/base", {"": base_weights(hidden=2 * HIDDEN)}, hidden=2 * HIDDEN)


def made_again(folder: Path) -> None:
    """The base under the adapter was trained again since."""
    record(folder / "earlier/base", "pretrain", "c" * 64, links("base"))


def half_a_factor(folder: Path) -> None:
    """A LoRA of which one of the two matrices is missing."""
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    write_tensors(folder / "earlier/sft/adapter_model.safetensors", [(name, (2, HIDDEN))])


ADAPTER, WEIGHTS = "earlier/sft/adapter_config.json", "earlier/sft/adapter_model.safetensors"
DPO = "    model: ./earlier/sft\n"
ADAPTERS = [
    Case("base of another size", other_size, f"{WEIGHTS}: ", "was made for another base: base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight is [2, 16]"),
    Case("module that the base lacks", lambda folder: make_adapter(folder / "earlier/sft", "model.layers.7.self_attn.q_proj"), f"{WEIGHTS}: ", "changes model.layers.7.self_attn.q_proj, which"),
    Case("base made again", made_again, "earlier/sft: ", "was trained on another @base"),
    Case("base is gone", gone("earlier/base"), "earlier/sft: ", "stands on @base"),
    Case("truncated base", cut("earlier/base/model.safetensors", 4), "earlier/base/model.safetensors: ", "where its header promises"),
    Case("no record", gone("earlier/sft/stage.json"), "earlier/sft: ", "an adapter without stage.json"),
    Case("truncated record", cut("earlier/sft/stage.json", 9), "earlier/sft/stage.json: ", "damaged record"),
    Case("record of something else", text("earlier/sft/stage.json", '{"a": 1}'), "earlier/sft/stage.json: ", "damaged record"),
    Case("record of a later version", changed("earlier/sft/stage.json", format=99), "earlier/sft/stage.json: ", "record format 99"),
    Case("not LoRA", changed(ADAPTER, peft_type="IA3"), f"{ADAPTER}: ", "peft_type 'IA3'"),
    Case("settings missing", changed(ADAPTER, r=None), f"{ADAPTER}: ", "lacks r"),
    Case("settings of the wrong type", changed(ADAPTER, r="two"), f"{ADAPTER}: ", "`r` cannot be taken over: Input should be a valid integer"),
    Case("no weights", gone(WEIGHTS), f"{WEIGHTS}: ", "is missing"),
    Case("truncated weights", cut(WEIGHTS, 4), f"{WEIGHTS}: ", "where its header promises"),
    Case("half a factor", half_a_factor, f"{WEIGHTS}: ", "lora_A.weight without"),
    edited("QLoRA above LoRA", DPO, DPO + "    method: qlora #!\n", "stages.dpo.method", "qlora above an adapter trained on an unquantised base"),
    edited("another template", DPO, DPO + "    chat_template: plain #!\n", "stages.dpo.chat_template", "plain is not the template sft was trained with"),
    edited("nothing to merge", '  aligned: {kind: merge, model: "@dpo"}\n', "  aligned: {kind: merge, model: ./base}\n", "stages.aligned.model", "./base is a whole model"),
    edited("an adapter published", '"@aligned", report: "@report"}\n', '"./earlier/sft", report: "@report"}\n', "stages.release.model", "./earlier/sft is an adapter"),
]  # fmt: skip
