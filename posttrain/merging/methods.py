"""The arithmetic of combining models: from each input's delta to the change of one tensor.

With W_0 the common base and W_i the inputs, d_i = W_i - W_0; every method gives W_0 + c(d_1, ..., d_k).

scale          c = a d_1
linear         c = sum w_i d_i with sum w_i = 1, which is sum w_i W_i, a weighted mean of whole models (model soups,
               arXiv 2203.05482); the same for any W_0, so none is needed
slerp          c = sin((1 - t) O) / sin O d_1 + sin(t O) / sin O d_2, O the angle between the two (Shoemake, SIGGRAPH
               1985); between deltas as in WARP (arXiv 2406.16768); without a base between the weights, W_0 = 0
task_arithmetic c = sum w_i d_i (arXiv 2212.04089)
ties           trim, elect, merge (arXiv 2306.01708): see `trim_thresholds` and `elect`
dare_linear    drop and rescale (arXiv 2311.03099, see `drop_mask`), then as task_arithmetic
dare_ties      drop and rescale, then elect and merge as in ties, without its trimming
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from posttrain.errors import UserError

Deltas = list[torch.Tensor]
"""The same rows of every input's delta, fp32."""
Blocks = Callable[[], Iterator[Deltas]]
"""Reads one tensor's deltas from its first row to its last, as often as a method needs to."""
Change = Callable[[Deltas, int], tuple[torch.Tensor, list[int]]]
"""(deltas of a block, its first element's position) -> change in fp32, elements of each input that are in it."""

KINDS = ("scale", "linear", "slerp", "task_arithmetic", "ties", "dare_linear", "dare_ties")
_SPARSE = ("ties", "dare_linear", "dare_ties")
_PARALLEL = 1e-4  # sine of an angle at which slerp and linear differ by 1e-9, less than fp32 can tell


@dataclass(frozen=True)
class Method:
    """How models are combined; a setting that the kind has no use for must stay at its default."""

    kind: str
    """One of `KINDS`."""
    weights: tuple[float, ...] = ()
    """One per input; for `scale` the factor a; none for slerp."""
    density: float | None = None
    """Share of elements that trimming (ties) or dropping (dare, where it is 1 - p) keeps, in (0, 1]."""
    t: float | None = None
    """slerp: 0 is the first input, 1 the second."""
    seed: int | None = None
    """dare: which elements are dropped."""
    normalize: bool = False
    """Divide by the sum of the weights; for ties and dare_ties of those whose sign was elected."""


def check_method(method: Method, inputs: int, base: bool) -> None:
    """Refuses settings that do not fit the kind or the inputs.

    Args:
        inputs: how many models are combined.
        base: whether a common base is given.

    Raises:
        UserError: naming the first setting at fault.
    """
    kind, weights = method.kind, method.weights
    if kind not in KINDS:
        _refuse("kind", repr(kind), f"take one of {', '.join(KINDS)}")
    least, most = {"scale": (1, 1), "slerp": (2, 2), "linear": (2, math.inf)}.get(kind, (1, math.inf))
    if not least <= inputs <= most:
        _refuse("inputs", f"{inputs} for {kind}", f"give {'exactly' if least == most else 'at least'} {least}")
    if not base and kind not in ("linear", "slerp"):
        _refuse("base", f"missing, and {kind} works on differences to it", "give the model that the inputs come from")
    for name, value, uses in (
        ("density", method.density, kind in _SPARSE),
        ("t", method.t, kind == "slerp"),
        ("seed", method.seed, kind.startswith("dare")),
    ):
        if uses != (value is not None):
            _refuse(name, f"is {value} for {kind}", "give it a value" if uses else "leave it out")
    if method.density is not None and not 0 < method.density <= 1:
        _refuse("density", f"{method.density}", "give a share above 0 and at most 1")
    if method.t is not None and not 0 <= method.t <= 1:
        _refuse("t", f"{method.t}", "give a number from 0 to 1")
    _check_weights(kind, weights, 0 if kind == "slerp" else inputs, method.normalize)


