"""Times our data preparation beside TRL's, and shows that its memory does not grow with the rows.

    POSTTRAIN_SHARED=../shared python scripts/bench_prepare.py [--rows 20000] [--pairs 8000] [--repeats 5]
        [--sizes 10000 100000 1000000] [--only speed|growth] [--json FILE]

speed   Ours: what an sft or dpo stage does before its model is loaded - reads a JSON Lines file, renders, masks,
        tokenises, stores on disk (synced), keeps the ledger and cuts the steps. TRL's: `_prepare_dataset` of the
        installed SFTTrainer (assistant masks, bfd packing, so without its truncating passes) and DPOTrainer, on a
        dataset that is already loaded, with `dataset_num_proc` 1 and 2 and datasets' caching off. The same rows,
        tokenizer and template; conversations of Alpaca and pairs of hh-rlhf, repeated with their words in another
        order, so that no text comes twice. Every run has a tokenizer that has seen nothing. The ways take turns.
growth  Ours in a fresh process per size, on made conversations: seconds, and the peak of resident memory (VmHWM),
        pages of mapped files included, of the stage's process and of the largest of its workers.

Exit code 1 where ours is below twice TRL's best in rows per second, the ids of the two differ, the peak at the
largest size is above 1.2 times that at the smallest, or the rows per second at the largest are below 0.8 times.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

# Heavy modules are imported where they are used: Linux counts a parent's memory as its child's peak.

TIMES, PEAK, LINEAR = 2.0, 1.2, 0.8
LENGTH = 1024
Row = dict[str, Any]
Way = Callable[[], float]
"""Prepares everything once; returns its seconds."""


def turned(text: str, by: int) -> str:
    """A text with its words moved on: as long, of the same words, and another one for each `by`."""
    words = text.split(" ")
    by %= max(len(words), 1)
    return " ".join(words[by:] + words[:by])


def said(role: str, text: str) -> dict[str, str]:
    """One message."""
    return {"role": role, "content": text}


def repeat(rows: list[Row], count: int) -> Iterator[Row]:
    """So many rows; from the second time on, with the words of each message in another order."""
    for number in range(count):
        copy, row = divmod(number, len(rows))[0], rows[number % len(rows)]
        turn = functools.partial(turn_messages, by=7 * copy)
        yield {key: turn(messages) for key, messages in row.items()}


def turn_messages(messages: list[dict[str, str]], by: int) -> list[dict[str, str]]:
    """Messages whose words have moved on; an unlike first word keeps two of them apart."""
    return [said(one["role"], f"{turned(one['content'], by)}{f' {by}' if by else ''}") for one in messages]


def conversations(shared: Path) -> list[Row]:
    """Alpaca's rows as messages."""
    from posttrain.data.read import SourceSpec, read_source

    found = read_source(SourceSpec(shared / "data/llamafactory-demos/alpaca_en_demo.json"), "chat").rows
    return [{"messages": row.messages} for row in found]


def pairs(shared: Path) -> list[Row]:
    """Pairs of hh-rlhf as messages."""
    from posttrain.data.read import SourceSpec, read_source

    found = read_source(SourceSpec(shared / "data/hh-rlhf/harmless-base_test.jsonl.gz"), "pair").rows
    return [{"prompt": row.prompt, "chosen": row.chosen, "rejected": row.rejected} for row in found]


def made(count: int) -> Iterator[Row]:
    """Conversations of one or two exchanges of about ten words each, made of a seed."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abdeiklmnorstu", k=draw.randrange(2, 9))) for _ in range(5000)]
    for _ in range(count):
        texts = [" ".join(draw.choices(words, k=draw.randrange(5, 16))) for _ in range(draw.choice((2, 2, 4)))]
        yield {"messages": [said(("user", "assistant")[turn % 2], text) for turn, text in enumerate(texts)]}


def write(path: Path, rows: Iterable[Row]) -> Path:
    """Writes JSON Lines."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return path


def our_chat(shared: Path) -> Any:
    """A fresh tokenizer with its template, as a stage has opened them."""
    from posttrain.chat.contract import end_of_turn
    from posttrain.chat.templates import load_template
    from posttrain.chat.tokenizer import load_any_tokenizer
    from posttrain.stages.conversation import Chat

    tokenizer, template = load_any_tokenizer(shared / "tokenizers/qwen2"), load_template("qwen2.5", Path())
    return Chat(tokenizer, template, end_of_turn(tokenizer, template))


