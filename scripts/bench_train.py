"""Times our training beside TRL's, on the same rows, model, global batch and optimizer steps, taking turns.

    POSTTRAIN_SHARED=../shared python scripts/bench_train.py [--tasks sft dpo] [--repeats 5] [--json FILE]
    python scripts/bench_train.py --device cuda --shape 1b --method lora --tasks dpo [--lengths FILE]
    python scripts/bench_train.py --suite gpu [--lengths FILE] [--profile DIR]     every GPU figure, below ten minutes

Routes, each measurement in a fresh process (forked after the imports on the CPU, started anew on a GPU):

    ours          what a stage does between data and saving, with the defaults of a recipe
    TRL best      our dtype, sdpa, no gradient checkpointing; the fastest of: per-device batch 1, 2, 4, 8, 16
                  accumulated to the global batch; sft: packed by bfd, or padded and grouped by length;
                  dpo: grouped by length, reference live or precomputed. A short calibration picks it.
    TRL defaults  its config as it comes, accumulated to the global batch

Every route sees every row once. Imports, loading and tokenising are not counted, nor the first optimizer steps
(`--warm-up`); tokens are those of the rows in the timed steps, padding left out, a pair's prompt in both its
sequences. Reference log-probs that are computed before training count with the share of the timed rows, and stand
in a column of their own. Where TRL packs, an optimizer step holds about as many rows as elsewhere, not the same ones.

MFU: operations that the task needs (`train_work.flops_per_token`: head at supervised tokens only, causal attention
within documents, no recomputation, no padding; frozen weights need no gradient) over the matrix-product rate of the
device in the run's precision, measured first. Loss curves are compared on the same rows in each step, in fp32.
Ratios are medians of the repeats' ratios in supervised tokens per second. Exit code 1 where one misses its target,
or the loss curves differ by more than 1e-4.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as our stages set it: for all routes alike
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # this process forks
os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}

import train_suite
from train_routes import measure
from train_work import (
    SHAPES,
    Route,
    Run,
    Work,
    documents,
    flops_per_token,
    made_tokenizer,
    make_model,
    matmul_rate,
    pairs_of_lengths,
    preferences,
    save_lengths,
    whole_documents,
)

TARGETS = {
    ("sft", "TRL best"): 1.0,
    ("dpo", "TRL best"): 1.4,
    ("sft", "TRL defaults"): 1.8,
    ("dpo", "TRL defaults"): 1.8,
}
SAME = 1e-4
"""Largest relative difference of a step's loss in fp32."""
OURS = Route("ours", ours=True)
HOPELESS = 0.8
"""A calibration goes on to larger batches while they are at least this fast, compared with the best before."""


def in_child(device: str, work: Callable[..., Any], *given: Any) -> Any:
    """Calls a function in a process of its own; a process that forks must not have touched a GPU."""
    context = multiprocessing.get_context("fork" if device == "cpu" else "spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(work, *given).result()


def calibrate(work: Work, batches: list[int]) -> Route:
    """Tries TRL's settings on a few steps, one after another, and returns the fastest."""
    few = replace(work, rows=work.rows[: 3 * work.batch], warm_up=1, profile=None)
    families = (
        [{"packing": True}, {"order": "group_by_length"}]
        if work.task == "sft"
        else [{"order": "group_by_length", "precompute": precompute} for precompute in (True, False)]
    )
    found: list[tuple[float, Route]] = []
    measure(few, Route("warm-up", batch=batches[0]))
    for family in families:
        best = 0.0
        for batch in batches:
            route = Route("TRL best", batch=batch, **family)
            run = measure(few, route)
            rate = run.rate(run.supervised)
            print(f"  calibration: {spelled(route)}: {rate:,.0f} supervised tokens/s", flush=True)
            found.append((rate, route))
            if rate < HOPELESS * best:
                break
            best = max(best, rate)
    return max(found, key=lambda one: one[0])[1]


def spelled(route: Route) -> str:
    """TRL's settings in words."""
    how = "packed (bfd)" if route.packing else f"padded, {route.order}"
    return f"{how}, per-device batch {route.batch}{', reference precomputed' if route.precompute else ''}"


def loss_difference(work: Work, batch: int) -> float:
    """Largest relative difference of a step's loss between ours and TRL on the same rows in each step."""
    same = Route("TRL, same rows", batch=batch, order="sequential")
    few = replace(work, rows=work.rows[: 6 * work.batch], warm_up=0, learning_rate=1e-3, profile=None)
    ours, theirs = (in_child(work.device, measure, few, route).losses for route in (OURS, same))
    return max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))


