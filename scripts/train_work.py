"""What `bench_train.py` lets routes do: models of real shapes, rows of real lengths, and the operations they need."""

from __future__ import annotations

import json
import random
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, set_seed

from posttrain.chat.render import render_conversations, render_pair
from posttrain.chat.templates import load_template
from posttrain.data.read import SourceSpec, read_source
from posttrain.models.load import DTYPES
from posttrain.pretraining.rows import Row, make_row
from posttrain.pretraining.tokenizer import train_tokenizer
from posttrain.training.pairs import Pair

PROFILED = 2
"""Steps under the profiler, after those that are timed."""


@dataclass(frozen=True)
class Shape:
    """A Llama."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool

    @property
    def body(self) -> int:
        """Parameters of all linear layers but the head."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def head(self) -> int:
        """Parameters of the output head."""
        return self.hidden * self.vocabulary


SHAPES = {
    "tiny": Shape(2, 64, 128, 4, 2, 16, 600, True),
    "small": Shape(4, 192, 512, 6, 6, 32, 4096, True),  # 2.6 M parameters
    "1b": Shape(16, 2048, 8192, 32, 8, 64, 128_256, True),  # Llama 3.2
    "3b": Shape(28, 3072, 8192, 24, 8, 128, 128_256, True),
    "8b": Shape(32, 4096, 14336, 32, 8, 128, 128_256, False),  # Llama 3.1
}


