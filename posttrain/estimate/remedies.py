"""What would make a stage fit a device: each change is computed, none guessed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from posttrain.estimate.activations import Pass
from posttrain.estimate.adapters import AdapterShape
from posttrain.estimate.architecture import Architecture
from posttrain.estimate.devices import find_device, known_devices
from posttrain.estimate.memory import Piece, predict
from posttrain.estimate.spread import Spread
from posttrain.estimate.weights import Method, is_eight_bit, quantised

_EIGHT_BIT = {"adamw": "adamw_bnb_8bit", "lion": "lion_8bit"}
_SHORTEST = 256
_MOST_PROCESSES = 64


@dataclass(frozen=True)
class Setting:
    """How a stage trains."""

    model: Architecture
    how: Pass
    optim: str
    piece: Piece
    longest: int
    """Tokens of its longest row or pair."""
    row_tokens: int | None
    """Capacity of a packed row where a dense mask keeps rows short."""

    def smallest(self) -> int:
        """Bytes of the device that its smallest piece needs: one row or pair of the greatest length."""
        piece = Piece(self.longest, self.longest, self.piece.checkpointing)
        return predict(self.model, self.how, self.optim, piece).device


@dataclass(frozen=True)
class Remedy:
    """A change under which a stage fits."""

    change: str
    bytes: int
    """What the stage would then need at least."""


def remedies(setting: Setting, budget: int) -> Iterator[Remedy]:
    """Yields the changes that make a stage fit `budget` bytes, each by itself or with recomputed activations.

    They come in the order of what they cost: recomputing, an 8-bit optimizer, a shorter length, an adapter, an
    adapter over 4 bits, cutting the model over (more) processes, and the smallest known GPU that holds it as it is.
    """
    for change, other in _changes(setting):
        need = other.smallest()
        if need > budget and not other.piece.checkpointing:
            other = replace(other, piece=replace(other.piece, checkpointing=True))
            need, change = other.smallest(), f"{change} and gradient_checkpointing: true"
        if need <= budget:
            yield Remedy(change, need)
    yield from _more_processes(setting, budget)
    need = setting.smallest()
    known = [find_device(name) for name in known_devices()]
    fitting = [one for one in known if one.memory >= need and (one.bf16 or setting.how.precision != "bf16")]
    if fitting:
        smallest = min(fitting, key=lambda device: device.memory)
        yield Remedy(f"a GPU such as {smallest.name}", need)


def _changes(setting: Setting) -> Iterator[tuple[str, Setting]]:
    if not setting.piece.checkpointing:
        recomputing = replace(setting.piece, checkpointing=True)
        yield "gradient_checkpointing: true", replace(setting, piece=recomputing)
    family = next((name for name in _EIGHT_BIT if name in setting.optim), None)
    if family is not None and not is_eight_bit(setting.optim):
        yield f"optim: {_EIGHT_BIT[family]}", replace(setting, optim=_EIGHT_BIT[family])
    shorter = setting.longest // 2
    if shorter >= _SHORTEST:
        yield "half of data.max_length", replace(setting, longest=shorter)
    method = setting.how.method
    if method.is_full:
        yield "method: lora", _with(setting, Method(AdapterShape(16)))
    if not method.four_bits and quantised(setting.model) and not method.parents:
        adapter, spread = method.adapter or AdapterShape(16), setting.how.spread
        whole = replace(setting, how=replace(setting.how, spread=Spread("ddp", spread.processes, spread.machines)))
        apart = " and accelerate_config: ddp" if spread.kind != "ddp" else ""  # 4-bit weights are not cut
        yield f"method: qlora{apart}", _with(whole, Method(replace(adapter, dora=False), four_bits=True))


def _more_processes(setting: Setting, budget: int) -> Iterator[Remedy]:
    """The fewest processes over which the model fits if FSDP2 cuts it; 4-bit weights are not cut."""
    spread, how = setting.how.spread, setting.how
    if how.method.four_bits or how.device != "cuda":
        return
    kept = spread.kind == "fsdp"  # DeepSpeed cuts a model only after it stood whole on each device
    name = "" if kept else "accelerate_config: fsdp2"
    count = 2 * spread.processes if kept else max(spread.processes, 2)
    while count <= _MOST_PROCESSES:
        moved = replace(spread, processes=count) if kept else Spread("fsdp", count, spread.machines)
        need = replace(setting, how=replace(how, spread=moved)).smallest()
        if need <= budget:
            number = f"num_processes: {count}" if count != spread.processes else ""
            yield Remedy(" and ".join(filter(None, (number, name))), need)
            return
        count *= 2


def _with(setting: Setting, method: Method) -> Setting:
    return replace(setting, how=replace(setting.how, method=method))
