"""Predicted against measured peak memory: 1 B, 3 B and 8 B shapes, random weights, lora, qlora and full.

    python scripts/gpu/measure_memory.py [--out FILE.json] [--tiny] [--tokens 4096] [--tolerance 0.10]

On a GPU: two steps of each setting, without and with recomputed activations, a process for each model, with the
model, the head and the optimizer that a stage has; measured is `torch.cuda.max_memory_allocated`. What
does not fit the device by the prediction is said and left out. `--tiny` runs the same code on a CPU over small
shapes; measured is then the peak of live storages of the step, and predicted the same part of the estimate.
Exit code 1 where a prediction is off by more than the tolerance, or a setting fails.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

SHAPES = {"1b": "meta-llama/Llama-3.2-1B", "3b": "meta-llama/Llama-3.2-1B", "8b": "meta-llama/Llama-3.1-8B"}
LARGER = {"3b": {"hidden_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 24, "intermediate_size": 8192}}
"""Llama-3.2-3B's sizes over those of the 1 B."""
SMALL = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2}
SMALL |= {"intermediate_size": 704, "vocab_size": 2048, "head_dim": 32}
METHODS = ("lora", "qlora", "full")


def config_of(shape: str, tiny: bool) -> dict[str, Any]:
    """The config of one of `SHAPES`; small sizes for `--tiny`."""
    from posttrain.models.known_shapes import known_shape

    found = known_shape(SHAPES[shape])
    assert found is not None
    config = {**found.config, **LARGER.get(shape, {})}
    if shape == "3b":
        config["head_dim"] = 128
    return config | SMALL if tiny else config


