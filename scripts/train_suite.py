"""Every figure of a GPU in one call: `bench_train.py --suite gpu`."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from train_routes import measure
from train_work import (
    SHAPES,
    Route,
    Run,
    Work,
    flops_per_token,
    made_tokenizer,
    make_model,
    matmul_rate,
    pairs_of_lengths,
    preferences,
    whole_documents,
)

BUDGET = 480.0
"""Seconds after which no further measurement begins."""
Child = Callable[..., Any]


@dataclass(frozen=True)
class Sizes:
    """What the suite runs, on a GPU and as a dry run."""

    large: str
    middle: str
    device: str
    length: int
    piece: int
    documents: int
    """Of an SFT step."""
    pairs: int
    """Of a DPO step."""
    steps: int


GPU = Sizes("8b", "3b", "cuda", 4096, 8192, 4, 32, 6)
TINY = Sizes("tiny", "tiny", "cpu", 64, 128, 4, 4, 2)
IN_MEMORY = Path("/dev/shm")


class Suite:
    """Measures one thing after another until time is up, and keeps what it found."""

    def __init__(self, arguments: argparse.Namespace, child: Child) -> None:
        self.arguments, self.child = arguments, child
        self.sizes = TINY if arguments.tiny else GPU
        self.begun = time.monotonic()
        self.rate = child(matmul_rate, self.sizes.device, "bf16")
        print(f"matrix products, bf16: {self.rate / 1e12:.1f} TFLOP/s", flush=True)
        self.found: dict[str, Any] = {"matmul_flops_per_s": self.rate}
        self.missed: list[str] = []

    def model(self, shape: str) -> Path:
        """Makes a checkpoint of random weights in a new folder."""
        needed = 4 * (SHAPES[shape].body + 2 * SHAPES[shape].head)
        roomy = IN_MEMORY.is_dir() and shutil.disk_usage(IN_MEMORY).free > needed
        folder = Path(tempfile.mkdtemp(prefix="bench-train-", dir=IN_MEMORY if roomy else None))
        made_tokenizer(folder)
        self.child(make_model, folder, SHAPES[shape], self.sizes.device, "bf16")
        return folder

    def sft(self, model: Path, shape: str, method: str) -> Work:
        """Documents that fill the sequence length, packed into pieces of two."""
        sizes = self.sizes
        steps = sizes.steps + 2 + (2 if self.arguments.profile else 0)
        rows = whole_documents(steps * sizes.documents, sizes.length, SHAPES[shape].vocabulary)
        return Work(
            task="sft",
            rows=rows,
            model=model,
            shape=SHAPES[shape],
            device=sizes.device,
            method=method,  # type: ignore[arg-type]
            precision="bf16",
            batch=sizes.documents,
            max_length=sizes.length,
            micro_batch_tokens=sizes.piece,
        )

    def dpo(self, model: Path, shape: str) -> Work:
        """Pairs with the lengths of hh-rlhf."""
        sizes, arguments = self.sizes, self.arguments
        vocabulary, limit = SHAPES[shape].vocabulary, 1024
        count = (sizes.steps + 2 + (2 if arguments.profile else 0)) * sizes.pairs
        if arguments.lengths:
            rows = pairs_of_lengths(arguments.lengths, count, limit, vocabulary)
        else:
            with tempfile.TemporaryDirectory() as folder:
                rows = preferences(Path(arguments.shared), Path(folder), count, limit, min(4096, vocabulary))
        given = {"device": sizes.device, "method": "lora", "precision": "bf16"}
        return Work("dpo", rows, model, SHAPES[shape], batch=sizes.pairs, max_length=limit, **given)  # type: ignore[arg-type]

    def time(self, name: str, work: Work, route: Route) -> Run | None:
        """Measures once; None, and said, when time is up."""
        if time.monotonic() - self.begun > BUDGET:
            print(f"{name:<28} left out: time is up", flush=True)
            self.missed.append(f"{name} (left out)")
            return None
        profile = self.arguments.profile
        if profile:
            profile.mkdir(parents=True, exist_ok=True)
            work = replace(work, profile=profile / f"{name.replace(' ', '-').replace(',', '')}.txt")
        run: Run = self.child(measure, work, route)
        share = flops_per_token(work) * run.tokens / (run.seconds + run.reference_seconds) / self.rate
        self.found[name] = {**asdict(run), "tokens_per_s": run.rate(run.tokens), "mfu": share}
        print(
            f"{name:<28}{run.rate(run.tokens):>10,.0f} tokens/s{run.rate(run.supervised):>10,.0f} supervised/s"
            f"{1e3 * run.seconds / run.steps:>9,.0f} ms a step  reference {run.reference_seconds:.2f} s"
            f"  peak {run.peak_bytes / 1e9:.2f} GB  {share:.1%} of matrix products  {run.notes}",
            flush=True,
        )
        return run

    def judge(self, what: str, value: float, target: float) -> None:
        """Prints a figure beside its target."""
        print(f"{what}: {value:.3g}, target {target}: {'met' if value >= target else 'MISSED'}", flush=True)
        self.found.setdefault("judged", {})[what] = {"value": value, "target": target}
        if not value >= target:
            self.missed.append(what)


def run(arguments: argparse.Namespace, child: Child) -> int | str:
    """Runs the suite; returns what the process exits with."""
    suite = Suite(arguments, child)
    sizes, ours = suite.sizes, Route("ours", ours=True)
    large = suite.model(sizes.large)
    name = f"{sizes.large} lora"
    lora = suite.time(name, suite.sft(large, sizes.large, "lora"), ours)
    if lora:
        suite.judge(f"{name}, share of matrix products", suite.found[name]["mfu"], 0.5)
    qlora = suite.time(f"{sizes.large} qlora", suite.sft(large, sizes.large, "qlora"), ours)
    if lora and qlora:
        suite.judge("qlora / lora, tokens/s", qlora.rate(qlora.tokens) / lora.rate(lora.tokens), 0.85)
    work = suite.dpo(large, sizes.large)
    mine = suite.time(f"{sizes.large} dpo lora, ours", work, ours)
    defaults = Route("TRL defaults", defaults=True, batch=min(8, work.batch))
    theirs = suite.time(f"{sizes.large} dpo lora, defaults", work, defaults)
    if mine and theirs:
        suite.judge("dpo, ours / TRL defaults", mine.rate(mine.supervised) / theirs.rate(theirs.supervised), 2.0)
    shutil.rmtree(large)
    middle = suite.model(sizes.middle)
    name = f"{sizes.middle} full"
    if suite.time(name, suite.sft(middle, sizes.middle, "full"), ours):
        suite.judge(f"{name}, share of matrix products", suite.found[name]["mfu"], 0.45)
    shutil.rmtree(middle)
    print(f"{time.monotonic() - suite.begun:.0f} s in all, load {os.getloadavg()[0]:.1f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(suite.found, indent=2))
    if arguments.tiny or not suite.missed:
        return 0
    return f"missed: {', '.join(suite.missed)}"
