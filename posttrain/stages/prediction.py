"""What the estimate says of a model that is loaded and about to train: the largest piece, and the peak."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel

from posttrain.estimate.activations import Pass, counted_as
from posttrain.estimate.adapters import AdapterShape
from posttrain.estimate.architecture import Architecture
from posttrain.estimate.memory import Memory, Piece, largest_micro_batch, predict
from posttrain.estimate.shapes import architecture_of
from posttrain.estimate.spread import ALONE, Spread
from posttrain.estimate.weights import Method, static_bytes
from posttrain.models.lineage import Quantization
from posttrain.models.load import TRAINED
from posttrain.stages.setup import Machine
from posttrain.training.limits import Limits


@dataclass(frozen=True)
class Prediction:
    """A model's shape and how it trains."""

    model: Architecture
    how: Pass
    optim: str
    checkpointing: bool

    @property
    def optimizer_bytes(self) -> int:
        """What the first optimizer step will allocate on the device, once the model is cut."""
        spread = self.how.spread
        if spread.updates_on_host:
            return 0
        static = static_bytes(self.model, self.how.method, self.how.precision, self.optim, spread)
        return static.optimizer - static.paged

    def largest(self, device_bytes: int, longest: int, row_tokens: int | None) -> int | None:
        """Most tokens of a piece that should fit; see `posttrain.estimate.memory.largest_micro_batch`."""
        return largest_micro_batch(
            self.model, self.how, self.optim, device_bytes, self.checkpointing, longest, row_tokens
        )

    def peak(self, limits: Limits, most: int) -> int:
        """Bytes at the peak: of torch's allocator on a GPU, of the whole process on a CPU.

        Args:
            most: tokens of the largest part of an optimizer step that this process gets: no piece is larger.
        """
        tokens = min(limits.tokens, most)
        memory: Memory = predict(
            self.model, self.how, self.optim, Piece(tokens, min(limits.row_tokens, tokens), self.checkpointing)
        )
        return memory.allocated if self.how.device == "cuda" else memory.device


def predict_stage(
    model: Any,
    quantization: Quantization | None,
    machine: Machine,
    backend: str,
    precision: str,
    optim: str,
    checkpointing: bool,
    spread: Spread = ALONE,
) -> Prediction:
    """Describes a loaded model for the estimate.

    Args:
        model: with every adapter in place, and what trains set to train.
        backend: attention implementation that was chosen.
        precision: the recipe's: bf16, fp16 or fp32.
        spread: how it lies over the stage's processes.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    method = _method(model, quantization)
    how = Pass(precision, machine.device, counted_as(backend), method, spread)  # type: ignore[arg-type]
    return Prediction(architecture_of(base.config.to_dict(), "the loaded model"), how, optim, checkpointing)


def device_room() -> int:
    """Bytes of the GPU that this process may fill: all but what others hold."""
    free, _ = torch.cuda.mem_get_info()
    return free + torch.cuda.memory_reserved()


def _method(model: Any, quantization: Quantization | None) -> Method:
    if not isinstance(model, PeftModel):
        return Method()
    shapes = {name: _shape(config) for name, config in model.peft_config.items()}
    own = shapes.pop(TRAINED)
    double = quantization is None or quantization.double_quant
    return Method(own, tuple(shapes.values()), quantization is not None, double)


def _shape(config: Any) -> AdapterShape:
    """An adapter's shape by its peft settings."""
    assert isinstance(config, LoraConfig)  # the only kind that a recipe can ask for
    rows = config.trainable_token_indices or []
    targets = config.target_modules or ()
    return AdapterShape(
        r=config.r,
        target_modules=targets if isinstance(targets, str) else tuple(sorted(targets)),
        rank_pattern=dict(config.rank_pattern),
        dora=bool(config.use_dora),
        dropout=float(config.lora_dropout),
        modules_to_save=tuple(config.modules_to_save or ()),
        token_rows=max(map(len, rows.values()), default=0) if isinstance(rows, dict) else len(rows),
    )
