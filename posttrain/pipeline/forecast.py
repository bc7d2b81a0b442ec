"""What the stages of a plan will need on a device, before anything is loaded: memory, steps, time, energy, disk."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from posttrain.artifact import Artifact
from posttrain.estimate import cost as costs
from posttrain.estimate.activations import Pass, counted_as
from posttrain.estimate.devices import GpuModel, cpu_here, gpu_here
from posttrain.estimate.memory import Memory, Piece, host_bytes, largest_micro_batch, predict
from posttrain.estimate.remedies import Remedy, Setting, remedies
from posttrain.estimate.spread import ALONE, Spread
from posttrain.estimate.weights import ITEM, is_known_optimizer, quantised, static_bytes
from posttrain.pipeline.forecast_rows import Rows, rows_of
from posttrain.pipeline.plan import Plan
from posttrain.pipeline.shapes import Shapes, Standing
from posttrain.stages.context import Job
from posttrain.stages.samples import Samples
from posttrain.stages.spread import spread_of
from posttrain.training.sizes import PIECE_TOKENS, ROW_OF_DENSE_MASK

TRAINING = ("pretrain", "sft", "dpo")
_DTYPES = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True)
class StageForecast:
    """What one stage will need."""

    stage: str
    kind: str
    parameters: int | None = None
    trainable: int | None = None
    spread: Spread | None = None
    """How it lies over processes; memory and piece are those of one of them."""
    memory: Memory | None = None
    before: int | None = None
    """Bytes that each device must hold before DeepSpeed cuts the model: a stage tries its heaviest piece first."""
    host: int | None = None
    """Bytes that the processes of one machine keep in its own memory, instead of on their devices."""
    piece: Piece | None = None
    largest: int | None = None
    """Tokens of the largest piece that fits the device."""
    fits: bool | None = None
    """None where no device is known, or its memory does not matter."""
    rows: Rows | None = None
    flops_per_token: float | None = None
    seconds: float | None = None
    watt_hours: float | None = None
    time_source: str = ""
    disk: int | None = None
    measured_bytes: int | None = None
    """Peak of the run that finished, where there is one."""
    remedies: tuple[Remedy, ...] = ()
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Plain form."""
        made = asdict(self)
        if self.memory is not None:
            made["memory"] |= {"allocated": self.memory.allocated, "device": self.memory.device}
        if self.rows is not None:
            made["rows"] |= {"dropped_share": self.rows.dropped_share}
        return made


@dataclass(frozen=True)
class Forecast:
    """What a run will need."""

    recipe: str
    device: GpuModel | None
    stages: tuple[StageForecast, ...]
    settled: bool = True
    """Whether the run is meant for this device: named, or a GPU that is here. A CPU may have swap, or be another."""

    @property
    def too_large(self) -> tuple[StageForecast, ...]:
        """Stages that will not fit."""
        return tuple(stage for stage in self.stages if stage.fits is False)

    def as_dict(self) -> dict[str, Any]:
        """Plain form for `--json`; keys are only ever added."""
        device = asdict(self.device) if self.device is not None else None
        return {
            "format": 1,
            "recipe": self.recipe,
            "device": device,
            "fits": not self.too_large,
            "disk": sum(stage.disk or 0 for stage in self.stages),
            "stages": [stage.as_dict() for stage in self.stages],
        }


def forecast(planned: Plan, device: GpuModel | None, samples: Samples | None = None) -> Forecast:
    """Estimates every stage of a plan.

    Args:
        device: what it shall run on; None: the GPU that is here, else the CPU where the recipe allows it.
        samples: rows that `preflight` has read; others are read now.

    Raises:
        UserError: a row that was sampled is one that its stage would refuse.
    """
    samples = samples or Samples()
    jobs = {stage.stage: stage.job for stage in planned.stages}
    shapes = Shapes(jobs)
    runtimes = [job.runtime for job in jobs.values()]
    chosen = device or device_here(runtimes)
    made = [
        _training(job, shapes, chosen, samples) if job.kind in TRAINING else _other(job, shapes)
        for job in jobs.values()
    ]
    settled = device is not None or (chosen is not None and chosen.kind == "cuda")
    return Forecast(planned.run_dir.name, chosen, tuple(made), settled)