def _check_weights(kind: str, weights: tuple[float, ...], expected: int, normalize: bool) -> None:
    if len(weights) != expected:
        _refuse("weights", f"{len(weights)} for {kind}", f"give {expected}, one per input" if expected else "give none")
    if not all(math.isfinite(weight) for weight in weights):
        _refuse("weights", str(list(weights)), "give finite numbers")
    if normalize and kind in ("scale", "slerp"):
        _refuse("normalize", f"is set for {kind}", "leave it out")
    if normalize and not all(weight > 0 for weight in weights):
        _refuse("weights", f"{list(weights)} with normalize", "give weights above 0, or leave normalize out")
    if kind == "linear" and not normalize and abs(sum(weights) - 1) > 1e-6:
        _refuse("weights", f"{list(weights)} do not add up to 1: no mean of models", "change them, or set normalize")


def _refuse(name: str, found: str, todo: str) -> None:
    raise UserError(f"method.{name}" if name not in ("inputs", "base") else name, found, todo)


def plan_change(method: Method, name: str, numel: int, blocks: Blocks) -> Change:
    """Prepares a checked method for one tensor: what needs a look at the whole tensor is read here.

    Args:
        name, numel: of the tensor.
        blocks: its deltas.
    """
    if method.kind == "slerp":
        assert method.t is not None
        factors = slerp_factors(method.t, blocks)
        return lambda deltas, position: (_weighted_sum(deltas, factors), [delta.numel() for delta in deltas])
    weights, density = method.weights, method.density or 1.0
    elects = method.kind in ("ties", "dare_ties")
    if method.normalize and not elects:
        weights = tuple(weight / sum(weights) for weight in weights)
    trims, drops = method.kind == "ties" and density < 1, method.kind.startswith("dare") and density < 1
    thresholds = trim_thresholds(blocks, len(weights), max(1, round(density * numel))) if trims else []

    def change(deltas: Deltas, position: int) -> tuple[torch.Tensor, list[int]]:
        kept = [delta.numel() for delta in deltas]
        if trims:
            deltas = [
                torch.where(delta.abs() >= least, delta, 0) for delta, least in zip(deltas, thresholds, strict=True)
            ]
        if drops:
            assert method.seed is not None
            masks = [
                drop_mask(method.seed, name, index, density, position, delta.numel()).view(delta.shape)
                for index, delta in enumerate(deltas)
            ]
            kept = [int(mask.sum()) for mask in masks]
            deltas = [torch.where(mask, delta / density, 0) for mask, delta in zip(masks, deltas, strict=True)]
        return elect(deltas, weights, method.normalize) if elects else (_weighted_sum(deltas, weights), kept)

    return change


def _weighted_sum(deltas: Deltas, weights: tuple[float, ...]) -> torch.Tensor:
    total = deltas[0] * weights[0]
    for delta, weight in zip(deltas[1:], weights[1:], strict=True):
        total.add_(delta, alpha=weight)
    return total


