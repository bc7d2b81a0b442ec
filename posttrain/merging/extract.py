"""A LoRA adapter of a chosen rank out of two full checkpoints: the base, and the same model after training."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from posttrain.errors import CheckpointError, UserError
from posttrain.merging.adapter import CONFIG, EMBEDDINGS, HEADS, PREFIX, WEIGHTS
from posttrain.merging.align import Aligned, Alignment, align, open_model
from posttrain.merging.atomic import build_folder
from posttrain.merging.checkpoint import check_stamps
from posttrain.merging.edits import row_blocks
from posttrain.merging.header import FLOATS, TensorInfo
from posttrain.merging.quantization import torch_dtype
from posttrain.merging.tensors import CODES, read_rows, read_tensor
from posttrain.merging.writer import FileWriter, Slot, check_space, shard_header, write_file

Others = Literal["refuse", "save", "leave"]

_EXACT = 512  # the shorter side up to which a full SVD takes less than a second
_POWER = 4
_TRANSPOSED = ("gpt2", "openai-gpt", "decision_transformer", "imagegpt")
"""Architectures whose linear layers are stored (in, out)."""


@dataclass(frozen=True)
class ExtractedTensor:
    """One weight that became a pair of factors."""

    name: str
    relative_change: float | None
    """|D| / |W_base|, Frobenius; None where the base is zero."""
    energy: float
    """Share of |D|^2 in the factors, before their own rounding: sum of the squared singular values kept / |D|^2."""


@dataclass(frozen=True)
class ExtractReport:
    """What the adapter holds of the difference, and what it does not."""

    rank: int
    dtype: str
    base: str
    tuned: str
    energy: float
    """Over all factored tensors: sum of what is kept / sum of |D|^2."""
    tensors: tuple[ExtractedTensor, ...]
    saved: tuple[str, ...]
    """Tensors stored whole: the changed ones, and what stands beside them in the same module."""
    left: tuple[str, ...]
    """Changed tensors that the adapter does not hold."""
    files: dict[str, dict[str, Any]]
    """Name -> {"sha256", "bytes"} of every file written."""

    def as_dict(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class _Parts:
    """The tensors that differ, by what becomes of them."""

    factored: list[Aligned]
    saved: list[Aligned]
    left: list[Aligned]


def extract(
    base: Path,
    tuned: Path,
    out: Path,
    rank: int,
    dtype: str = "float32",
    targets: tuple[str, ...] | None = None,
    others: Others = "refuse",
) -> ExtractReport:
    """Extracts an adapter into a new folder that exists only when it is complete; as `extract_into`."""
    return build_folder(
        out, [base, tuned], lambda folder: extract_into(folder, base, tuned, rank, dtype, targets, others)
    )


def extract_into(
    folder: Path,
    base: Path,
    tuned: Path,
    rank: int,
    dtype: str = "float32",
    targets: tuple[str, ...] | None = None,
    others: Others = "refuse",
) -> ExtractReport:
    """Writes a peft LoRA adapter, the best one of its rank for each weight, into a folder that exists.

    Per weight D = W_tuned - W_base in fp32, and B A its best approximation of rank r (`factorise`);
    lora_alpha = r, so the scale is 1. One weight and its factors are in memory at a time. Weights that did
    not change get no factors.

    Args:
        rank: r of every weight; one with a shorter side is padded with zeros.
        dtype: of the adapter's tensors.
        targets: ends of names of the linear layers to factor (`q_proj`); None: all of them but the output layer.
        others: what to do with a change outside of them (embedding, output layer, norms, biases): `refuse`,
            `save` the tuned tensors whole (peft's modules_to_save and bias), or `leave` them out.

    Raises:
        UserError: a rank below 1, an unknown word for `others`.
        CheckpointError: checkpoints that do not fit one another, an architecture or a change that an
            adapter cannot hold, no change at all, naming the tensors.
    """
    if rank < 1:
        raise UserError("rank", str(rank), "give a number of at least 1")
    if others not in ("refuse", "save", "leave"):
        raise UserError("others", repr(others), "take refuse, save or leave")
    target = torch_dtype(dtype)
    one, other = open_model(base), open_model(tuned)
    together = align(one, [other])
    _refuse_architecture(one.checkpoint.config, together, base)
    parts = _sort(together, targets, others, tuned)
    slots = _slots(parts, rank, CODES[target])
    check_space(folder, sum(slot.nbytes for slot in slots), shutil.disk_usage(folder).free)
    written, reports, energy = _write_weights(folder / WEIGHTS, parts, slots, rank, target)
    config = _adapter_config(parts, rank, base, together.tied)
    files = {WEIGHTS: written}
    files[CONFIG] = write_file(folder / CONFIG, json.dumps(config, indent=2).encode() + b"\n")
    check_stamps(one.stamps | other.stamps)
    return ExtractReport(
        rank=rank,
        dtype=dtype,
        base=str(base),
        tuned=str(tuned),
        energy=energy,
        tensors=tuple(reports),
        saved=tuple(tensor.name for tensor in parts.saved),
        left=tuple(tensor.name for tensor in parts.left),
        files=files,
    )


def _write_weights(
    path: Path, parts: _Parts, slots: list[Slot], rank: int, dtype: torch.dtype
) -> tuple[dict[str, Any], list[ExtractedTensor], float]:
    """Writes factors and whole tensors; returns the file's digest, each weight's figures, the energy kept in all."""
    reports, kept, whole = [], 0.0, 0.0
    with FileWriter(path) as writer:
        writer.write(shard_header(slots))
        for tensor in parts.factored:
            factors, report, norm = _extract_one(tensor, rank)
            for factor in factors:
                _write(writer, factor.to(dtype), tensor)
            reports.append(report)
            kept, whole = kept + report.energy * norm, whole + norm
        for tensor in parts.saved:
            for rows in row_blocks(tensor.source.shape):
                _write(writer, read_rows(_tuned(tensor), *rows).to(dtype), tensor)
    return writer.describe(), reports, kept / whole if whole else 1.0


def _tuned(tensor: Aligned) -> TensorInfo:
    return tensor.inputs[0].source


def _differs(tensor: Aligned) -> bool:
    """Whether training changed a value; another dtype alone is no change."""
    if tensor.source.dtype not in FLOATS:
        return False  # aligned: equal
    return any(
        not torch.equal(read_rows(tensor.source, *rows).float(), read_rows(_tuned(tensor), *rows).float())
        for rows in row_blocks(tensor.source.shape)
    )


def _sort(together: Alignment, targets: tuple[str, ...] | None, others: Others, tuned: Path) -> _Parts:
    changed = [tensor for tensor in together.tensors if _differs(tensor)]
    if not changed:
        raise CheckpointError(str(tuned), "does not differ from the base", "give the model after training")
    parts = _Parts([], [], [])
    for tensor in changed:
        if _is_target(tensor, targets):
            parts.factored.append(tensor)
        else:
            (parts.left if others == "leave" else parts.saved).append(tensor)
    if not parts.factored:
        raise CheckpointError(str(tuned), f"no linear layer that is a target changed ({_names(changed)} did)")
    if parts.saved and others == "refuse":
        raise CheckpointError(
            str(tuned), f"changed too: {_names(parts.saved)}", "save them whole, leave them out, or add targets"
        )
    factored = {_module(tensor) for tensor in parts.factored}
    whole = {_module(tensor) for tensor in parts.saved} - factored  # peft loads such modules with all their tensors
    names = {tensor.name for tensor in parts.saved}
    saved = [tensor for tensor in together.tensors if tensor.name in names or _module(tensor) in whole]
    if together.tied:  # peft stores both sides
        saved += [replace(tensor, name="lm_head.weight") for tensor in saved if _is_embedding(tensor)]
    return replace(parts, saved=saved)


def _names(tensors: list[Aligned]) -> str:
    rest = f" and {len(tensors) - 5} more" if len(tensors) > 5 else ""
    return ", ".join(tensor.name for tensor in tensors[:5]) + rest


def _module(tensor: Aligned) -> str:
    return tensor.name.rpartition(".")[0]


def _is_bias(tensor: Aligned) -> bool:
    return tensor.name.endswith(".bias")


def _is_embedding(tensor: Aligned) -> bool:
    return _module(tensor).rsplit(".", 1)[-1] in EMBEDDINGS


def _is_target(tensor: Aligned, targets: tuple[str, ...] | None) -> bool:
    module, _, kind = tensor.name.rpartition(".")
    if kind != "weight" or len(tensor.source.shape) != 2 or _is_embedding(tensor):
        return False
    if targets is None:
        return module.rsplit(".", 1)[-1] not in HEADS
    return any(module == target or module.endswith(f".{target}") for target in targets)


def _refuse_architecture(config: dict[str, Any], together: Alignment, base: Path) -> None:
    """Refuses what peft would see under other names or shapes than the files have."""
    if config.get("model_type") in _TRANSPOSED:
        raise CheckpointError(str(base), f"{config['model_type']} stores linear layers as (in, out)", "not supported")
    experts = next((tensor.name for tensor in together.tensors if ".experts." in tensor.name), None)
    if experts:
        raise CheckpointError(
            str(base), f"{experts} is a mixture's expert: these are fused when loaded", "not supported"
        )


def _slots(parts: _Parts, rank: int, code: str) -> list[Slot]:
    """The adapter's tensors, in the order in which they are written."""
    slots = []
    for tensor in parts.factored:
        outputs, inputs = tensor.source.shape
        slots.append(Slot(f"{PREFIX}{_module(tensor)}.lora_A.weight", code, (rank, inputs)))
        slots.append(Slot(f"{PREFIX}{_module(tensor)}.lora_B.weight", code, (outputs, rank)))
    wrapped = {_module(tensor) for tensor in parts.factored}
    for tensor in parts.saved:
        infix = "base_layer." if _module(tensor) in wrapped else ""
        name = f"{PREFIX}{_module(tensor)}.{infix}{tensor.name.rpartition('.')[2]}"
        slots.append(Slot(name, code, tensor.source.shape))
    return slots


def _extract_one(tensor: Aligned, rank: int) -> tuple[tuple[torch.Tensor, torch.Tensor], ExtractedTensor, float]:
    """Returns (A, B), the figures, and |D|^2."""
    base = read_tensor(tensor.source).float()
    size = torch.linalg.vector_norm(base, dtype=torch.float64).item()
    difference = read_tensor(_tuned(tensor)).float().sub_(base)
    del base
    whole = torch.linalg.vector_norm(difference, dtype=torch.float64).item() ** 2
    if not math.isfinite(whole):
        raise CheckpointError(str(_tuned(tensor).file), f"{tensor.name} holds values that are not finite")
    a, b, kept = factorise(difference, rank)
    energy = min(1.0, kept / whole) if whole else 1.0
    change = math.sqrt(whole) / size if size else None
    return (a, b), ExtractedTensor(tensor.name, change, energy), whole


def factorise(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Splits a matrix into the factors of its best approximation of a rank (Eckart and Young, 1936).

    With D = U S V^T: A = sqrt(S_r) V_r^T, B = U_r sqrt(S_r). For large matrices U and S come from a
    randomised range finder with power iterations (Halko, Martinsson, Tropp, arXiv 0909.4061, algorithms
    4.4 and 5.1; seeded): Q spans (D D^T)^4 D G with G Gaussian, then an exact SVD of Q^T D.

    Args:
        matrix: fp32, shape (out, in).

    Returns:
        A (rank, in) and B (out, rank) in fp32, padded with zeros beyond the shorter side, and the energy
        kept, sum of the squared singular values; by projection it is that of B A also when randomised.
    """
    sketch = rank + max(16, rank // 2)
    basis = None
    if min(matrix.shape) > max(_EXACT, sketch):
        generator = torch.Generator().manual_seed(0)
        basis = torch.linalg.qr(matrix @ torch.randn(matrix.shape[1], sketch, generator=generator)).Q
        for _ in range(_POWER):
            basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
    u, s, vt = torch.linalg.svd(matrix if basis is None else basis.T @ matrix, full_matrices=False)
    u, s, vt = u[:, :rank], s[:rank], vt[:rank]
    if basis is not None:
        u = basis @ u
    a, b = torch.zeros(rank, matrix.shape[1]), torch.zeros(matrix.shape[0], rank)
    a[: len(s)], b[:, : len(s)] = s.sqrt()[:, None] * vt, u * s.sqrt()
    return a, b, float(s.double().square().sum())


def _write(writer: FileWriter, values: torch.Tensor, tensor: Aligned) -> None:
    if not values.isfinite().all():
        raise CheckpointError(tensor.name, f"is not finite in {values.dtype}", "choose bfloat16 or float32")
    writer.write_tensor(values)


def _adapter_config(parts: _Parts, rank: int, base: Path, tied: bool | None) -> dict[str, Any]:
    """What peft needs to load the adapter; modules by their full names, so that no other one is hit."""
    modules = {_module(tensor) for tensor in parts.factored}
    whole = sorted({_module(tensor) for tensor in parts.saved if _module(tensor) not in modules})
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "all" if any(_is_bias(tensor) and _module(tensor) in modules for tensor in parts.saved) else "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "trainable_token_indices": None,
        "target_modules": sorted(modules),
        "modules_to_save": whole or None,
        "ensure_weight_tying": bool(tied) and any(_is_embedding(tensor) for tensor in parts.saved),
    }