def device_here(runtimes: Sequence[Mapping[str, Any]]) -> GpuModel | None:
    """The device that stages of some runtimes get on this machine; None where one asks for a GPU that is not there."""
    wanted = {str(runtime.get("device")) for runtime in runtimes}
    gpu = gpu_here() if wanted != {"cpu"} else None
    if gpu is not None:
        return gpu
    return None if "cuda" in wanted else cpu_here()


def _training(job: Job, shapes: Shapes, device: GpuModel | None, samples: Samples) -> StageForecast:
    standing = shapes.left(job.stage) if job.kind == "pretrain" else shapes.read(job)
    if standing is None:
        return StageForecast(
            job.stage, job.kind, notes=(shapes.missing.get(job.stage, "its model's shape is unknown"),)
        )
    setting = _setting(job, standing, shapes, device)
    model, method = standing.architecture, setting.how.method
    spread = setting.how.spread
    each = spread.processes // spread.machines if device is not None and device.kind == "cpu" else 1
    budget = device.memory // each if device is not None else None  # processes on CPUs share their memory
    largest = _largest(setting, budget) if budget is not None else None
    before = replace(setting, how=replace(setting.how, spread=ALONE)).smallest() if spread.low else None
    fits = None if budget is None else largest is not None and (before or 0) <= budget
    tokens = setting.longest if fits is False else _tokens(job, setting, largest)
    piece = replace(setting.piece, tokens=tokens)
    piece = replace(piece, row_tokens=min(piece.tokens, max(setting.row_tokens or piece.tokens, setting.longest)))
    memory = predict(model, setting.how, setting.optim, piece)
    static = static_bytes(model, method, setting.how.precision, setting.optim)
    rows = rows_of(job, shapes.jobs, samples)
    notes = [*_notes(job, standing, setting, device), *_too_many_dropped(job, rows)]
    spent = _cost(job, setting, rows, device)
    return StageForecast(
        stage=job.stage,
        kind=job.kind,
        parameters=model.parameters,
        trainable=static.trainable_parameters,
        spread=spread,
        memory=memory,
        before=before,
        host=host_bytes(model, setting.how, setting.optim) * spread.processes // spread.machines or None,
        piece=piece,
        largest=largest,
        fits=fits,
        rows=rows,
        flops_per_token=spent.flops_per_token,
        seconds=spent.seconds,
        watt_hours=spent.watt_hours,
        time_source=spent.source,
        disk=_training_disk(job, setting, rows),
        measured_bytes=_measured(job),
        remedies=tuple(remedies(setting, budget)) if fits is False and budget is not None else (),
        notes=tuple(notes),
    )


def _setting(job: Job, standing: Standing, shapes: Shapes, device: GpuModel | None) -> Setting:
    """How a stage trains, as plain values."""
    kind = "cpu" if job.runtime.get("device") == "cpu" or (device is not None and device.kind == "cpu") else "cuda"
    attention = counted_as(str(job.runtime.get("attn_implementation")))
    method = shapes.method(job, standing)
    how = Pass(job.precision, kind, attention, method, spread_of(job.runtime))  # type: ignore[arg-type]
    length = int(job.config["data"]["max_length"])
    longest = 2 * length if job.kind == "dpo" else length
    row = None if attention == "fused" else ROW_OF_DENSE_MASK[kind]
    recompute = job.trainer.get("gradient_checkpointing") is True
    optim = str(job.trainer.get("optim"))
    piece = Piece(PIECE_TOKENS[kind], row or PIECE_TOKENS[kind], recompute)
    return Setting(standing.architecture, how, optim, piece, longest, row)


