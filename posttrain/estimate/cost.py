"""Time, energy and disk of a stage: from FLOPs and a table of devices, or from a measured throughput."""

from __future__ import annotations

from dataclasses import dataclass

from posttrain.estimate.architecture import Architecture
from posttrain.estimate.devices import GpuModel
from posttrain.estimate.weights import Method, Static

EFFICIENCY = 0.4
"""Part of a device's tabled 16-bit rate that training is taken to reach: published runs of 1 B to 70 B models lie
between 0.35 and 0.5 (llm-foundry's tables for full training; NeMo's for LoRA)."""
LOAD = 0.8
"""Part of a device's power limit that it is taken to draw while it trains."""


@dataclass(frozen=True)
class Cost:
    """What a stage takes; None where nothing is known to go by."""

    flops_per_token: float
    seconds: float | None
    watt_hours: float | None
    source: str
    """`measured`, `tabled`, or why there is none."""


def flops_per_token(model: Architecture, method: Method, mean_length: float, checkpointing: bool) -> float:
    """Floating-point operations of one token's training.

    With N the parameters a token is multiplied with (embedding lookup left out, head counted, of experts those
    it is sent to) and a = 2 q L / 2 per layer for each of scores and sums over a causal document of L tokens
    and query width q: forward 2 N + a; backward twice that where all weights are trained, once 2 N (the inputs'
    gradients) and twice a where they are frozen. So 6 N + 3 a, or 4 N + 3 a; recomputing adds 2 N + a.
    (Kaplan et al. 2020, 2.1; Korthikanti et al. 2022, appendix A.)
    """
    attention = 2 * model.block.query * mean_length * model.layers
    forward = 2 * model.matmul_parameters + attention
    backward = 2 * forward if method.is_full else 2 * model.matmul_parameters + 2 * attention
    return forward + backward + (forward if checkpointing else 0)


def reference_flops_per_token(model: Architecture, mean_length: float) -> float:
    """Operations of one token in DPO's pass over the reference: a forward alone."""
    return 2 * model.matmul_parameters + 2 * model.block.query * mean_length * model.layers


def cost(
    flops: float, tokens: int, device: GpuModel | None, tokens_per_second: float | None = None, devices: int = 1
) -> Cost:
    """Turns operations into seconds and watt-hours; what devices tell one another is not counted.

    Args:
        flops: of one token, all passes together.
        tokens: of the whole stage.
        tokens_per_second: what was measured on this very device, or on so many of them together.
        devices: that share the tokens; all of them draw power.
    """
    if tokens_per_second:
        seconds, source = tokens / tokens_per_second, "measured"
    elif device is not None and device.teraflops is not None:
        seconds, source = flops * tokens / (device.teraflops * 1e12 * EFFICIENCY * devices), "tabled"
    else:
        return Cost(flops, None, None, "no throughput is known for this device")
    watts = device.watts if device is not None else None
    return Cost(flops, seconds, None if watts is None else seconds * devices * watts * LOAD / 3600, source)


def training_disk(model: Architecture, method: Method, static: Static, keep: int, item: int, snapshots: int) -> int:
    """Bytes that a training stage writes at most: checkpoints, snapshots and its model.

    A checkpoint holds the trained tensors and the optimizer's state; one more than are kept exists while the
    newest is written.

    Args:
        keep: `save_total_limit`.
        item: bytes of a weight of a whole model that is saved.
    """
    checkpoint = 4 * static.trainable_parameters + static.optimizer
    left = item * model.parameters if method.is_full else 4 * static.trainable_parameters
    return (keep + 1) * checkpoint + (snapshots + 1) * left
