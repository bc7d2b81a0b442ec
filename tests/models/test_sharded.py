"""Models cut over two processes are saved, verified, merged and resumed as if they had never been cut."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from posttrain.errors import CheckpointError, StageError
from posttrain.merging.merge import merge
from posttrain.models.save import save_full, verify_saved_adapter, verify_saved_model
from posttrain.pretraining.checkpoint import WEIGHTS
from posttrain.pretraining.optimizer_state import CUT, SETTINGS, WHOLE, load_optimizer, save_optimizer
from tests.models.sharded_worker import CASES, SHARD, STEPS, go_on, make_experts, make_full, make_optimizer, train
from tests.training.spine_tiny import make_tokenizer, save_base

ROOT = Path(__file__).parents[2]
WHOLE_MODELS = ["tied", "untied"]
ADAPTERS = ["lora", "dora"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that one process and two processes leave."""
    folder = tmp_path_factory.mktemp("sharded")
    save_base(folder / "base", make_full(True))
    save_base(folder / "base-untied", make_full(False))
    for name, (make, save) in CASES.items():
        train(make(folder), folder / "one", name, save)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    worker = ["-m", "tests.models.sharded_worker", str(folder)]
    done = subprocess.run([*command, *worker], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-5000:]
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def settings(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "adapter_config.json").read_text())
    return {**found, "target_modules": sorted(found["target_modules"])}  # a set, in the order of the process's hashes