def _largest(setting: Setting, budget: int) -> int | None:
    recompute = setting.piece.checkpointing
    return largest_micro_batch(
        setting.model, setting.how, setting.optim, budget, recompute, setting.longest, setting.row_tokens
    )


def _tokens(job: Job, setting: Setting, largest: int | None) -> int:
    """Tokens of a piece: what the recipe says, else what fits, never less than the longest row or pair.

    A process gets its part of a step, of rows of the greatest length so many.
    """
    asked, most = job.runtime.get("micro_batch_tokens"), job.runtime.get("micro_batch_size")
    tokens = asked if isinstance(asked, int) else min(setting.piece.tokens, largest or setting.piece.tokens)
    if isinstance(most, int):
        tokens = min(tokens, most * setting.longest)
    batch = math.ceil(int(job.trainer["global_batch_size"]) / setting.how.spread.processes) * setting.longest
    return max(min(tokens, batch), setting.longest)


def _cost(job: Job, setting: Setting, rows: Rows, device: GpuModel | None) -> costs.Cost:
    length = setting.longest / (2 if job.kind == "dpo" else 1)
    recompute = setting.piece.checkpointing
    flops = costs.flops_per_token(setting.model, setting.how.method, length, recompute)
    if job.kind == "dpo":
        flops += costs.reference_flops_per_token(setting.model, length)
    devices = setting.how.spread.processes
    seen = _throughput(job, device, devices)
    if rows.tokens is None:
        return costs.Cost(flops, None, None, "how many tokens there are is not known before the rows are read")
    passed = rows.tokens - (rows.shared or 0) if rows.source == "record" else rows.tokens  # a record knows if it shared
    return costs.cost(flops, passed, device, seen, devices)


def _throughput(job: Job, device: GpuModel | None, devices: int) -> float | None:
    """Tokens per second that this stage reached on so many of this kind of device, from the log it left."""
    for name in (job.stage, f"{job.stage}.partial"):
        path = Path(job.run_dir) / name / "metrics.jsonl"
        done = Artifact.read(path.parent)
        if not path.is_file() or done is None or device is None:
            continue
        told = done.record.provenance
        if (told.get("gpu") or "this machine's CPU") != device.name or told.get("processes", 1) != devices:
            continue
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        seconds = sum(line["seconds"] for line in lines if "seconds" in line)
        tokens = sum(line["tokens_per_second"] * line["seconds"] for line in lines if "seconds" in line)
        if seconds:
            return tokens / seconds
    return None


def _measured(job: Job) -> int | None:
    done = Artifact.read(Path(job.run_dir) / job.stage)
    memory = done.record.summary.get("metrics", {}).get("memory") if done is not None else None
    return memory.get("measured_bytes") if memory else None


def _training_disk(job: Job, setting: Setting, rows: Rows) -> int:
    static = static_bytes(setting.model, setting.how.method, setting.how.precision, setting.optim)
    keep, every = job.trainer.get("save_total_limit"), job.config.get("snapshots", {}).get("every")
    kept = int(keep) if keep else math.ceil((rows.steps or 0) / float(job.trainer["save_steps"]))
    snapshots = (rows.steps or 0) // int(every) if every else 0
    item = ITEM[setting.how.precision]
    disk = costs.training_disk(setting.model, setting.how.method, static, kept, item, snapshots)
    return disk + (8 * (rows.rows or 0) if job.kind == "dpo" else 0)  # two fp32 reference log-probs a pair


def _other(job: Job, shapes: Shapes) -> StageForecast:
    """A stage that trains nothing: its models' weights, and what it writes."""
    labels = [label for label in job.inputs if label not in ("report", "tokenizer")]
    found = [standing for label in labels if (standing := shapes.read(job, label)) is not None]
    if not found:
        return StageForecast(
            job.stage, job.kind, notes=(shapes.missing.get(job.stage, "its model's shape is unknown"),)
        )
    parameters = max(standing.architecture.parameters for standing in found)
    item = _DTYPES[job.config["dtype"]] if "dtype" in job.config else ITEM[job.precision]  # type: ignore[index]
    copies = {"merge": 1, "publish": 2 if job.config.get("to") else 1}.get(job.kind, 0)
    return StageForecast(job.stage, job.kind, parameters=parameters, disk=copies * item * parameters)


