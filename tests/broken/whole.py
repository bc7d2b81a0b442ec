"""A whole project, made without torch: recipe, data, a sharded base, and an adapter that an earlier run left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from posttrain.artifact import Record, write_record
from posttrain.chat.templates import load_template

HIDDEN, INNER, ROWS = 16, 32, 264
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]

RECIPE = """\
name: whole
seed: 1
precision: fp32
runtime: {device: cpu, threads: 1}
stages:
  sft:
    kind: sft
    model: ./base
    chat_template: chatml
    data: {sources: [{path: ./chats.jsonl}], max_length: 64}
    method: {lora: {r: 2}}
    trainer:
      learning_rate: 1e-3
      max_steps: 2
      global_batch_size: 4
  instruct: {kind: merge, model: "@sft"}
  dpo:
    kind: dpo
    model: ./earlier/sft
    data: {sources: [{path: ./pairs.jsonl}], max_length: 64}
    trainer: {beta: 0.1, max_steps: 2, global_batch_size: 4}
  aligned: {kind: merge, model: "@dpo"}
  report:
    kind: evaluate
    models: {base: ./base, instruct: "@instruct", aligned: "@aligned"}
    chat_template: chatml
    suites:
      - name: questions
        kind: generate
        max_new_tokens: 4
        data: [{path: ./questions.jsonl}]
        checks: [{name: right, kind: any_of, field: answers}, {name: stops, kind: stops}]
      - {name: text, kind: bits_per_byte, data: [{path: ./texts.txt}]}
    require:
      - {suite: questions, metric: right, model: aligned, min: 0}
  release: {kind: publish, model: "@aligned", report: "@report"}
"""

CHATS = [
    {"messages": [{"role": "user", "content": f"Zer da {n}?"}, {"role": "assistant", "content": f"{n}: zenbaki bat."}]}
    for n in range(20)
]
PAIRS = [{"prompt": f"Qué es {n}?", "chosen": f"{n}, un número.", "rejected": f"{n}, a number."} for n in range(20)]
QUESTIONS = [{"prompt": f"What is {n}?", "answers": [f"{n}.", "A number."]} for n in range(5)]


def make_whole(folder: Path) -> None:
    """Writes the project into a new folder; `posttrain run recipe.yaml` there runs to its end."""
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    for name, rows in (("chats", CHATS), ("pairs", PAIRS), ("questions", QUESTIONS)):
        write_rows(folder / f"{name}.jsonl", rows)
    (folder / "texts.txt").write_text("Aquí hay un texto.\n\nHemen beste bat.\n", encoding="utf-8")
    weights = base_weights()
    make_base(folder / "base", {"first": weights[:3], "second": weights[3:]})
    make_base(folder / "earlier/base", {"": weights})
    make_adapter(folder / "earlier/sft")
    record(folder / "earlier/base", "pretrain", "b" * 64, links("base"))
    record(folder / "earlier/sft", "sft", "a" * 64, links("base", "sft"))


def write_rows(path: Path, rows: list[Any]) -> None:
    """Writes JSON lines."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Writes one JSON value."""
    path.write_text(json.dumps(value), encoding="utf-8")


def base_weights(hidden: int = HIDDEN, rows: int = ROWS) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a Llama of one layer with tied embeddings."""
    layer = "model.layers.0"
    return [
        ("model.embed_tokens.weight", (rows, hidden)),
        *((f"{layer}.self_attn.{name}_proj.weight", (hidden, hidden)) for name in "qkvo"),
        (f"{layer}.mlp.gate_proj.weight", (INNER, hidden)),
        (f"{layer}.mlp.up_proj.weight", (INNER, hidden)),
        (f"{layer}.mlp.down_proj.weight", (hidden, INNER)),
        (f"{layer}.input_layernorm.weight", (hidden,)),
        (f"{layer}.post_attention_layernorm.weight", (hidden,)),
        ("model.norm.weight", (hidden,)),
    ]


def write_tensors(path: Path, tensors: list[tuple[str, tuple[int, ...]]]) -> None:
    """Writes a safetensors file by hand: vectors of ones, small random matrices."""
    random, header, blocks, end = np.random.default_rng(0), {}, [], 0
    for name, shape in tensors:
        values = np.ones(shape) if len(shape) == 1 else random.normal(0, 0.1, shape)
        blocks.append(values.astype("<f4").tobytes())
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [end, end + len(blocks[-1])]}
        end += len(blocks[-1])
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(blocks))


def make_base(folder: Path, shards: dict[str, list[tuple[str, tuple[int, ...]]]], hidden: int = HIDDEN) -> None:
    """Writes a model folder; one shard called "" is a single file without an index."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": ROWS,
        "hidden_size": hidden,
        "intermediate_size": INNER,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": 0,
        "dtype": "float32",
    }
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", {"eos_token_id": 0})
    files = {"" if name == "" else f"-{name}": tensors for name, tensors in shards.items()}
    for suffix, tensors in files.items():
        write_tensors(folder / f"model{suffix}.safetensors", tensors)
    if "" not in files:
        index = {name: f"model{suffix}.safetensors" for suffix, tensors in files.items() for name, _ in tensors}
        write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": index})
    write_tokenizer(folder)


def write_tokenizer(folder: Path, tokens: list[str] = TOKENS) -> None:
    """Writes a byte-level tokenizer without merges whose first tokens are the given control tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({text: number for number, text in enumerate([*tokens, *alphabet])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(tokens)
    backend.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": tokens[0], "pad_token": tokens[0]}
    write_json(folder / "tokenizer_config.json", settings)


def make_adapter(folder: Path, module: str = "model.layers.0.self_attn.q_proj", hidden: int = HIDDEN) -> None:
    """Writes a LoRA of rank 2 on one module, with the tokenizer and template it was trained with."""
    folder.mkdir(parents=True, exist_ok=True)
    settings: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": 2,
        "lora_alpha": 4,
        "lora_dropout": 0.0,
        "target_modules": ["q_proj"],
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "fan_in_fan_out": False,
        "bias": "none",
        "inference_mode": True,
    }
    write_json(folder / "adapter_config.json", settings)
    name = f"base_model.model.{module}.lora_"
    tensors = [(f"{name}A.weight", (2, hidden)), (f"{name}B.weight", (hidden, 2))]
    write_tensors(folder / "adapter_model.safetensors", tensors)
    write_tokenizer(folder)
    template = load_template("chatml", Path())
    (folder / "chat_template.jinja").write_text(template.inference, encoding="utf-8")
    write_json(folder / "generation_config.json", {"eos_token_id": [2, 0]})


def links(base: str, *adapters: str) -> dict[str, Any]:
    """A lineage as a record holds it, its folders relative to the run."""
    prints = {"base": "b" * 64, "sft": "a" * 64}
    base_link, *others = ({"folder": n, "label": f"@{n}", "fingerprint": prints[n]} for n in (base, *adapters))
    return {"base": base_link, "adapters": others, "quantization": None}


def record(folder: Path, kind: str, fingerprint: str, lineage: dict[str, Any]) -> None:
    """Writes the record of a stage that left the folder."""
    write_record(folder, Record(folder.name, kind, 1, fingerprint, {"kind": kind}, lineage=lineage))
