"""Times our merge beside peft's, with a synced copy of the base's files as the floor, taking turns in one run.

    python scripts/bench_merge.py --work DIR [--shapes 1b 3b] [--routes floor ours peft] [--qlora] [--repeats 3]
        [--python-mergekit PYTHON] [--python-axolotl PYTHON]

Makes, once, checkpoints of Llama-3.2's shapes with random weights (bf16, tied, 3 shards of 1.24 B parameters and
4 of 3.21 B) and an adapter of rank 16 on all linear layers. Every route runs in a fresh process:

    floor    `cp -r` of the base, then `sync -f`
    ours     posttrain.merging.merge: hashed, synced, renamed
    peft     load in bf16, merge_and_unload, save_pretrained; not synced
    axolotl  its streaming merge; mergekit  a `base+adapter` input; not synced. Both pin other versions than ours, so
             they may live in environments of their own, of which the interpreter is given
    qlora    ours into the dequantised base (NF4, double quantisation); only with --qlora

wall is from start to exit, work the same without imports and exit, cpu user + system, peak the largest resident set.
Ratios are of medians. The first repeat's files of every route are compared, tensor by tensor and to the bit, with
`(W.float() + B @ A * scale).to(bfloat16)` over whole tensors. Exit code 1 where ours are not that.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

# torch is imported in the children only: Linux counts a parent's memory as its child's peak.

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK, ALPHA = 16, 32
OTHERS = ("peft", "mergekit", "axolotl")
COMPARED = ("ours", *OTHERS)
"""Routes whose files are compared with the formula; only ours must be it."""


@dataclass(frozen=True)
class Shape:
    """A Llama with tied embeddings."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    shards: int
    vocabulary: int = 128_256


SHAPES = {
    "1b": Shape(16, 2048, 8192, 32, 8, 64, 3),
    "3b": Shape(28, 3072, 8192, 24, 8, 128, 4),
    "tiny": Shape(2, 256, 512, 4, 2, 64, 3, 1000),
}


@dataclass(frozen=True)
class Run:
    """What one process took."""

    wall: float
    work: float
    cpu: float
    peak: int
    """Bytes."""


def linear_shapes(shape: Shape) -> dict[str, tuple[int, int]]:
    """Module of a layer -> (outputs, inputs)."""
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    return {
        "self_attn.q_proj": (queries, shape.hidden),
        "self_attn.k_proj": (keys, shape.hidden),
        "self_attn.v_proj": (keys, shape.hidden),
        "self_attn.o_proj": (shape.hidden, queries),
        "mlp.gate_proj": (shape.intermediate, shape.hidden),
        "mlp.up_proj": (shape.intermediate, shape.hidden),
        "mlp.down_proj": (shape.hidden, shape.intermediate),
    }


def make(folder: Path, shape: Shape) -> None:
    """Writes `base` and `adapter` into a folder that does not exist; values of usual size, no two tensors alike."""
    from posttrain.merging.writer import Slot, assign_shards, shard_names, write_index

    making = folder.with_name(folder.name + ".making")
    shutil.rmtree(making, ignore_errors=True)
    (making / "base").mkdir(parents=True)
    (making / "adapter").mkdir()
    wide = (shape.hidden,)
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocabulary, shape.hidden)}
    factors: dict[str, tuple[int, ...]] = {}
    for layer in range(shape.layers):
        start = f"model.layers.{layer}."
        for module, (outputs, inputs) in linear_shapes(shape).items():
            tensors[f"{start}{module}.weight"] = (outputs, inputs)
            factors[f"base_model.model.{start}{module}.lora_A.weight"] = (RANK, inputs)
            factors[f"base_model.model.{start}{module}.lora_B.weight"] = (outputs, RANK)
        tensors |= {f"{start}{norm}.weight": wide for norm in ("input_layernorm", "post_attention_layernorm")}
    slots = [Slot(name, "BF16", size) for name, size in (tensors | {"model.norm.weight": wide}).items()]
    total = sum(slot.nbytes for slot in slots)
    cut = assign_shards(slots, total // shape.shards + 4 * shape.hidden * shape.intermediate)
    shards = dict(zip(shard_names(len(cut)), cut, strict=True))
    for name, shard in shards.items():
        _write_random(making / "base" / name, shard, 0.02)
    write_index(making / "base", shards)
    adapter = [Slot(name, "F32", size) for name, size in factors.items()]
    _write_random(making / "adapter" / "adapter_model.safetensors", adapter, 0.01)
    (making / "base" / "config.json").write_text(json.dumps(_config(shape)))
    (making / "base" / "generation_config.json").write_text(json.dumps({"eos_token_id": 2}))
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.0}
    settings |= {"target_modules": list(LINEAR), "base_model_name_or_path": str(folder / "base"), "bias": "none"}
    (making / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    making.rename(folder)


def _write_random(path: Path, shard: list[Any], spread: float) -> None:
    """Writes normal numbers, norms around 1."""
    import torch

    from posttrain.merging.edits import row_blocks
    from posttrain.merging.tensors import TORCH
    from posttrain.merging.writer import FileWriter, shard_header

    generator = torch.Generator().manual_seed(sum(path.name.encode()))
    with FileWriter(path) as writer:
        writer.write(shard_header(shard))
        for slot in shard:
            for start, stop in row_blocks(slot.shape, 1 << 22):
                rows = torch.randn((stop - start, *slot.shape[1:]), generator=generator).mul_(spread)
                writer.write_tensor((rows + 1 if "norm" in slot.name else rows).to(TORCH[slot.dtype]))


def _config(shape: Shape) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocabulary,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    }