def _notes(job: Job, standing: Standing, setting: Setting, device: GpuModel | None) -> list[str]:
    notes, method = [], setting.how.method
    if not standing.architecture.known:
        kind = standing.architecture.model_type
        notes.append(f"blocks of {kind} are not among the known ones: activations by the formula for Llama's")
    if method.four_bits and not quantised(standing.architecture):
        notes.append(f"no layer of {standing.architecture.model_type} can be quantised: use lora")
    if not is_known_optimizer(setting.optim):
        notes.append(f"the state of {setting.optim} is counted as that of Adam in 32 bits")
    notes += _spread_notes(job, setting)
    if device is not None and not device.bf16 and job.precision == "bf16":
        notes.append(f"{device.name} has no bf16: set precision: fp16")
    return notes


def _spread_notes(job: Job, setting: Setting) -> list[str]:
    """What is meant by the figures of a stage of several processes."""
    spread = setting.how.spread
    if spread.processes == 1:
        return []
    over = f" on {spread.machines} machines" if spread.machines > 1 else ""
    notes = [
        f"memory is that of one of {spread.processes} processes{over} ({spread.kind}); time is divided by them,"
        " what they tell one another is not counted"
    ]
    if spread.low:
        notes.append("DeepSpeed's own buffers by their default sizes; what ZeRO-3 keeps gathered is the most it may")
        notes.append("each device holds the whole model until its heaviest piece was tried; DeepSpeed cuts it then")
    here = spread.processes // spread.machines
    if spread.kind == "fsdp":
        whole = static_bytes(setting.model, setting.how.method, setting.how.precision, setting.optim)
        loading = _gib(here * (whole.weights + whole.trainable))
        notes.append(f"each process reads the whole model before it is cut: {loading} of a machine's own memory")
    host = host_bytes(setting.model, setting.how, setting.optim) * here
    if host:
        notes.append(f"what lies in a machine's own memory in training: {_gib(host)}")
    return notes


def _too_many_dropped(job: Job, rows: Rows) -> list[str]:
    """What a sample foretells; where all rows were looked at, the ledger has refused them by now."""
    most = float(job.config["data"]["max_dropped"])
    if rows.exact or rows.dropped_share is None or rows.dropped_share <= most:
        return []
    return [f"about {rows.dropped_share:.1%} of its rows will be dropped, more than max_dropped allows ({most:g})"]


def no_room(found: Forecast) -> str:
    """One sentence for each stage that will not fit: why, and with what it would."""
    assert found.device is not None
    return "\n  ".join(_no_room(stage, found.device.memory) for stage in found.too_large)


def _no_room(stage: StageForecast, have: int) -> str:
    assert stage.memory is not None
    parts = {name: size for name, size in asdict(stage.memory).items() if name != "margin"}
    largest = max(parts, key=lambda name: parts[name])
    ways = "; ".join(f"{remedy.change} ({_gib(remedy.bytes)})" for remedy in stage.remedies)
    would = f"it would fit with {ways or 'none of the changes known here'}"
    if stage.before is not None and stage.before > have >= stage.memory.device:
        needs = f"DeepSpeed cuts it after its longest row was tried whole, which needs {_gib(stage.before)} of"
        return f"{stage.stage} will not fit: {needs} {_gib(have)}; {would}"
    return (
        f"{stage.stage} will not fit: its longest row alone needs {_gib(stage.memory.device)} of {_gib(have)}, most of"
        f" it {largest} ({_gib(parts[largest])}); {would}"
    )


def _gib(size: int) -> str:
    return f"{size / (1 << 30):.1f} GiB"