@dataclass(frozen=True)
class Work:
    """What every route has to do."""

    task: Literal["sft", "dpo"]
    rows: list[Any]
    """`Row`s or `Pair`s, in the order of training."""
    model: Path
    shape: Shape
    device: str
    method: Literal["full", "lora", "qlora"] = "full"
    precision: Literal["fp32", "bf16"] = "fp32"
    batch: int = 16
    """Rows of an optimizer step."""
    max_length: int = 512
    warm_up: int = 2
    """First steps, which are not timed."""
    learning_rate: float = 1e-4
    micro_batch_tokens: int | None = None
    profile: Path | None = None
    """Where a table of the profiler goes."""

    @property
    def steps(self) -> int:
        """Optimizer steps of one pass over the rows."""
        return -(-len(self.rows) // self.batch)

    def of_step(self, step: int) -> list[Any]:
        """Rows of a step."""
        return self.rows[step * self.batch : (step + 1) * self.batch]


@dataclass(frozen=True)
class Route:
    """Who trains, and how."""

    name: str
    ours: bool = False
    defaults: bool = False
    """TRL as its config comes: batch 8, checkpointing, bf16 autocast over fp32 weights, live reference."""
    batch: int = 8
    """TRL's per-device batch; accumulated to the work's."""
    packing: bool = False
    order: str = "sequential"
    """TRL's `train_sampling_strategy`."""
    precompute: bool = False
    """TRL's `precompute_ref_log_probs`."""


@dataclass
class Run:
    """What one measurement found; counts are of the timed steps."""

    seconds: float
    reference_seconds: float
    """Of the reference log-probs of the timed rows, where they are computed before training; else 0."""
    steps: int
    rows: int
    tokens: int
    """Of the rows as they are: a pair's prompt counts in both sequences, padding never."""
    supervised: int
    peak_bytes: int
    """While training: what the GPU's allocator gave out, or the resident set of the whole process."""
    losses: list[float] = field(repr=False)
    """Of every optimizer step."""
    notes: dict[str, Any]

    def rate(self, count: int) -> float:
        """Something per second, the reference's time included."""
        return count / (self.seconds + self.reference_seconds)


def flops_per_token(work: Work) -> float:
    """Floating-point operations that training needs per token, averaged over the rows; what a route wastes is not in.

    Forward: 2 for each parameter of the linear layers (the head at supervised tokens alone), and causal attention
    within each document: 2 · layers · heads · head_dim · length. Full training does that three times (backward: for
    inputs and weights); frozen weights save theirs, so an adapter needs 2 + 2 per parameter, and 3 times the attention.
    Adapters themselves, norms, embeddings and recomputation are not counted. DPO adds one forward for the reference;
    a pair's prompt counts in both its sequences.
    """
    shape, attention, head, tokens = work.shape, 0.0, 0.0, 0
    for row in work.rows:
        lengths = [len(row)] if isinstance(row, Row) else [len(row.prompt) + len(a) for a in (row.chosen, row.rejected)]
        attention += sum(2.0 * shape.layers * shape.heads * shape.head_dim * length * length for length in lengths)
        head += 2.0 * shape.head * row.supervised
        tokens += sum(lengths)
    linear = 2.0 * shape.body + head / tokens
    passes = 3 if work.method == "full" else 2
    extra = 1 if work.task == "dpo" else 0
    return linear * (passes + extra) + attention / tokens * (3 + extra)


def make_model(folder: Path, shape: Shape, device: str, dtype: str) -> None:
    """Writes a checkpoint of random weights beside the tokenizer that the folder holds."""
    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocabulary,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=8192,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.device(device):
        LlamaForCausalLM(config).to(DTYPES[dtype]).save_pretrained(folder)


def matmul_rate(device: str, precision: str) -> float:
    """Operations per second of a square matrix product of random numbers: the best of several tries."""
    size, tries = (8192, 30) if device == "cuda" else (1024, 10)
    one, other = (torch.randn(size, size, device=device).to(DTYPES[precision]) for _ in range(2))
    best = 0.0
    for number in range(tries + 5):
        sync(device)
        begun = time.perf_counter()
        for _ in range(4):
            one @ other
        sync(device)
        best = max(best, 4 * 2.0 * size**3 / (time.perf_counter() - begun)) if number >= 5 else 0.0
    return best


def sync(device: str) -> None:
    """Waits for a GPU to be done."""
    if device == "cuda":
        torch.cuda.synchronize()


def documents(shared: Path, folder: Path, count: int, max_length: int, vocabulary: int) -> list[Row]:
    """Conversations of alpaca_en_demo, shuffled, tokenised by a tokenizer trained on them that is left in `folder`."""
    source = SourceSpec(shared / "data/llamafactory-demos/alpaca_en_demo.json")
    found = read_source(source, "chat").rows
    random.Random(0).shuffle(found)
    texts = [message["content"] for row in found for message in row.messages]
    tokenizer = train_tokenizer(texts, vocabulary, ["<|im_start|>", "<|im_end|>"], max_length, folder)
    rendered = render_conversations(tokenizer, load_template("chatml", folder), ((row.messages, None) for row in found))
    made = (make_row(one.input_ids[:max_length], one.labels[:max_length]) for (one,) in rendered)
    return [row for row in made if row.supervised][:count]


def preferences(shared: Path, folder: Path, count: int, max_length: int, vocabulary: int) -> list[Pair]:
    """Pairs of hh-rlhf, shuffled, tokenised by a tokenizer trained on them that is left in `folder`."""
    found = read_source(SourceSpec(shared / "data/hh-rlhf/harmless-base_test.jsonl.gz"), "pair").rows
    random.Random(0).shuffle(found)
    texts = [message["content"] for row in found for message in [*row.prompt, *row.chosen, *row.rejected]]
    tokenizer = train_tokenizer(texts, vocabulary, ["<|im_start|>", "<|im_end|>"], max_length, folder)
    template, made = load_template("chatml", folder), []
    for row in found:
        parts = render_pair(tokenizer, template, row.prompt, row.chosen, row.rejected)
        prompt, chosen, rejected = (np.asarray(part, dtype=np.int32) for part in parts)
        room = max_length - len(prompt)
        if room > 0 and not np.array_equal(chosen[:room], rejected[:room]):
            made.append(Pair(prompt, chosen[:room], rejected[:room]))
        if len(made) == count:
            break
    return made


def save_lengths(file: Path, pairs: list[Pair]) -> None:
    """Writes the lengths of pairs, for machines without the data."""
    file.write_text(json.dumps([[len(pair.prompt), len(pair.chosen), len(pair.rejected)] for pair in pairs]))


def pairs_of_lengths(file: Path, count: int, max_length: int, vocabulary: int) -> list[Pair]:
    """Made pairs with lengths that `save_lengths` wrote; those beyond `max_length` are left out."""
    draw = np.random.default_rng(0)
    fitting = [each for each in json.loads(file.read_text()) if each[0] + max(each[1:]) <= max_length][:count]
    return [Pair(*(draw.integers(5, vocabulary, length, dtype=np.int32) for length in each)) for each in fitting]


def made_tokenizer(folder: Path) -> None:
    """A tokenizer for models whose rows are made, not read."""
    train_tokenizer(["text of no meaning"], 300, ["<|im_start|>", "<|im_end|>"], 4096, folder)


def whole_documents(count: int, length: int, vocabulary: int) -> list[Row]:
    """Made documents of one length, every token supervised but the first."""
    draw = np.random.default_rng(0)
    made = draw.integers(5, vocabulary, (count, length), dtype=np.int32)
    return [make_row(ids, ids) for ids in made]
