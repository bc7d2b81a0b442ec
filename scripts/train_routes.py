"""What `bench_train.py` measures: the same rows through our trainers, and through TRL's own.

`measure` runs one route in the process that calls it. Ours is what a stage does between data and saving:
`load_trainable`, `fit_sft` or `fit_dpo`, `reference_logps`, `fit`.
TRL's is `SFTTrainer` or `DPOTrainer` on tokenised rows, so that neither side is timed while it reads or tokenises.
"""

from __future__ import annotations

import heapq
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from train_work import PROFILED, Route, Run, Work, sync
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PrinterCallback,
    TrainerCallback,
    set_seed,
)
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from posttrain.models.lineage import lineage_of
from posttrain.models.load import DTYPES
from posttrain.pretraining.fit import fit
from posttrain.pretraining.loop import Loop, Step
from posttrain.pretraining.metrics import MetricsLog
from posttrain.pretraining.rows import Row
from posttrain.recipe.schema import Method, Runtime
from posttrain.stages.context import Context, Events
from posttrain.stages.fitting import Fitted, fit_dpo, fit_sft
from posttrain.stages.setup import Machine, set_up
from posttrain.stages.trainable import Policy, load_trainable
from posttrain.training.memory import peak_resident
from posttrain.training.pairs import Pair
from posttrain.training.reference import reference_logps

RANK, ALPHA = 16, 32
warnings.simplefilter("ignore", FutureWarning)  # of names that transformers will drop


class _Watch(TrainerCallback):
    """When steps end, what they held and what they lost; and a profile of the steps after those."""

    def __init__(self, trainer: Any, work: Work, held: Callable[[int, Any], tuple[Any, Any, Any]]) -> None:
        """Args: `held`: number of a micro batch and its inputs -> (rows, tokens, supervised)."""
        self.work, self.timed, self.profiler = work, 0, None
        self.begun, self.ends, self.cuts = 0.0, [], []
        self.held: list[tuple[Any, Any, Any]] = []
        self.losses: list[torch.Tensor] = []
        train = trainer.training_step

        def step(model: Any, inputs: Any, *rest: Any, **more: Any) -> torch.Tensor:
            self.held.append(held(len(self.held), inputs))
            self.losses.append(train(model, inputs, *rest, **more))
            return self.losses[-1]

        trainer.training_step = step
        trainer.add_callback(self)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.timed = state.max_steps - (PROFILED if self.work.profile else 0)
        if self.work.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
        self.begun = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        sync(self.work.device)
        self.ends.append(time.perf_counter())
        self.cuts.append(len(self.held))
        if self.work.profile and state.global_step == self.timed:
            self.profiler = torch.profiler.profile()
            self.profiler.start()
        if self.profiler and state.global_step == state.max_steps:
            self.profiler.stop()
            by = "self_cuda_time_total" if self.work.device == "cuda" else "self_cpu_time_total"
            self.work.profile.write_text(self.profiler.key_averages().table(sort_by=by, row_limit=40))

    def run(self, reference_seconds: float, notes: dict[str, Any]) -> Run:
        """The figures of the timed steps."""
        first = min(self.work.warm_up, self.timed - 1)
        begun = self.ends[first - 1] if first else self.begun
        start = self.cuts[first - 1] if first else 0
        counts = self.held[start : self.cuts[self.timed - 1]]
        rows, tokens, supervised = (int(sum(map(int, column))) for column in zip(*counts, strict=True))
        losses = [sum(map(float, self.losses[a:b])) for a, b in zip([0, *self.cuts], self.cuts, strict=False)]
        cuda = self.work.device == "cuda"
        return Run(
            seconds=self.ends[self.timed - 1] - begun,
            reference_seconds=reference_seconds * rows / len(self.work.rows),
            steps=self.timed - first,
            rows=rows,
            tokens=tokens,
            supervised=supervised,
            peak_bytes=torch.cuda.max_memory_allocated() if cuda else peak_resident(),
            losses=losses,
            notes=notes,
        )


def measure(work: Work, route: Route) -> Run:
    """Trains once over the rows by a route."""
    with tempfile.TemporaryDirectory(prefix="bench-train-") as folder:
        return (_ours if route.ours else _trl)(work, route, Path(folder))