def ours(kind: str, file: Path, run: Path, chat: Any, processes: int | None) -> tuple[float, Any]:
    """Prepares as a stage does; returns seconds and what was prepared."""
    from posttrain.recipe.schema import Data, Runtime
    from posttrain.stages import dpo, sft
    from posttrain.stages.context import Context, Events
    from posttrain.stages.prepare import prepare
    from posttrain.stages.schedule import schedule_rows

    context = Context(
        run_dir=run,
        recipe_dir=run,
        stage=kind,
        folder=run,
        seed=1,
        precision="bf16",
        runtime=Runtime(device="cpu", dataset_num_proc=processes),
        trainer={},
        inputs={},
        identity={"data": {"sources": [{"content": file.name}]}},
        fingerprint="",
        events=Events(None),
        should_stop=lambda: False,
    )
    data = Data.model_validate({"sources": [{"path": str(file)}], "max_length": LENGTH, "max_dropped": 1.0})
    module: Any = sft if kind == "sft" else dpo
    begun = time.perf_counter()
    prepared: Any = prepare(data, context, module.conversion(chat, data))
    schedule = schedule_rows(prepared, {"global_batch_size": 64, "num_train_epochs": 1}, 1)
    schedule.rows_of(0)
    seconds = time.perf_counter() - begun
    account = prepared.ledger.as_dict()["total"]["rows"]
    with file.open("rb") as lines:
        assert account["in"] == sum(1 for _ in lines), "rows were lost"
    return seconds, (prepared, schedule)


def theirs(
    kind: str, rows: Any, tokenizer: Any, template: str, processes: int, packed: bool = True
) -> tuple[float, Any]:
    """Prepares as TRL's trainer does; returns seconds and the dataset."""
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    trainer_class: Any = SFTTrainer if kind == "sft" else DPOTrainer
    trainer = object.__new__(trainer_class)  # what prepares rows needs of a trainer is set here
    trainer._tokenizer, trainer.chat_template, trainer.completion_only_loss = tokenizer, template, False
    tokenizer.chat_template = template
    common: Row = {"output_dir": tempfile.gettempdir(), "max_length": LENGTH, "dataset_num_proc": processes}
    common |= {"use_cpu": True, "bf16": False, "report_to": "none"}
    begun = time.perf_counter()
    if kind == "sft":
        args = SFTConfig(packing=packed, assistant_only_loss=True, **common)
        found = trainer._prepare_dataset(rows, tokenizer, args, packed, None, "train")
    else:
        found = trainer._prepare_dataset(rows, tokenizer, DPOConfig(**common), "train")
    return time.perf_counter() - begun, found


def same_ids(kind: str, file: Path, rows: Any, shared: Path, work: Path) -> bool:
    """Whether both make the same ids of the first 200 rows (TRL unpacked, ours in the file's order)."""
    chat = our_chat(shared)
    first = write(work / f"first-{kind}.jsonl", map(json.loads, file.read_text(encoding="utf-8").splitlines()[:200]))
    with tempfile.TemporaryDirectory(dir=work) as run:
        prepared, _ = ours(kind, first, Path(run), chat, 1)[1]
        mine = {int(place): row for place, row in zip(prepared.places[0][:, 1], prepared.rows[0], strict=True)}
        other = theirs(kind, rows.select(range(200)), chat.tokenizer, chat.template.source, 1, packed=False)[1]
        equal = 0
        for place, row in mine.items():
            found = other[place - 1]
            if kind == "sft":  # TRL's row goes on with the line break after the end of turn, as ours does
                equal += row.ids.tolist() == found["input_ids"][:LENGTH]
            else:
                ours_cut = [part.tolist() for part in (row.prompt, row.chosen, row.rejected)]
                end = [found[f"{name}_ids"] for name in ("prompt", "chosen", "rejected")]
                equal += all(part == other_part[: len(part)] for part, other_part in zip(ours_cut, end, strict=True))
        print(f"{kind}: the same ids in {equal} of {len(mine)} rows", flush=True)
        return equal == len(mine) > 150


def speed(shared: Path, work: Path, counts: dict[str, int], repeats: int) -> dict[str, Any]:
    """Times the ways for both kinds, in turns; returns rows per second and ratios."""
    import datasets

    datasets.disable_caching()
    datasets.disable_progress_bars()
    figures: dict[str, Any] = {}
    for kind, read in (("sft", conversations), ("dpo", pairs)):
        count = counts[kind]
        file = write(work / f"{kind}.jsonl", repeat(read(shared), count))
        rows = datasets.Dataset.from_list([json.loads(line) for line in file.open(encoding="utf-8")])
        same = same_ids(kind, file, rows, shared, work)
        ways = {f"ours {name}": functools.partial(time_ours, kind, file, shared, work, p) for name, p in OUR_PROCESSES}
        ways |= {f"trl {p}": functools.partial(time_theirs, kind, rows, shared, p) for p in (1, 2)}
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(repeats):
            for name in list(ways) if turn % 2 == 0 else reversed(list(ways)):
                seconds[name].append(ways[name]())
        rate = {name: count / statistics.median(found) for name, found in seconds.items()}
        best = max(rate["trl 1"], rate["trl 2"])
        figures[kind] = {
            "rows": count,
            "seconds": seconds,
            "rows_per_second": rate,
            "times_trls_best": {name: rate[name] / best for name in rate if name.startswith("ours")},
            "one_process": rate["ours 1"] / rate["trl 1"],
            "same_ids": same,
        }
        figures[kind]["reached"] = same and figures[kind]["times_trls_best"]["ours default"] >= TIMES
        show_speed(kind, figures[kind])
    return figures