def live_storages(model: Any) -> Any:
    """A dispatch mode that follows the bytes of live storages, those of parameters and gradients left out."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Live(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            held = [one for p in model.parameters() for one in (p, p.grad) if one is not None]
            self.known = {tensor.untyped_storage()._cdata for tensor in held}
            self.sizes: dict[int, int] = {}
            self.now = self.peak = 0

        def _drop(self, key: int) -> None:
            self.now -= self.sizes.pop(key, 0)

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            made = func(*args, **(kwargs or {}))
            for leaf in tree_leaves(made):
                if not isinstance(leaf, torch.Tensor):
                    continue
                storage = leaf.untyped_storage()
                key = storage._cdata
                if key not in self.sizes and key not in self.known and storage.nbytes():
                    self.sizes[key] = storage.nbytes()
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._drop, key)
            self.peak = max(self.peak, self.now)
            return made

    return Live()


def build(config: dict[str, Any], method: str, device: str) -> Any:
    """A model with random weights as a stage would load it: fp32 to train, bf16 or 4 bits to freeze."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from posttrain.models.load import Adapter, add_adapter

    settings = AutoConfig.for_model(**config)
    settings._attn_implementation = "sdpa"
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(settings, dtype=torch.float32 if method == "full" else torch.bfloat16)
    if method == "qlora":
        quantise(model)
    if method != "full":
        model.requires_grad_(False)
        model = add_adapter(model, Adapter(r=16, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear"), [])
    return model.train()


def quantise(model: Any) -> None:
    """Puts every linear layer but the head into NF4, layer by layer, as loading does."""
    import torch
    from bitsandbytes.nn import Linear4bit, Params4bit

    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if type(module) is not torch.nn.Linear or module is head:
            continue
        device = module.weight.device
        made = Linear4bit(module.in_features, module.out_features, bias=False, compute_dtype=torch.bfloat16)
        made.weight = Params4bit(module.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4")
        made.support_avx512bf16_for_cpu = False
        model.set_submodule(name, made.to(device))


def prepared(model: Any, device: str) -> tuple[Any, Any]:
    """(model with the head that a stage gives it, its optimizer)."""
    import torch
    from peft import PeftModel
    from trl.trainer.utils import add_fused_lm_head

    from posttrain.training.head import use_plain_head

    add_fused_lm_head(model.get_base_model() if isinstance(model, PeftModel) else model)
    if device == "cpu":
        use_plain_head(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return model, torch.optim.AdamW(trained, lr=1e-5, fused=True)


def recompute(model: Any) -> None:
    """Switches recomputed activations on, as the Trainer does."""
    from peft import PeftModel

    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if isinstance(model, PeftModel):
        model.get_base_model().enable_input_require_grads()


def measure(model: Any, optimizer: Any, tokens: int, device: str) -> int:
    """Peak bytes of a step that has gradients and optimizer state: allocated on a GPU, live storages on a CPU."""
    import torch

    ids = torch.randint(0, model.config.vocab_size, (1, tokens), device=device)
    positions = torch.arange(tokens, device=device)[None]

    def step() -> None:
        with torch.autocast(device, torch.bfloat16):
            out = model(input_ids=ids, position_ids=positions, labels=ids, fused_lm_head=True, use_cache=False)
        out.loss.backward()

    step()
    optimizer.step()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step()
        optimizer.step()
        return torch.cuda.max_memory_allocated()
    with live_storages(model) as live:
        step()
    return int(live.peak)


def run_one(shape: str, method: str, tokens: int, tiny: bool) -> list[dict[str, Any]]:
    """Predicts, measures and compares one model, without and with recomputed activations."""
    import torch

    from posttrain.estimate.activations import Pass
    from posttrain.estimate.adapters import AdapterShape
    from posttrain.estimate.memory import Piece, predict
    from posttrain.estimate.shapes import architecture_of
    from posttrain.estimate.weights import Method

    device = "cpu" if tiny else "cuda"
    config = config_of(shape, tiny)
    adapter = None if method == "full" else AdapterShape(16)
    how = Pass("bf16", device, "fused", Method(adapter, four_bits=method == "qlora"))  # type: ignore[arg-type]
    architecture, held, results = architecture_of(config, shape), None, []
    torch.manual_seed(0)
    for checkpointing in (False, True):
        told = predict(architecture, how, "adamw_torch_fused", Piece(tokens, tokens, checkpointing))
        made = {"shape": shape, "method": method, "checkpointing": checkpointing, "tokens": tokens}
        made |= {"parts": told.__dict__, "predicted": told.allocated, "measured": None, "error": None}
        results.append(made)
        if not tiny and told.device > torch.cuda.get_device_properties(0).total_memory:
            continue
        held = held or prepared(build(config, method, device), device)
        if checkpointing:
            recompute(held[0])
        made["measured"] = measure(*held, tokens, device)
        if tiny:
            made["predicted"] = told.activations + told.casts + told.head + told.working
        made["error"] = made["predicted"] / made["measured"] - 1
    return results


def main() -> int:
    """Runs every model in a process of its own and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--tolerance", type=float, default=0.10)
    parser.add_argument("--one", nargs=2, metavar=("SHAPE", "METHOD"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(run_one(*options.one, options.tokens, options.tiny)))
        return 0
    tokens = min(options.tokens, 1024) if options.tiny else options.tokens
    results, failed = [], False
    print(f"{'shape':<7}{'method':<8}{'recompute':<11}{'predicted':>12}{'measured':>12}{'off':>8}", flush=True)
    for shape in ("1b",) if options.tiny else SHAPES:
        for method in METHODS:
            words = [sys.executable, __file__, "--one", shape, method, "--tokens", str(tokens)]
            words += ["--tiny"] if options.tiny else []
            done = subprocess.run(words, capture_output=True, text=True, check=False)
            if done.returncode:
                failed = True
                print(f"{shape:<7}{method:<8}failed: {(done.stderr.strip() or 'killed').splitlines()[-1][:200]}")
                continue
            for result in json.loads(done.stdout.splitlines()[-1]):
                results.append(result)
                print(line_of(result), flush=True)
    off = [result for result in results if result["error"] is not None and abs(result["error"]) > options.tolerance]
    if options.out:
        options.out.write_text(json.dumps({"tiny": options.tiny, "results": results}, indent=2), encoding="utf-8")
    return 1 if off or failed or not results else 0


def line_of(result: dict[str, Any]) -> str:
    """One line of the table."""
    recompute = "yes" if result["checkpointing"] else "no"
    head = f"{result['shape']:<7}{result['method']:<8}{recompute:<11}{result['predicted'] / 2**30:>8.3f} GiB"
    if result["measured"] is None:
        return f"{head}   does not fit this GPU, by the prediction"
    return f"{head}{result['measured'] / 2**30:>8.3f} GiB{result['error']:>+8.1%}"


if __name__ == "__main__":
    sys.exit(main())