def _held_rows(rows: list[Any]) -> tuple[int, int, int]:
    tokens = sum(len(row) if isinstance(row, Row) else row.tokens for row in rows)
    return len(rows), tokens, sum(row.supervised for row in rows)


def _ours(work: Work, route: Route, folder: Path) -> Run:
    adapter = {"r": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.0, "trainable_tokens": "none"}
    method = Method.model_validate("full" if work.method == "full" else {work.method: adapter})
    trainer_fields = {
        "learning_rate": work.learning_rate,
        "lr_scheduler_type": "constant",
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "optim": "adamw_torch_fused",
        "global_batch_size": work.batch,
    }
    context = Context(
        run_dir=folder,
        recipe_dir=folder,
        stage="bench",
        folder=folder,
        seed=0,
        precision=work.precision,
        runtime=Runtime(device=work.device, micro_batch_tokens=work.micro_batch_tokens),
        trainer=trainer_fields,
        inputs={},
        identity={},
        fingerprint="",
        events=Events(None),
        should_stop=lambda: False,
    )
    machine = set_up(context)
    tokenizer = AutoTokenizer.from_pretrained(work.model)
    policy = load_trainable(lineage_of(work.model, str(work.model)), method, machine, context, [], {})
    prepare = _our_sft if work.task == "sft" else _our_dpo
    trainer, make_step, spent, notes = prepare(work, policy, tokenizer, machine, context)
    watch = _Watch(trainer, work, lambda number, _: _held_rows(work.of_step(number)))
    loop = Loop(
        steps=work.steps,
        make_step=make_step,
        checkpoints=folder / "checkpoints",
        metrics=MetricsLog(folder / "metrics.jsonl", 0),
    )
    fit(trainer, _without_checkpoints(trainer, loop))
    return watch.run(spent, notes)


def _without_checkpoints(trainer: Any, loop: Loop) -> Loop:
    """TRL's routes keep none either."""
    trainer.args.save_strategy = "no"
    return loop


def _our_sft(work: Work, policy: Policy, tokenizer: Any, machine: Machine, context: Context) -> tuple:
    def largest(count: int) -> list[Row]:
        return heapq.nlargest(count, work.rows, key=len)

    quantization, steps = policy.quantization, work.steps
    fitted, make_step = fit_sft(policy.model, quantization, tokenizer, machine, context, steps, work.of_step, largest)
    return fitted.trainer, make_step, 0.0, _notes(fitted)


def _notes(fitted: Fitted) -> dict[str, Any]:
    limits = fitted.trial.limits
    return {
        "attention": fitted.attention.backend,
        "piece_tokens": limits.tokens,
        "row_tokens": limits.row_tokens,
        "predicted_bytes": fitted.predicted_bytes,
    }


def _our_dpo(work: Work, policy: Policy, tokenizer: Any, machine: Machine, context: Context) -> tuple:
    pairs: list[Pair] = work.rows
    fitted, sharing, cut = fit_dpo(policy, tokenizer, machine, context, pairs, work.steps)
    trainer, pad = fitted.trainer, tokenizer.pad_token_id

    def reference(some: list[Pair], name: str) -> torch.Tensor:
        cache = context.folder / name
        return reference_logps(trainer, some, pad, fitted.trial.limits, cache, context.events, context.should_stop)

    reference(pairs[: work.batch], "warm.npy")
    sync(work.device)
    begun = time.perf_counter()
    known = reference(pairs, "all.npy")
    sync(work.device)
    spent = time.perf_counter() - begun

    def make_step(step: int) -> Step:
        at = slice(step * work.batch, (step + 1) * work.batch)
        return cut(pairs[at], known[at])

    return trainer, make_step, spent, _notes(fitted) | {"sharing": sharing.note}


class _TimedDpo(DPOTrainer):
    """Takes tokenised rows, and times the reference that it computes before training."""

    reference_seconds = 0.0

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        super()._precompute_ref_logps(dataset.select(range(min(len(dataset), batch_size))), "warm-up", batch_size)
        sync(self.args.device.type)
        begun = time.perf_counter()
        found = super()._precompute_ref_logps(dataset, name, batch_size)
        sync(self.args.device.type)
        self.reference_seconds = time.perf_counter() - begun
        return found