OUR_PROCESSES: list[tuple[str, int | None]] = [("default", None), ("1", 1)]


def time_ours(kind: str, file: Path, shared: Path, work: Path, processes: int | None) -> float:
    """Seconds of ours, with the threads that a stage has."""
    chat = our_chat(shared)
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    try:
        with tempfile.TemporaryDirectory(dir=work) as run:
            return ours(kind, file, Path(run), chat, processes)[0]
    finally:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # TRL's processes are forked after the threads were used


def time_theirs(kind: str, rows: Any, shared: Path, processes: int) -> float:
    """Seconds of TRL's."""
    chat = our_chat(shared)
    return theirs(kind, rows, chat.tokenizer, chat.template.source, processes)[0]


def show_speed(kind: str, found: dict[str, Any]) -> None:
    """Prints the rows per second of each way, and the ratios."""
    print(f"{kind}, {found['rows']:,} rows")
    for name, rate in found["rows_per_second"].items():
        spread = ", ".join(f"{seconds:.2f}" for seconds in sorted(found["seconds"][name]))
        ratio = found["times_trls_best"].get(name)
        print(
            f"    {name:<14} {rate:8,.0f} rows/s" + (f"  {ratio:.2f} x TRL's best" if ratio else "") + f"  ({spread} s)"
        )
    print(f"    with one process each: {found['one_process']:.2f} x", flush=True)


def growth(shared: Path, work: Path, sizes: list[int]) -> dict[str, Any]:
    """Prepares made conversations of several sizes, each in a fresh process."""
    runs = []
    for size in sizes:
        file = write(work / f"made-{size}.jsonl", made(size))
        words = [sys.executable, __file__, "--child", str(file), str(shared), str(work)]
        done = subprocess.run(words, check=True, capture_output=True, text=True, env={**os.environ, **_STAGE})
        runs.append({"rows": size, **json.loads(done.stdout.splitlines()[-1])})
        file.unlink()
        one = runs[-1]
        print(
            f"growth {size:>10,} rows: {one['seconds']:8.1f} s  {size / one['seconds']:8,.0f} rows/s  "
            f"peak {one['peak_mb']:.0f} MB (before: {one['before_mb']:.0f} MB), worker {one['worker_peak_mb']:.0f} MB",
            flush=True,
        )
    first, last = runs[0], runs[-1]
    peak = last["peak_mb"] / first["peak_mb"]
    linear = (last["rows"] / last["seconds"]) / (first["rows"] / first["seconds"])
    print(f"peak x {peak:.3f}, rows per second x {linear:.2f} from {first['rows']:,} to {last['rows']:,} rows")
    return {"runs": runs, "peak": peak, "linear": linear, "reached": peak <= PEAK and linear >= LINEAR}


_STAGE = {"TOKENIZERS_PARALLELISM": "true"}


def child(file: Path, shared: Path, work: Path) -> None:
    """One size of `growth`: prints seconds and memory as JSON."""
    from posttrain.pretraining.order import save_order

    chat = our_chat(shared)
    from posttrain.stages import sft  # noqa: F401  (what a stage has imported by then)

    before = peak_mb()
    with tempfile.TemporaryDirectory(dir=work) as run:
        seconds, (prepared, schedule) = ours("sft", file, Path(run), chat, None)
        begun = time.perf_counter()
        save_order(Path(run), schedule.order, prepared.names, prepared.files, prepared.places)
        seconds += time.perf_counter() - begun
        worker = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        print(json.dumps({"seconds": seconds, "peak_mb": peak_mb(), "before_mb": before, "worker_peak_mb": worker}))


def peak_mb() -> float:
    """Most resident memory of this process so far."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def main() -> None:
    """Runs what was asked for, prints, and ends with 1 where a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000, help="conversations of `speed`")
    parser.add_argument("--pairs", type=int, default=8_000, help="pairs of `speed`")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000], help="rows of `growth`")
    parser.add_argument("--only", choices=("speed", "growth"))
    parser.add_argument("--work", type=Path, help="folder for files; 1 GB at a million rows")
    parser.add_argument("--json", type=Path, help="write every figure there")
    options = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    shared = Path(os.environ.get("POSTTRAIN_SHARED", "../shared")).absolute()
    figures: dict[str, Any] = {"cores": os.cpu_count(), "load": os.getloadavg()}
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.2f}", flush=True)
    with tempfile.TemporaryDirectory(dir=options.work) as work:
        if options.only != "speed":
            figures["growth"] = growth(shared, Path(work), sorted(options.sizes))
        if options.only != "growth":
            counts = {"sft": options.rows, "dpo": options.pairs}
            figures["speed"] = speed(shared, Path(work), counts, options.repeats)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2))
    reached = [figures["growth"]["reached"]] if "growth" in figures else []
    reached += [found["reached"] for found in figures.get("speed", {}).values()]
    print("every target reached" if all(reached) else "a target was missed")
    sys.exit(not all(reached))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*map(Path, sys.argv[2:5]))
    else:
        main()
