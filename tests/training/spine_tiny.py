"""Tiny models, rows and trainers for the tests of the spine, of TRL's trainers on it, and of what they save."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
)

from posttrain.pretraining.arguments import trainer_arguments
from posttrain.pretraining.fit import Fit, fit, resume_step
from posttrain.pretraining.loop import Loop, Step
from posttrain.pretraining.metrics import MetricsLog
from posttrain.pretraining.rows import IGNORE, Row, Stream, make_row
from posttrain.training.pairs import Pair

VOCABULARY = 264
"""256 bytes, `<|im_start|>` 256, `<|im_end|>` 257, padded to a multiple of 8."""
PAD, END = 256, 257


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens, and the two ChatML tokens; no BOS."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(BPE(vocab={char: number for number, char in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=core)
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    made.pad_token, made.eos_token = "<|im_start|>", "<|im_end|>"
    return made


def make_model(seed: int = 0, tie: bool = True, **more: Any) -> LlamaForCausalLM:
    """A random 2-layer Llama in fp32, its weights large enough that tokens matter to one another."""
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.1,
        "tie_word_embeddings": tie,
        "bos_token_id": None,
        "eos_token_id": END,
        "pad_token_id": PAD,
    }
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **more}))


def make_mixture() -> MixtralForCausalLM:
    """A random 1-layer mixture of experts whose routers have a balance loss."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        router_aux_loss_coef=1.0,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=PAD,
    )
    return MixtralForCausalLM(config)


def save_base(folder: Path, model: Any = None) -> Path:
    """Writes a standalone model folder: weights, config and tokenizer."""
    (model or make_model()).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def make_rows(count: int, seed: int = 0, longest: int = 24) -> list[Row]:
    """Random conversations: a part of each row carries loss, at least one token does."""
    draw = np.random.default_rng(seed)
    rows = []
    for length in draw.integers(2, longest, count):
        ids = draw.integers(0, 256, length)
        labels = np.where(draw.random(length) < 0.4, IGNORE, ids)
        labels[-1] = ids[-1]
        rows.append(make_row(ids, labels))
    return rows


def make_pairs(count: int, seed: int = 0, longest: int = 14, empty_prompt: bool = False) -> list[Pair]:
    """Random pairs of unequal lengths; the first answers have one token."""
    draw = np.random.default_rng(seed)

    def ids(length: int) -> np.ndarray:
        return draw.integers(0, 256, length).astype(np.int32)

    pairs = [Pair(*(ids(length) for length in draw.integers(1, longest, 3))) for _ in range(count)]
    pairs[0] = Pair(ids(5), ids(1), ids(9))
    if empty_prompt:
        pairs[1] = Pair(ids(0), ids(6), ids(3))
    return pairs


def arguments(folder: Path, steps: int, **fields: Any) -> dict[str, Any]:
    """Arguments of a trainer on the CPU in fp32."""
    given = {"learning_rate": 1e-2, "logging_steps": 1, "save_steps": 1000, "gradient_checkpointing": False, **fields}
    return trainer_arguments(given, folder=folder, steps=steps, seed=1, precision="fp32", device="cpu", report_to=[])


def make_loop(folder: Path, steps: int, make_step: Callable[[int], Step], **more: Any) -> Loop:
    """A loop that keeps its checkpoints and metrics in `folder`."""
    checkpoints = folder / "checkpoints"
    metrics = MetricsLog(folder / "metrics.jsonl", resume_step(checkpoints))
    return Loop(steps=steps, make_step=make_step, checkpoints=checkpoints, metrics=metrics, **more)


def train(trainer: Any, folder: Path, steps: int, make_step: Callable[[int], Step], **more: Any) -> Fit:
    """Runs a trainer over its steps, from the last checkpoint in `folder` if there is one."""
    return fit(trainer, make_loop(folder, steps, make_step, **more))


def score(trainer: Any, step: Step) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one step, by the very method that trains."""
    trainer.model.zero_grad()
    trainer.loop = Loop(1, lambda _: step, Path(), metrics=None)  # type: ignore[arg-type]
    loss = trainer.training_step(trainer.model, step).item()
    found = {name: param.grad.clone() for name, param in trainer.model.named_parameters() if param.grad is not None}
    trainer.model.zero_grad()
    return loss, found


def largest_difference(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Largest |difference| of any gradient, relative to the largest gradient of all."""
    assert ours.keys() == theirs.keys()
    size = max(gradient.abs().max().item() for gradient in theirs.values())
    return max((ours[name] - theirs[name]).abs().max().item() for name in ours) / size


def score_fields(output: Any) -> list[str]:
    """The per-token fields of a fused head's output."""
    return [name for name, value in vars(output).items() if isinstance(value, torch.Tensor)]


def wrap(documents: list[Row], length: int) -> tuple[list[Row], list[list[int]]]:
    """Cuts one long stream of documents into rows of `length` tokens, see `Stream`.

    Returns:
        The rows, and for each row the indices of the documents it holds.
    """
    stream = Stream(np.cumsum([len(document) for document in documents]), length)
    first, last = stream.documents(np.arange(len(stream)))
    members = [list(range(a, b + 1)) for a, b in zip(first.tolist(), last.tolist(), strict=True)]
    return [stream.row(number, documents.__getitem__) for number in range(len(stream))], members
