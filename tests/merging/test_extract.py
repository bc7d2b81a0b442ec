"""Adapters out of two checkpoints: what peft makes of them, and what they cannot hold."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from merging import tiny
from safetensors.torch import load_file, save_file

from posttrain.artifact import sha256
from posttrain.errors import CheckpointError, UserError
from posttrain.merging.extract import extract, factorise
from posttrain.merging.merge import merge

ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Change = Callable[[str, torch.Tensor], torch.Tensor]


def load(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def train(base: Path, folder: Path, change: Change) -> Path:
    """Saves the base with changed tensors, in one shard."""
    folder.mkdir()
    save_file({name: change(name, t).contiguous() for name, t in load(base).items()}, folder / "model.safetensors")
    (folder / "config.json").write_bytes((base / "config.json").read_bytes())
    return folder


def low_rank(rank: int, *ends: str) -> Change:
    """Adds a random matrix of a rank to the weights with these ends of names."""
    generator = torch.Generator().manual_seed(3)

    def change(name: str, weight: torch.Tensor) -> torch.Tensor:
        if not name.endswith(ends):
            return weight
        b, a = (torch.randn(shape, generator=generator) for shape in ((len(weight), rank), (rank, weight.shape[1])))
        return weight + 0.1 * b @ a

    return change


def noise(*ends: str, then: Change = lambda name, weight: weight) -> Change:
    """Changes every element of the tensors with these ends of names."""
    generator = torch.Generator().manual_seed(4)

    def change(name: str, weight: torch.Tensor) -> torch.Tensor:
        new = then(name, weight)
        return new + 0.3 * torch.randn(new.shape, generator=generator) if name.endswith(ends) else new

    return change


@pytest.mark.parametrize("shards", [False, True], ids=["one shard", "several"])
def test_low_rank_difference_comes_back(shards: bool, tmp_path: Path) -> None:
    base = tiny.save_base(tmp_path / "base", False, torch.float32, shards)
    tuned = train(base, tmp_path / "tuned", low_rank(3, "0.self_attn.q_proj.weight", "down_proj.weight"))
    report = extract(base, tuned, tmp_path / "adapter", rank=4)
    assert sorted(tensor.name for tensor in report.tensors) == [
        "model.layers.0.mlp.down_proj.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.1.mlp.down_proj.weight",
    ]
    assert all(tensor.energy == pytest.approx(1, abs=1e-6) for tensor in report.tensors)
    assert report.energy == pytest.approx(1, abs=1e-6)
    assert (report.saved, report.left) == ((), ())
    for name, described in report.files.items():
        file = tmp_path / "adapter" / name
        assert described == {"sha256": sha256(file), "bytes": file.stat().st_size}
    merge(base, [tmp_path / "adapter"], tmp_path / "merged", "float32")
    wanted, merged = load(tuned), load(tmp_path / "merged")
    for name, tensor in wanted.items():
        torch.testing.assert_close(merged[name], tensor, rtol=1e-6, atol=2e-6)
    found = tiny.logits(tiny.live(base, tmp_path / "adapter"))
    assert tiny.relative(found, tiny.logits(tiny.load_base(tuned))) < 2e-6
    assert tiny.relative(found, tiny.logits(tiny.load_base(base))) > 0.1


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_rest_is_saved_whole(tied: bool, tmp_path: Path) -> None:
    base = tiny.save_base(tmp_path / "base", tied, torch.float32, True, attention_bias=True)
    others = ("embed_tokens.weight", "1.input_layernorm.weight", "q_proj.bias", "1.self_attn.o_proj.bias")
    change = noise(*others, then=low_rank(2, "0.self_attn.q_proj.weight", "k_proj.weight"))
    tuned = train(base, tmp_path / "tuned", change)
    with pytest.raises(CheckpointError, match=r"changed too: .*\.bias"):
        extract(base, tuned, tmp_path / "adapter", rank=2)
    assert not list(tmp_path.glob("adapter*"))
    report = extract(base, tuned, tmp_path / "adapter", rank=2, others="save")
    assert len(report.saved) == (8 if tied else 7)  # peft wants unchanged weights beside their changed biases
    expected = tiny.logits(tiny.load_base(tuned))
    assert tiny.relative(tiny.logits(tiny.live(base, tmp_path / "adapter")), expected) < 2e-6
    merge(base, [tmp_path / "adapter"], tmp_path / "merged", "float32")
    assert load(tmp_path / "merged").keys() == load(tuned).keys()
    assert tiny.relative(tiny.logits(tiny.load_base(tmp_path / "merged")), expected) < 2e-6
    report = extract(base, tuned, tmp_path / "part", rank=2, others="leave")
    assert len(report.left) == 5
    assert not any(name in key for key in load(tmp_path / "part") for name in ("bias", "norm", "embed"))


def test_energy_is_that_of_the_largest_singular_values(tmp_path: Path) -> None:
    base = tiny.save_base(tmp_path / "base", False, torch.float32, False)
    tuned = train(base, tmp_path / "tuned", noise(*(f"{name}.weight" for name in ALL_LINEAR)))
    before, after = load(base), load(tuned)
    energies = []
    for rank in (1, 4, 32, 40):  # 40 is beyond every shorter side
        report = extract(base, tuned, tmp_path / f"adapter{rank}", rank)
        factors = load(tmp_path / f"adapter{rank}")
        for tensor in report.tensors:
            difference = (after[tensor.name] - before[tensor.name]).double()
            squares = torch.linalg.svdvals(difference).square()
            assert tensor.energy == pytest.approx(float(squares[:rank].sum() / squares.sum()), abs=1e-5)
            key = f"base_model.model.{tensor.name.removesuffix('.weight')}"
            a, b = (factors[f"{key}.lora_{side}.weight"].double() for side in "AB")
            assert (a.shape[0], b.shape[1]) == (rank, rank)
            left = float((difference - b @ a).square().sum() / squares.sum())
            assert 1 - left == pytest.approx(tensor.energy, abs=1e-5)
        assert len(report.tensors) == 14
        energies.append(report.energy)
    assert energies == sorted(energies)
    assert energies[-1] == pytest.approx(1, abs=1e-5)
    merge(base, [tmp_path / "adapter40"], tmp_path / "merged", "float32")
    for name, tensor in load(tmp_path / "merged").items():
        torch.testing.assert_close(tensor, after[name], rtol=1e-5, atol=1e-5)


def test_randomised_factors_are_nearly_the_best() -> None:
    torch.manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(side, 600)).Q for side in (640, 700))
    values = 1 / torch.arange(1, 601) ** 0.5  # falls slowly: the hard case
    matrix = (u * values) @ v.T
    a, b, energy = factorise(matrix, 8)
    best = float(values[:8].square().sum())
    assert 0.999 * best < energy < 1.00001 * best
    left = float((matrix - b @ a).square().sum())
    assert left == pytest.approx(float(values.square().sum()) - energy, rel=1e-3)
    again = factorise(matrix, 8)
    assert torch.equal(a, again[0])
    assert torch.equal(b, again[1])
    low = b @ a
    assert factorise(low, 8)[2] == pytest.approx(float(low.double().square().sum()), rel=1e-5)


def test_chosen_targets_and_dtype(tmp_path: Path) -> None:
    base = tiny.save_base(tmp_path / "base", False, torch.bfloat16, False)
    tuned = train(base, tmp_path / "tuned", noise("q_proj.weight", "v_proj.weight", "lm_head.weight"))
    report = extract(base, tuned, tmp_path / "adapter", 4, "bfloat16", targets=("v_proj", "lm_head"), others="leave")
    assert len(report.tensors) == 3
    assert sorted(name.split(".")[-2] for name in report.left) == ["q_proj", "q_proj"]
    assert {tensor.dtype for tensor in load(tmp_path / "adapter").values()} == {torch.bfloat16}
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["target_modules"] == [
        "lm_head",
        "model.layers.0.self_attn.v_proj",
        "model.layers.1.self_attn.v_proj",
    ]
    tiny.live(base, tmp_path / "adapter")


def test_another_dtype_is_no_change(tmp_path: Path) -> None:
    base = tiny.save_base(tmp_path / "base", False, torch.bfloat16, False)
    change = low_rank(2, "0.self_attn.q_proj.weight")
    tuned = train(base, tmp_path / "tuned", lambda name, weight: change(name, weight.float()))
    assert len(extract(base, tuned, tmp_path / "adapter", 2).tensors) == 1


def test_what_cannot_be_extracted(tmp_path: Path) -> None:
    base = tiny.save_base(tmp_path / "base", False, torch.float32, False)
    out = tmp_path / "adapter"
    with pytest.raises(CheckpointError, match="does not differ from the base"):
        extract(base, train(base, tmp_path / "same", noise()), out, 4)
    with pytest.raises(CheckpointError, match=r"no linear layer .*embed_tokens\.weight"):
        extract(base, train(base, tmp_path / "embedding", noise("embed_tokens.weight")), out, 4, others="save")
    tuned = train(base, tmp_path / "tuned", noise("q_proj.weight"))
    with pytest.raises(UserError, match="rank"):
        extract(base, tuned, out, 0)
    with pytest.raises(UserError, match="others"):
        extract(base, tuned, out, 4, others="drop")  # type: ignore[arg-type]
    nan = train(base, tmp_path / "nan", lambda name, weight: weight * float("nan") if "q_proj" in name else weight)
    with pytest.raises(CheckpointError, match=r"q_proj\.weight holds values that are not finite"):
        extract(base, nan, out, 4)
    expert = {"model.layers.0.mlp.experts.0.up_proj.weight": torch.ones(2, 2)}
    save_file(load(base) | expert, base / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"experts\.0"):
        extract(base, train(base, tmp_path / "mixture", noise("q_proj.weight")), out, 4)
    (base / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(CheckpointError, match="gpt2"):
        extract(base, train(base, tmp_path / "gpt2", noise("q_proj.weight")), out, 4)
    assert not list(tmp_path.glob("adapter*"))