def figures(work: Work, run: Run, rate: float) -> dict[str, float]:
    """One run as figures for people; `rate`: operations per second of the device."""
    flops = flops_per_token(work) * run.tokens
    return {
        "supervised_per_s": run.rate(run.supervised),
        "tokens_per_s": run.rate(run.tokens),
        "samples_per_s": run.rate(run.rows),
        "step_ms": 1e3 * run.seconds / run.steps,
        "reference_s": run.reference_seconds,
        "peak_gb": run.peak_bytes / 1e9,
        "mfu": flops / (run.seconds + run.reference_seconds) / rate,
    }


def medians(table: list[dict[str, float]]) -> dict[str, float]:
    """Each figure's own median."""
    return {name: statistics.median(one[name] for one in table) for name in table[0]}


def show(name: str, one: dict[str, float]) -> str:
    """One line of the table."""
    return (
        f"{name:<14}{one['supervised_per_s']:>12,.0f}{one['tokens_per_s']:>12,.0f}{one['samples_per_s']:>11,.1f}"
        f"{one['step_ms']:>10,.0f}{one['reference_s']:>9,.2f}{one['peak_gb']:>9.2f}{one['mfu']:>8.1%}"
    )


HEAD = (
    f"{'':<14}{'supervised/s':>12}{'tokens/s':>12}{'samples/s':>11}{'step ms':>10}{'ref. s':>9}{'peak GB':>9}{'MFU':>8}"
)


def compare(work: Work, repeats: int, batches: list[int], rate: float) -> dict[str, Any]:
    """Lets the routes take turns on one task, and prints what came out."""
    best = in_child(work.device, calibrate, work, batches)
    print(f"TRL best: {spelled(best)}", flush=True)
    difference = loss_difference(work, min(4, work.batch)) if work.precision == "fp32" else None
    if difference is not None:
        print(f"loss curves, same rows in each step: largest relative difference {difference:.1e} (limit {SAME:.0e})")
    routes = [OURS, best, Route("TRL defaults", defaults=True, batch=min(8, work.batch))]
    runs: dict[str, list[Run]] = {route.name: [] for route in routes}
    print(HEAD)
    for repeat in range(repeats):
        for route in routes:
            run = in_child(work.device, measure, work, route)
            runs[route.name].append(run)
            print(f"{show(route.name, figures(work, run, rate))}   {repeat + 1}", flush=True)
    shown = {name: medians([figures(work, run, rate) for run in found]) for name, found in runs.items()}
    print("medians")
    for name, one in shown.items():
        print(show(name, one))
    ratios = {}
    for other in ("TRL best", "TRL defaults"):
        pairs = zip(runs["ours"], runs[other], strict=True)
        each = [ours.rate(ours.supervised) / theirs.rate(theirs.supervised) for ours, theirs in pairs]
        ratios[other] = statistics.median(each)
        target = TARGETS[work.task, other]
        met = "met" if ratios[other] >= target else "MISSED"
        print(f"ours / {other}: {ratios[other]:.2f} ({min(each):.2f} to {max(each):.2f}), target {target}: {met}")
    missed = [other for other, ratio in ratios.items() if ratio < TARGETS[work.task, other]]
    return {
        "best": spelled(best),
        "loss_difference": difference,
        "medians": shown,
        "ratios": ratios,
        "notes": {name: found[0].notes for name, found in runs.items()},
        "runs": {name: [asdict(run) for run in found] for name, found in runs.items()},
        "missed": missed + (["loss curves"] if difference is not None and not difference <= SAME else []),
    }