def _trl(work: Work, route: Route, folder: Path) -> Run:
    dataset = Dataset.from_list(list(map(_columns, work.rows)))
    arguments = _trl_arguments(work, route, folder)
    adapter = None
    if work.method != "full":
        adapter = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    dtype = torch.float32 if route.defaults or work.method == "full" else DTYPES[work.precision]
    given = {"processing_class": AutoTokenizer.from_pretrained(work.model), "peft_config": adapter}
    set_seed(0)
    given["model"] = _trl_model(work, dtype)
    if work.task == "sft":
        if route.packing:  # about as many documents in a step as elsewhere
            packs = _packs(dataset, work)
            arguments["gradient_accumulation_steps"] = max(1, round(packs * work.batch / len(dataset) / route.batch))
        trainer: Any = SFTTrainer(args=SFTConfig(**arguments), train_dataset=dataset, **given)
        watch = _Watch(trainer, work, _held_sft)
    else:
        if work.method == "full" and not route.precompute:
            given["ref_model"] = _trl_model(work, dtype)
        trainer = _TimedDpo(args=DPOConfig(**arguments), train_dataset=dataset, **given)
        watch = _Watch(trainer, work, _held_dpo)
    trainer.pop_callback(PrinterCallback)
    trainer.train()
    spent = trainer.reference_seconds if work.task == "dpo" else 0.0
    return watch.run(spent, {"dtype": str(dtype), "batch": route.batch, "packing": route.packing, "order": route.order})


def _columns(row: Any) -> dict[str, Any]:
    if isinstance(row, Row):
        return {"input_ids": row.ids.tolist(), "labels": row.labels.tolist()}
    parts = {"prompt_ids": row.prompt, "chosen_ids": row.chosen, "rejected_ids": row.rejected}
    return {**{name: part.tolist() for name, part in parts.items()}, "length": row.longest}


def _trl_model(work: Work, dtype: torch.dtype) -> Any:
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": "sdpa"}
    if work.method == "qlora":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=DTYPES[work.precision],
        )
        options["device_map"] = {"": 0 if work.device == "cuda" else "cpu"}
    return AutoModelForCausalLM.from_pretrained(work.model, **options)


def _packs(dataset: Dataset, work: Work) -> int:
    from trl.data_utils import pack_dataset

    return len(pack_dataset(dataset.select_columns(["input_ids", "labels"]), work.max_length, "bfd"))


def _trl_arguments(work: Work, route: Route, folder: Path) -> dict[str, Any]:
    """Fields of TRL's config: what both its routes need, and what its best one sets."""
    arguments: dict[str, Any] = {
        "output_dir": str(folder),
        "num_train_epochs": 1,
        "gradient_accumulation_steps": max(1, work.batch // route.batch),
        "per_device_train_batch_size": route.batch,
        "learning_rate": work.learning_rate,
        "lr_scheduler_type": "constant",
        "max_length": work.max_length,
        "use_cpu": work.device == "cpu",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 0,
    }
    if route.defaults:
        return arguments
    arguments |= {"gradient_checkpointing": False, "bf16": work.precision == "bf16"}
    arguments |= {"train_sampling_strategy": route.order}
    if work.task == "sft":
        return arguments | {"packing": route.packing, "packing_strategy": "bfd"}
    # lengths stand in a column of their own, which would be removed
    return arguments | {"precompute_ref_log_probs": route.precompute, "remove_unused_columns": False}


def _held_sft(number: int, inputs: dict[str, torch.Tensor]) -> tuple[Any, Any, Any]:
    supervised = (inputs["labels"][:, 1:] != -100).sum()
    if "attention_mask" in inputs:
        return len(inputs["input_ids"]), inputs["attention_mask"].sum(), supervised
    return (inputs["position_ids"] == 0).sum(), inputs["position_ids"].numel(), supervised


def _held_dpo(number: int, inputs: dict[str, torch.Tensor]) -> tuple[Any, Any, Any]:
    return len(inputs["input_ids"]) // 2, inputs["attention_mask"].sum(), inputs["completion_mask"].sum()