def merge_ours(base: Path, adapter: Path, out: Path, dequantised: bool = False) -> float:
    """Merges; returns when the imports were done."""
    from posttrain.merging.merge import merge
    from posttrain.merging.quantization import QuantSpec

    imported = time.time()
    if dequantised:
        merge(base, [adapter], out, "bfloat16", "dequantized", QuantSpec())
    else:
        merge(base, [adapter], out, "bfloat16")
    return imported


def merge_peft(base: Path, adapter: Path, out: Path) -> float:
    """Merges as peft's documentation does; returns when the imports were done."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    imported = time.time()
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
    return imported


def merge_axolotl(base: Path, adapter: Path, out: Path) -> float:
    """Merges by axolotl's streaming route; returns when the imports were done."""
    from axolotl.cli.utils.lora_merge import merge_lora_sharded_efficient

    imported = time.time()
    merge_lora_sharded_efficient(base, adapter, out, device="cpu")
    return imported


def merge_mergekit(base: Path, adapter: Path, out: Path) -> float:
    """Merges a `base+adapter` input by mergekit's passthrough; returns when the imports were done."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge

    imported = time.time()
    config = {"merge_method": "passthrough", "dtype": "bfloat16", "models": [{"model": f"{base}+{adapter}"}]}
    options = MergeOptions(lora_merge_cache=str(out.with_name("mergekit-cache")), copy_tokenizer=False)
    run_merge(MergeConfiguration.model_validate(config), str(out), options)
    return imported


def compare(folder: Path) -> bool:
    """Compares the kept outputs of a shape with each other and with the formula; prints how many tensors are equal."""
    import torch

    from posttrain.merging.checkpoint import open_checkpoint
    from posttrain.merging.header import read_header
    from posttrain.merging.tensors import read_tensor

    base = open_checkpoint(folder / "base").tensors
    factors = {info.name: info for info in read_header(folder / "adapter" / "adapter_model.safetensors")}
    kept = {route: folder / f"kept-{route}" for route in COMPARED if (folder / f"kept-{route}").is_dir()}
    found = {route: open_checkpoint(path).tensors for route, path in kept.items()}
    equal = dict.fromkeys(found, 0)
    names_differ = [route for route in found if found[route].keys() != base.keys()]
    for name, info in base.items():
        expected = read_tensor(info)
        key = f"base_model.model.{name.removesuffix('weight')}lora_{{}}.weight"
        if key.format("A") in factors:
            a, b = (read_tensor(factors[key.format(side)]) for side in "AB")
            expected = (expected.float() + (b @ a) * (ALPHA / RANK)).bfloat16()
        for route, tensors in found.items():
            equal[route] += name in tensors and torch.equal(read_tensor(tensors[name]), expected)
    for route, count in equal.items():
        print(f"{route}: {count} of {len(base)} tensors are fp32-add-then-round to the bit")
    return "ours" not in names_differ and equal.get("ours") == len(base)


def child(route: str, folder: Path, out: Path) -> None:
    """Runs one route in this process; the last line printed is when its imports were done, and when its work was."""
    base, adapter = folder / "base", folder / "adapter"
    if route == "make":
        make(folder, SHAPES[out.name])
    elif route == "compare":
        sys.exit(not compare(folder))
    else:
        routes = {"ours": merge_ours, "peft": merge_peft, "axolotl": merge_axolotl, "mergekit": merge_mergekit}
        routes["qlora"] = partial(merge_ours, dequantised=True)
        print(routes[route](base, adapter, out), time.time())


def measure(route: str, folder: Path, out: Path, python: str = sys.executable) -> Run:
    """Runs one route in a fresh process of an interpreter, once everything written before is on disk."""
    os.sync()
    command = [python, __file__, "--child", route, str(folder), str(out)]
    if route == "floor":
        command = ["sh", "-c", 'cp -r "$0" "$1" && sync -f "$1"', str(folder / "base"), str(out)]
    if route == "import torch":
        command = [sys.executable, "-c", "import torch"]
    begin = time.time()
    quiet = {"TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | quiet)
    assert process.stdout is not None
    printed = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    end = time.time()
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{route} failed with exit code {process.returncode}")
    imported, done = map(float, printed.split()[-2:]) if printed.split() else (begin, end)
    return Run(end - begin, done - imported, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def bench(folder: Path, routes: list[str], repeats: int, pythons: dict[str, str]) -> dict[str, list[Run]]:
    """Lets the routes take turns; keeps the first output of each that merges for comparison.

    Args:
        pythons: route -> the interpreter that has what it needs, where that is not this one.
    """
    runs: dict[str, list[Run]] = {route: [] for route in routes}
    for route in COMPARED:  # of an earlier run
        shutil.rmtree(folder / f"kept-{route}", ignore_errors=True)
    for file in sorted((folder / "base").iterdir()):
        with file.open("rb", buffering=0) as stream:  # every route finds the base in the page cache
            while stream.read(1 << 24):
                pass
    for repeat in range(repeats):
        for route in routes:
            out = folder / f"out-{route.replace(' ', '-')}"
            shutil.rmtree(out, ignore_errors=True)
            runs[route].append(measure(route, folder, out, pythons.get(route, sys.executable)))
            print(f"  {repeat + 1} {line(route, runs[route][-1:])}", flush=True)
            if repeat == 0 and route in COMPARED:
                out.rename(folder / f"kept-{route}")
            shutil.rmtree(out, ignore_errors=True)
            shutil.rmtree(folder / "mergekit-cache", ignore_errors=True)
    return runs


def median(runs: list[Run]) -> Run:
    """Each figure's own median."""
    wall, work, cpu, peak = (
        statistics.median(values) for values in zip(*(asdict(r).values() for r in runs), strict=True)
    )
    return Run(wall, work, cpu, int(peak))