def slerp_factors(t: float, blocks: Blocks) -> tuple[float, float]:
    """The factors of both inputs on the great circle between them: sin((1 - t) O) / sin O and sin(t O) / sin O.

    1 - t and t, the straight line, where one of them is zero or they are (anti)parallel. One pass, sums in fp64.
    """
    first = second = dot = 0.0
    for one, other in blocks():
        a, b = one.reshape(-1).double(), other.reshape(-1).double()
        first, second, dot = first + a.dot(a).item(), second + b.dot(b).item(), dot + a.dot(b).item()
    norms = math.sqrt(first * second)
    cosine = max(-1.0, min(1.0, dot / norms)) if norms else 1.0
    angle = math.acos(cosine)
    if math.sin(angle) < _PARALLEL:
        return 1 - t, t
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def trim_thresholds(blocks: Blocks, inputs: int, keep: int) -> list[float]:
    """TIES' trim (arXiv 2306.01708, section 3.1): per input the magnitude of the `keep`-th largest element.

    Elements at or above it stay: as in the authors' code, equal magnitudes stay together, so more than
    `keep` may. The paper ranks a whole task vector; here, as in most programs, each tensor on its own.
    Exact in two passes and 1 MiB per input: the bits of non-negative floats are ordered as the floats are,
    so a histogram of their upper halves finds the bucket, one of the lower halves in it the value.
    """
    upper = [torch.zeros(1 << 15, dtype=torch.int64) for _ in range(inputs)]
    for deltas in blocks():
        for counts, delta in zip(upper, deltas, strict=True):
            counts += torch.bincount(_magnitude_bits(delta) >> 16, minlength=1 << 15)
    buckets = [_nth_largest(counts, keep) for counts in upper]
    lower = [torch.zeros(1 << 16, dtype=torch.int64) for _ in range(inputs)]
    for deltas in blocks():
        for counts, delta, (bucket, _) in zip(lower, deltas, buckets, strict=True):
            bits = _magnitude_bits(delta)
            counts += torch.bincount(bits[bits >> 16 == bucket] & 0xFFFF, minlength=1 << 16)
    found = [
        bucket << 16 | _nth_largest(counts, rest)[0] for counts, (bucket, rest) in zip(lower, buckets, strict=True)
    ]
    return torch.tensor(found, dtype=torch.int32).view(torch.float32).tolist()


def _magnitude_bits(delta: torch.Tensor) -> torch.Tensor:
    return delta.abs().contiguous().view(torch.int32).view(-1)


def _nth_largest(counts: torch.Tensor, n: int) -> tuple[int, int]:
    """(bin of the n-th largest element, its rank from the top within that bin)."""
    above = counts.flip(0).cumsum(0)
    place = int(torch.searchsorted(above, n))
    before = int(above[place - 1]) if place else 0
    return len(counts) - 1 - place, n - before


def drop_mask(seed: int, name: str, index: int, density: float, position: int, count: int) -> torch.Tensor:
    """DARE's mask (arXiv 2311.03099, eq. 2): which elements stay, each with probability `density` = 1 - p.

    What stays is divided by 1 - p, so that the delta's expectation is unchanged. Element e of input i is
    decided by the e-th 32-bit word of a Philox4x64 stream keyed by SHA-256 of (seed, i, tensor's name): by
    nothing that depends on block size, order or threads.

    Args:
        position, count: which elements of the flattened tensor.

    Returns:
        bool, shape (count,).
    """
    key = int.from_bytes(hashlib.sha256(f"{seed} {index} {name}".encode()).digest()[:16], "little")
    skip = position % 8  # a step of the counter gives four 64-bit numbers
    numbers = np.random.Philox(key=key, counter=position // 8).random_raw((skip + count + 1) // 2)
    words = numbers.astype("<u8", copy=False).view("<u4")[skip : skip + count]
    return torch.from_numpy(words < np.uint32(min(round(density * 2**32), 2**32 - 1)))


def elect(deltas: Deltas, weights: tuple[float, ...], normalize: bool) -> tuple[torch.Tensor, list[int]]:
    """TIES' elect and disjoint mean (arXiv 2306.01708, algorithm 1), elementwise.

    With v_i = w_i d_i: s = sign(sum v_i), the sign with more mass; A = inputs with sign(v_i) = s, zeros
    never among them; c = sum_A v_i / |A|, with `normalize` sum_A v_i / sum_A w_i. Equal weights w without
    `normalize` are the paper's lambda = w. Where the masses are equal, s and c are 0, as the paper writes it.

    Returns:
        c, and the number of elements of each input that are in it.
    """
    weighted = [delta * weight for delta, weight in zip(deltas, weights, strict=True)]
    elected = torch.stack(weighted).sum(0).sign()
    total, share = torch.zeros_like(elected), torch.zeros_like(elected)
    kept = []
    for values, weight in zip(weighted, weights, strict=True):
        agrees = values * elected > 0
        total += torch.where(agrees, values, 0)
        share += agrees * (weight if normalize else 1.0)
        kept.append(int(agrees.sum()))
    return torch.where(share > 0, total / share, 0), kept