def set_up(arguments: argparse.Namespace, task: str, folder: Path) -> Work:
    """Rows, tokenizer and model of one task."""
    shape = SHAPES[arguments.shape]
    count, shared = arguments.batch * (arguments.warm_up + arguments.steps), Path(arguments.shared)
    vocabulary = min(4096, shape.vocabulary)
    rows: list[Any]
    if task == "sft" and arguments.full_rows:
        made_tokenizer(folder)
        rows = whole_documents(count, arguments.max_length, vocabulary)
    elif task == "dpo" and arguments.lengths:
        made_tokenizer(folder)
        rows = pairs_of_lengths(arguments.lengths, count, arguments.max_length, vocabulary)
    else:
        read = documents if task == "sft" else preferences
        rows = read(shared, folder, count, arguments.max_length, vocabulary)  # type: ignore[operator]
    dtype = "fp32" if arguments.precision == "fp32" else "bf16"
    in_child(arguments.device, make_model, folder, shape, arguments.device, dtype)
    tokens = sum(len(row) if task == "sft" else row.tokens for row in rows)
    print(
        f"{task}, {arguments.method}, {arguments.precision}: {(shape.body + shape.head) / 1e6:,.1f} M parameters in"
        f" matrix products, {len(rows)} rows, {tokens:,} tokens, {arguments.batch} rows a step, {arguments.device}"
    )
    return Work(
        task=task,  # type: ignore[arg-type]
        rows=rows,
        model=folder,
        shape=shape,
        device=arguments.device,
        method=arguments.method,
        precision=arguments.precision,
        batch=arguments.batch,
        max_length=arguments.max_length,
        warm_up=arguments.warm_up,
        micro_batch_tokens=arguments.micro_batch_tokens,
    )


def options() -> argparse.Namespace:
    """The command line; `--tiny` and a GPU change defaults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=("sft", "dpo"), default=["sft", "dpo"])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--method", choices=("full", "lora", "qlora"), default="full")
    parser.add_argument("--batch", type=int, help="rows (documents or pairs) of an optimizer step")
    parser.add_argument("--steps", type=int, help="timed optimizer steps")
    parser.add_argument("--warm-up", type=int, default=2, help="steps before those that are timed")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--micro-batch-tokens", type=int, help="of our pieces; default: what a stage chooses")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--suite", choices=("gpu",), help="the figures of a GPU in one call")
    parser.add_argument("--measure", choices=("matmul",), help="only the rate of matrix products")
    parser.add_argument("--profile", type=Path, metavar="DIR", help="with --suite: tables of torch's profiler")
    parser.add_argument("--full-rows", action="store_true", help="sft: made documents of --max-length tokens")
    parser.add_argument("--lengths", type=Path, help="dpo: made pairs of the lengths in this file, instead of data")
    parser.add_argument("--save-lengths", type=Path, metavar="FILE", help="write such a file from the data, and stop")
    parser.add_argument("--tiny", action="store_true", help="run every line in seconds; nothing is judged by speed")
    parser.add_argument("--json", type=Path, help="write every figure there")
    given = parser.parse_args()
    given.shared = os.environ.get("POSTTRAIN_SHARED", "../shared")
    given.shape = given.shape or ("tiny" if given.tiny else "1b" if given.device == "cuda" else "small")
    given.precision = "bf16" if given.device == "cuda" else "fp32"
    given.batch = given.batch or (4 if given.tiny else 16)
    given.steps = given.steps or (2 if given.tiny else 8)
    if given.tiny:
        given.repeats, given.max_length, given.warm_up = 1, 64, 1
    return given


def main() -> None:
    """Measures what was asked for, prints, judges."""
    arguments = options()
    if arguments.suite:
        sys.exit(train_suite.run(arguments, partial(in_child, "cpu" if arguments.tiny else "cuda")))
    if arguments.save_lengths:
        with tempfile.TemporaryDirectory() as folder:
            save_lengths(arguments.save_lengths, preferences(Path(arguments.shared), Path(folder), 2000, 1024, 4096))
        return
    rate = in_child(arguments.device, matmul_rate, arguments.device, arguments.precision)
    load = os.getloadavg()[0]
    print(f"{os.cpu_count()} cores, load {load:.1f}; matrix products {arguments.precision}: {rate / 1e12:.3f} TFLOP/s")
    if arguments.measure:
        return
    found: dict[str, Any] = {"load": load, "matmul_flops_per_s": rate, "begun": time.strftime("%Y-%m-%d %H:%M")}
    for task in arguments.tasks:
        with tempfile.TemporaryDirectory(prefix="bench-train-") as folder:
            work = set_up(arguments, task, Path(folder))
            found[task] = compare(work, arguments.repeats, [1, 2] if arguments.tiny else [1, 2, 4, 8, 16], rate)
    print(f"load {os.getloadavg()[0]:.1f} at the end")
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2))
    missed = [f"{task}: {one}" for task in arguments.tasks for one in found[task]["missed"]]
    judged = [one for one in missed if one.endswith("loss curves")] if arguments.tiny else missed
    sys.exit(f"missed: {', '.join(judged)}" if judged else 0)


if __name__ == "__main__":
    main()