def line(route: str, runs: list[Run]) -> str:
    """One row of the table."""
    run = median(runs)
    load = " ".join(f"{value:.1f}" for value in os.getloadavg())
    return (
        f"{route:13} wall {run.wall:7.2f} s   work {run.work:7.2f} s   cpu {run.cpu:7.2f} s   "
        f"peak {run.peak / 1e9:6.3f} GB   load {load}"
    )


def ratios(runs: dict[str, list[Run]]) -> dict[str, float]:
    """What issue and README state, where both sides were run."""
    mid = {route: median(found) for route, found in runs.items()}
    found = {}
    if {"ours", "floor"} <= mid.keys():
        found["ours / floor, work"] = mid["ours"].work / mid["floor"].wall
        found["ours / floor, wall with imports"] = mid["ours"].wall / mid["floor"].wall
    for other in (route for route in OTHERS if {route, "ours"} <= mid.keys()):
        found[f"ours / {other}, wall"] = mid["ours"].wall / mid[other].wall
        found[f"ours / {other}, work"] = mid["ours"].work / mid[other].work
        found[f"ours / {other}, peak"] = mid["ours"].peak / mid[other].peak
    if {"ours", "qlora"} <= mid.keys():
        found["qlora / ours, work"] = mid["qlora"].work / mid["ours"].work
    return found


def _has(package: str, python: str | None) -> bool:
    """Whether this interpreter, or the one given, has a package."""
    if python is None:
        return importlib.util.find_spec(package) is not None
    find = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({package!r}) is None)"
    return subprocess.run([python, "-c", find], check=False).returncode == 0


def main() -> None:
    """Makes what is missing, runs, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints; 13 GB at 1b, 33 GB at 3b")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["1b", "3b"])
    parser.add_argument("--routes", nargs="+", default=["import torch", "floor", "ours", "peft", "axolotl", "mergekit"])
    parser.add_argument("--qlora", action="store_true", help="also merge into the dequantised base")
    parser.add_argument("--repeats", type=int, default=3)
    for route in ("mergekit", "axolotl"):
        parser.add_argument(f"--python-{route}", metavar="PYTHON", help=f"interpreter of an environment with {route}")
    parser.add_argument("--json", type=Path, help="write every figure there")
    arguments = parser.parse_args()
    routes = arguments.routes + ["qlora"] * arguments.qlora
    given = {"mergekit": arguments.python_mergekit, "axolotl": arguments.python_axolotl}
    pythons = {route: path for route, path in given.items() if path}
    for route in OTHERS:
        if route in routes and not _has(route, pythons.get(route)):
            print(f"{route}: not installed, left out")
            routes.remove(route)
    same, figures = True, {}
    for name in arguments.shapes:
        folder = arguments.work / name
        if not folder.is_dir():
            subprocess.run([sys.executable, __file__, "--child", "make", str(folder), name], check=True)
        print(f"{name}: {asdict(SHAPES[name])}, {os.cpu_count()} cores", flush=True)
        runs = bench(folder, routes, arguments.repeats, pythons)
        print("medians")
        for route, found in runs.items():
            print(f"    {line(route, found)}")
        for label, value in ratios(runs).items():
            print(f"    {label}: {value:.2f}")
        if "ours" in routes:
            compared = subprocess.run([sys.executable, __file__, "--child", "compare", str(folder), "-"], check=False)
            same = same and compared.returncode == 0
        figures[name] = {
            "runs": {route: [asdict(run) for run in found] for route, found in runs.items()},
            "ratios": ratios(runs),
        }
    if arguments.json:
        arguments.json.write_text(json.dumps(figures | {"same": same, "load": os.getloadavg()}, indent=2))
    sys.exit(not same)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))
    else:
        main()