def assert_close(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(
            ours[name], theirs[name], rtol=1e-4, atol=2e-5, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.slow  # three times the imports: half a minute on a busy machine
def test_the_model_was_cut(trained: Path) -> None:
    whole = {name: param.numel() for name, param in make_experts().named_parameters()}
    sizes = [load_file(trained / f"sizes-{rank}") for rank in (0, 1)]
    assert all(sizes[0][name] + sizes[1][name] == size for name, size in whole.items())
    assert sum(int(size) for size in sizes[0].values()) < 0.55 * sum(whole.values())


@pytest.mark.slow  # three times the imports: half a minute on a busy machine
@pytest.mark.parametrize("name", WHOLE_MODELS)
def test_a_whole_model_in_many_files_opens_as_any_other(trained: Path, name: str) -> None:
    two, one = trained / "two" / name, trained / "one" / name
    assert [path.name for path in sorted(two.iterdir())] == [path.name for path in sorted(one.iterdir())]
    assert len(list(two.glob("model-*.safetensors"))) > 5
    assert (two / "config.json").read_bytes() == (one / "config.json").read_bytes()
    index = "model.safetensors.index.json"
    assert (two / index).read_bytes() == (one / index).read_bytes()
    assert_close(weights(two), weights(one))
    plain = AutoModelForCausalLM.from_pretrained(two)
    assert type(plain).__name__ == "LlamaForCausalLM"
    assert (plain.lm_head.weight is plain.model.embed_tokens.weight) == (name == "tied")
    verify_saved_model(plain, two, json.loads((trained / "two" / f"{name}.digests").read_text()))
    start = make_full(name == "tied").state_dict()
    moved = [key for key, tensor in plain.state_dict().items() if not torch.allclose(tensor, start[key], atol=1e-3)]
    assert len(moved) == len(start)


@pytest.mark.slow  # three times the imports: half a minute on a busy machine
def test_experts_fused_in_memory_have_the_very_bytes_of_one_process(trained: Path, tmp_path: Path) -> None:
    save_full(make_experts(), tmp_path, torch.bfloat16, SHARD)
    two = trained / "two" / "experts"
    assert hashes(two) == hashes(tmp_path)


@pytest.mark.slow  # three times the imports: half a minute on a busy machine
@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_is_saved_in_pefts_format_and_merges(trained: Path, tmp_path: Path, name: str) -> None:
    two, one = trained / "two" / name, trained / "one" / name
    assert settings(two) == settings(one)
    assert_close(weights(two), weights(one))
    verify_saved_adapter(two)
    base = trained / ("base-untied" if name == "dora" else "base")
    live = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    dense = PeftModel.from_pretrained(live, str(two)).merge_and_unload()
    merge(base, [two], tmp_path / "merged", "float32")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    assert_close(dict(merged), {key: merged_in for key, merged_in in dense.state_dict().items() if key in merged})


@pytest.mark.slow  # three times the imports: half a minute on a busy machine
@pytest.mark.parametrize("name", CASES)
def test_two_processes_go_on_as_if_never_stopped(trained: Path, name: str) -> None:
    last, again = trained / "two" / f"{name}-{STEPS + 1}", trained / "two" / f"{name}-again"
    assert hashes(last) == hashes(again)
    assert {path.name for path in last.iterdir()} == {WEIGHTS, CUT, SETTINGS}


@pytest.mark.slow  # three times the imports: half a minute on a busy machine
@pytest.mark.parametrize("name", CASES)
def test_another_number_of_processes_takes_the_same_step(trained: Path, tmp_path: Path, name: str) -> None:
    go_on(CASES[name][0](trained), trained / "two" / f"{name}-{STEPS}", tmp_path)  # two -> one
    from_one = load_file(trained / "two" / f"{name}-from-one" / WEIGHTS)  # one -> two
    uncut = load_file(trained / "one" / f"{name}-{STEPS + 1}" / WEIGHTS)
    assert_close(load_file(tmp_path / WEIGHTS), load_file(trained / "two" / f"{name}-{STEPS + 1}" / WEIGHTS))
    assert_close(from_one, uncut)
    before = load_file(trained / "one" / f"{name}-{STEPS}" / WEIGHTS)
    assert any((uncut[key] - before[key]).abs().max() > 1e-3 for key in uncut)


@pytest.mark.slow  # three times the imports: half a minute on a busy machine
def test_a_saved_optimizer_is_complete(trained: Path) -> None:
    """Every moment is whole in the file, and equal to that of one process."""
    saved = load_file(trained / "two" / f"untied-{STEPS}" / CUT)
    params = dict(make_full(False).named_parameters())
    assert {name.partition("/")[2] for name in saved} == params.keys()
    plain = torch.load(trained / "one" / f"untied-{STEPS}" / WHOLE, weights_only=True)["state"]
    names = json.loads((trained / "two" / f"untied-{STEPS}" / SETTINGS).read_text())["names"]
    ours = {f"{key}/{names[number]}": value for number, state in plain.items() for key, value in state.items()}
    assert_close(saved, ours)


@pytest.mark.slow  # three times the imports: half a minute on a busy machine
def test_an_optimizer_of_other_parameters_is_refused(trained: Path, tmp_path: Path) -> None:
    model = make_full(False)
    with pytest.raises(CheckpointError, match="is of other parameters than the model's"):
        load_optimizer(model, make_optimizer(model), trained / "two" / f"lora-{STEPS}")
    model.model.norm.weight.requires_grad_(False)
    with pytest.raises(CheckpointError, match="is of other parameters than the model's"):
        load_optimizer(model, make_optimizer(model), trained / "one" / f"untied-{STEPS}")


def test_a_whole_optimizer_is_saved_as_torch_does(tmp_path: Path) -> None:
    model = make_full(True)
    optimizer = make_optimizer(model)
    model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    optimizer.step()
    save_optimizer(model, optimizer, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [WHOLE]
    ours = hashes(tmp_path)
    torch.save(optimizer.state_dict(), tmp_path / WHOLE)
    assert ours == hashes(tmp_path)


def empty(folder: Path, name: str) -> None:
    path = next(path for path in folder.glob("*.safetensors") if name in load_file(path))
    save_file({**load_file(path), name: torch.empty(0)}, path, metadata={"format": "pt"})


def leave_out(folder: Path, name: str) -> None:
    path = next(path for path in folder.glob("*.safetensors") if name in load_file(path))
    save_file({k: v for k, v in load_file(path).items() if k != name}, path, metadata={"format": "pt"})


def forget(folder: Path, name: str) -> None:
    """Left out of its file and of the index."""
    leave_out(folder, name)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    del index["weight_map"][name]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def repeat(folder: Path, name: str) -> None:
    """A second copy in another file."""
    holder = next(path for path in folder.glob("*.safetensors") if name in load_file(path))
    other = next(path for path in sorted(folder.glob("*.safetensors")) if path != holder)
    save_file({**load_file(other), name: load_file(holder)[name]}, other, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "error", "found"),
    [
        (empty, CheckpointError, "model.norm.weight is empty"),
        (leave_out, CheckpointError, "does not hold model.norm.weight, which the index promises"),
        (forget, StageError, "model.norm.weight was not saved"),
        (repeat, StageError, "model.norm.weight was saved twice"),
    ],
)
def test_files_with_a_tensor_wrong_are_refused(
    tmp_path: Path, damage: Callable[[Path, str], None], error: Any, found: str
) -> None:
    model = make_full(False)
    digests = save_full(model, tmp_path, torch.float32, SHARD)
    make_tokenizer().save_pretrained(tmp_path)
    verify_saved_model(model, tmp_path, digests)
    damage(tmp_path, "model.norm.weight")
    with pytest.raises(error, match=found):
        verify_saved_model(model, tmp_path, digests)
