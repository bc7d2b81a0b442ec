"""Proves the GPU path: the quickstart, then QLoRA SFT -> DPO -> merge of a 1 B-shape Llama with random weights.

    python scripts/gpu/prove.py [--work DIR] [--shape meta-llama/Llama-3.2-1B] [--skip-quickstart]
        [--spread fsdp2 zero3]

With `--spread` SFT and DPO run once more for each Accelerate config that is named, every weight trained, on all
GPUs there are (one is enough: the code of several runs with one process). Prints wall seconds and peak GPU memory
of every stage, from the records the stages leave. Needs one CUDA GPU and no network. Exit code 1 when a stage
fails, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
WORDS = "the model reads rows and writes answers that somebody checks one by one before they are kept".split()


def make_model(folder: Path, shape: str) -> None:
    """Saves a model of a known shape with random bf16 weights, and a small tokenizer of its own."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from posttrain.models.known_shapes import known_shape
    from posttrain.pretraining.tokenizer import train_tokenizer

    found = known_shape(shape)
    if found is None:
        sys.exit(f"{shape} is not among the shipped shapes (posttrain/models/shapes)")
    tokenizer = train_tokenizer(
        [" ".join(WORDS)] * 50, 600, ["<|im_start|>", "<|im_end|>"], max_length=4096, out=folder
    )
    settings = dict(found.config)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    config.bos_token_id, config.eos_token_id, config.pad_token_id = None, tokenizer.eos_token_id, tokenizer.pad_token_id
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id]
    model.save_pretrained(folder)


def make_rows(folder: Path, rows: int = 2000) -> None:
    """Writes conversations and pairs of many lengths; every answer differs."""
    import random

    rng = random.Random(0)

    def text(longest: int) -> str:
        return " ".join(rng.choice(WORDS) for _ in range(rng.randint(5, longest)))

    sft, dpo = [], []
    for number in range(rows):
        question = f"{number}: {text(60)}"
        sft.append({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": text(200)}]})
        dpo.append({"prompt": question, "chosen": f"yes {text(150)}", "rejected": f"no {text(150)}"})
    for name, made in (("sft", sft), ("dpo", dpo)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")


def run(recipe: str, runs: Path, *settings: str) -> None:
    """Runs a recipe through the command line; raises when it fails."""
    words = [word for setting in settings for word in ("--set", setting)]
    subprocess.run([sys.executable, "-m", "posttrain", "run", recipe, "--runs-dir", str(runs), *words], check=True)


def show(run_dir: Path) -> None:
    """Prints time and memory of each stage."""
    print(f"\n{run_dir.name}\n{'stage':<12}{'seconds':>9}{'GPU GiB':>9}  figures")
    for path in sorted(run_dir.glob("*/stage.json"), key=lambda path: path.stat().st_mtime):
        record = json.loads(path.read_text(encoding="utf-8"))
        spent = record["provenance"]
        memory = (spent["peak_gpu_bytes"] or 0) / 2**30
        print(f"{record['stage']:<12}{spent['seconds']:>9.1f}{memory:>9.2f}  {record['summary']['headline']}")


def main() -> int:
    """Runs both recipes on the GPU and prints their tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--shape", default="meta-llama/Llama-3.2-1B")
    parser.add_argument("--skip-quickstart", action="store_true")
    parser.add_argument("--spread", nargs="+", default=[], metavar="NAME", help="Accelerate configs: fsdp2, zero3, ...")
    options = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        print("no CUDA GPU is visible to torch", file=sys.stderr)
        return 2
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    runs = options.work / "runs"
    if not options.skip_quickstart:
        run("quickstart", runs, "runtime.device=cuda")
        show(runs / "quickstart")
    place = options.work / "one-billion"
    if not (place / "model" / "config.json").exists():
        place.mkdir(parents=True, exist_ok=True)
        make_model(place / "model", options.shape)
        make_rows(place)
    for recipe in ("one_billion.yaml", "one_billion_full.yaml"):
        shutil.copy(HERE / recipe, place)
    run(str(place / "one_billion.yaml"), runs)
    show(runs / "one-billion")
    for config in options.spread:
        processes = f"runtime.num_processes={torch.cuda.device_count()}"
        settings = [f"name=one-billion-{config}", f"runtime.accelerate_config={config}", processes]
        run(str(place / "one_billion_full.yaml"), runs, *settings)
        show(runs / f"one-billion-{config}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
