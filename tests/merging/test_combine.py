"""Each method of combination against its paper's formula, written densely in NumPy and float64."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from merging import tiny
from safetensors.torch import load_file, save_file

from posttrain.artifact import sha256
from posttrain.merging.combine import CombineReport, Input, combine, combine_into
from posttrain.merging.merge import merge
from posttrain.merging.methods import Method

SHAPES: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (12, 8),
    "model.layers.0.self_attn.q_proj.weight": (64, 24),
    "model.layers.0.mlp.experts.gate_up_proj": (4, 6, 10),
    "model.layers.0.input_layernorm.weight": (8,),
    "model.norm.weight": (8,),
    "lm_head.weight": (12, 8),
}
SAME = "model.norm.weight"
"""Equal in all models."""
CONFIG = {"model_type": "llama", "vocab_size": 12, "tie_word_embeddings": False}
METHODS = {
    "scale": (1, Method("scale", (0.7,))),
    "linear, two": (2, Method("linear", (0.25, 0.75))),
    "linear, three": (3, Method("linear", (1.0, 2.0, 3.0), normalize=True)),
    "linear, outside": (2, Method("linear", (1.5, -0.5))),
    "slerp": (2, Method("slerp", t=0.3)),
    "task arithmetic, two": (2, Method("task_arithmetic", (0.8, -0.3))),
    "task arithmetic, three": (3, Method("task_arithmetic", (0.5, 1.0, 0.25))),
    "task arithmetic, mean": (3, Method("task_arithmetic", (0.5, 1.0, 0.25), normalize=True)),
    "ties, two": (2, Method("ties", (0.6, 0.6), density=0.3)),
    "ties, three": (3, Method("ties", (1.0, 0.5, 0.7), density=0.5)),
    "ties, normalised": (3, Method("ties", (1.0, 0.5, 0.7), density=0.2, normalize=True)),
    "ties, untrimmed": (3, Method("ties", (1.0, 1.0, 1.0), density=1.0)),
    "dare, one": (1, Method("dare_linear", (1.0,), density=0.4, seed=3)),
    "dare, two": (2, Method("dare_linear", (0.5, 0.7), density=0.4, seed=3)),
    "dare, three": (3, Method("dare_linear", (0.5, 0.7, 0.2), density=0.9, seed=4, normalize=True)),
    "dare ties, two": (2, Method("dare_ties", (0.5, 0.7), density=0.4, seed=3)),
    "dare ties, three": (3, Method("dare_ties", (1.0, 1.0, 2.0), density=0.6, seed=5, normalize=True)),
}

Weights = dict[str, torch.Tensor]


def random_weights(seed: int, around: Weights | None = None) -> Weights:
    """A model, or one that was trained a little from another."""
    generator = torch.Generator().manual_seed(seed)
    new = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    if around is None:
        return new | {"model.steps": torch.tensor([7])}
    return {name: t if name == SAME or name not in new else t + 0.1 * new[name] for name, t in around.items()}


def save(folder: Path, weights: Weights, config: dict[str, Any] = CONFIG) -> Path:
    folder.mkdir()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def load(folder: Path) -> Weights:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    """The base and three models trained from it, in fp32."""
    base = random_weights(0)
    return [save(tmp_path / "m0", base), *(save(tmp_path / f"m{n}", random_weights(n, base)) for n in (1, 2, 3))]


def go(models: list[Path], method: Method, out: Path, dtype: str = "float32", **settings: Any) -> CombineReport:
    out.mkdir()
    inputs = [Input(model) for model in models[1:]]
    return combine_into(out, models[0], inputs, method, dtype, **settings)


def dense(method: Method, name: str, base: np.ndarray, tuned: list[np.ndarray]) -> np.ndarray:
    """The papers' formulas, on whole tensors in float64."""
    deltas = [one - base for one in tuned]
    weights = list(method.weights)
    if method.kind == "scale":
        return base + weights[0] * deltas[0]
    if method.kind == "slerp":
        return base + great_circle(method.t or 0.0, *deltas)
    if method.kind == "linear":
        total = sum(weight * one for weight, one in zip(weights, tuned, strict=True))
        return total / sum(weights) if method.normalize else total
    if method.kind == "ties":
        deltas = [keep_largest(delta, method.density or 0.0) for delta in deltas]
    if method.kind.startswith("dare"):
        deltas = [drop(delta, method, name, index) for index, delta in enumerate(deltas)]
    if method.kind in ("task_arithmetic", "dare_linear"):
        total = sum(weight * delta for weight, delta in zip(weights, deltas, strict=True))
        return base + (total / sum(weights) if method.normalize else total)
    return base + disjoint_mean(deltas, weights, method.normalize)


def great_circle(t: float, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    if not a.any() or not b.any():
        return (1 - t) * a + t * b
    angle = math.acos(np.vdot(a, b) / np.linalg.norm(a) / np.linalg.norm(b))
    return (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)


def keep_largest(delta: np.ndarray, density: float) -> np.ndarray:
    flat = delta.reshape(-1).copy()
    order = np.argsort(-np.abs(flat), kind="stable")
    flat[order[max(1, round(density * flat.size)) :]] = 0
    return flat.reshape(delta.shape)


def drop(delta: np.ndarray, method: Method, name: str, index: int) -> np.ndarray:
    """One stream for the whole tensor, as the mask's definition says it."""
    import hashlib

    digest = hashlib.sha256(f"{method.seed} {index} {name}".encode()).digest()
    stream = np.random.Philox(key=int.from_bytes(digest[:16], "little")).random_raw(delta.size)
    words = np.stack([stream & 0xFFFFFFFF, stream >> np.uint64(32)], axis=1).reshape(-1)[: delta.size]
    keep = words.astype(np.float64) / 2**32 < (method.density or 0.0)
    return np.where(keep.reshape(delta.shape), delta / (method.density or 1.0), 0)


def disjoint_mean(deltas: list[np.ndarray], weights: list[float], normalize: bool) -> np.ndarray:
    result = np.zeros(deltas[0].size)
    for place, values in enumerate(zip(*(delta.reshape(-1) for delta in deltas), strict=True)):
        votes = [weight * value for weight, value in zip(weights, values, strict=True)]
        sign = np.sign(sum(votes))
        chosen = [i for i, vote in enumerate(votes) if sign != 0 and np.sign(vote) == sign]
        if chosen:
            share = sum(weights[i] for i in chosen) if normalize else len(chosen)
            result[place] = sum(votes[i] for i in chosen) / share
    return result.reshape(deltas[0].shape)


@pytest.mark.parametrize("case", METHODS)
def test_equals_the_papers_formula(case: str, models: list[Path], tmp_path: Path) -> None:
    count, method = METHODS[case]
    report = go(models[: count + 1], method, tmp_path / "out", block=40)
    base, *tuned = (load(model) for model in models[: count + 1])
    combined = load(tmp_path / "out")
    assert combined.keys() == base.keys()
    for name in SHAPES:
        wanted = dense(method, name, base[name].double().numpy(), [one[name].double().numpy() for one in tuned])
        np.testing.assert_allclose(combined[name].numpy(), wanted, rtol=1e-6, atol=1e-6)
    assert torch.equal(combined["model.steps"], base["model.steps"])
    assert {tensor.name for tensor in report.tensors} == SHAPES.keys() - {SAME}
    assert (report.copied, report.cast) == (2, 0)


@pytest.mark.parametrize("case", METHODS)
def test_same_bytes_again_and_for_every_block_size(case: str, models: list[Path], tmp_path: Path) -> None:
    count, method = METHODS[case]
    reports = [
        go(models[: count + 1], method, tmp_path / f"out{number}", block=block)
        for number, block in enumerate((1 << 20, 1 << 20, 1, 13))
    ]
    assert len({json.dumps(report.files) for report in reports}) == 1


@pytest.mark.parametrize("method", [Method("linear", (0.4, 0.6)), Method("slerp", t=0.4)], ids=["linear", "slerp"])
def test_whole_models_need_no_base(method: Method, models: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    combine(None, [Input(models[1]), Input(models[2])], out, method, "float32")
    one, other, combined = load(models[1]), load(models[2]), load(out)
    for name in SHAPES:
        a, b = one[name].double().numpy(), other[name].double().numpy()
        wanted = 0.4 * a + 0.6 * b if method.kind == "linear" else great_circle(0.4, a, b)
        if name == SAME:
            assert torch.equal(combined[name], one[name])
        np.testing.assert_allclose(combined[name].numpy(), wanted, rtol=1e-6, atol=1e-6)


def test_slerp_of_parallel_deltas_is_a_straight_line(tmp_path: Path) -> None:
    base = random_weights(0)
    step = random_weights(1, base)
    models = [save(tmp_path / "m0", base), save(tmp_path / "m1", step)]
    models.append(save(tmp_path / "m2", {name: base[name] + 2 * (step[name] - base[name]) for name in base}))
    go(models, Method("slerp", t=0.5), tmp_path / "out")
    for name, tensor in load(tmp_path / "out").items():
        torch.testing.assert_close(tensor, base[name] + ((step[name] - base[name]) * 1.5).to(tensor.dtype))


def test_adapters_add_up_as_whole_deltas(tmp_path: Path) -> None:
    base = tiny.save_base(tmp_path / "base", False, torch.float32, shards=True)
    adapters = [
        tiny.save_adapter(base, tmp_path / f"a{seed}", seed=seed, target_modules=["q_proj", "down_proj"], r=rank)
        for seed, rank in ((1, 4), (2, 3))
    ]
    method = Method("task_arithmetic", (0.5, 0.75))
    report = combine(base, [Input(adapters=(a,)) for a in adapters], tmp_path / "out", method, "float32")
    before, after = load(base), load(tmp_path / "out")
    factors = [load_file(adapter / "adapter_model.safetensors") for adapter in adapters]
    for name, weight in before.items():
        key = f"base_model.model.{name.removesuffix('.weight')}"
        wanted = weight.double()
        if f"{key}.lora_A.weight" in factors[0]:
            for share, rank, parts in zip(method.weights, (4, 3), factors, strict=True):
                b, a = (parts[f"{key}.lora_{side}.weight"].double() for side in "BA")
                wanted += share * 8 / rank * (b @ a)
        torch.testing.assert_close(after[name].double(), wanted, rtol=1e-6, atol=1e-6)
    assert len(report.tensors) == 4
    assert report.copied == len(before) - 4
    merge(base, [adapters[0]], tmp_path / "full", "float32")  # an adapter and its merged model are one input
    inputs = [Input(tmp_path / "full"), Input(adapters=(adapters[1],))]
    combine(base, inputs, tmp_path / "mixed", method, "float32")
    for name, tensor in load(tmp_path / "mixed").items():
        torch.testing.assert_close(tensor, after[name], rtol=1e-6, atol=1e-6)


def test_scale_of_one_is_the_merge(tmp_path: Path, shared_dir: Path) -> None:
    base = shared_dir / "data" / "stories260k"
    chain = tuple(
        tiny.save_adapter(base, tmp_path / f"a{seed}", seed=seed, target_modules=["q_proj", "down_proj"])
        for seed in (1, 2)
    )
    merge(base, list(chain), tmp_path / "merged", "float32")
    for factor, wanted in ((1.0, tmp_path / "merged"), (0.0, base)):
        out = tmp_path / f"scaled{factor}"
        combine(base, [Input(adapters=chain)], out, Method("scale", (factor,)), "float32")
        combined = load(out)
        for name, tensor in load(wanted).items():
            torch.testing.assert_close(combined[name], tensor, rtol=1e-6, atol=1e-7)


def test_report_and_folder(models: list[Path], tmp_path: Path) -> None:
    (models[0] / "generation_config.json").write_text('{"eos_token_id": 2}')
    method = Method("ties", (1.0, 1.0), density=0.25)
    out = tmp_path / "out"
    report = combine(models[0], [Input(models[1]), Input(models[2])], out, method, "bfloat16", max_shard_size=1000)
    assert {path.name for path in out.iterdir()} == set(report.files)
    assert {"config.json", "generation_config.json", "model.safetensors.index.json"} <= set(report.files)
    for name, described in report.files.items():
        assert described == {"sha256": sha256(out / name), "bytes": (out / name).stat().st_size}
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == report.total_bytes
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    base, *tuned = (load(model) for model in models[:3])
    assert (report.copied, report.cast) == (1, 1)
    for tensor in report.tensors:
        deltas = [(one[tensor.name] - base[tensor.name]).double() for one in tuned]
        assert tensor.norms == pytest.approx([float(delta.norm()) for delta in deltas])
        assert tensor.kept is not None
        assert all(0.1 < share <= 0.25 for share in tensor.kept)
        assert tensor.cosine is not None
        assert tensor.cosine > 0.99
    json.dumps(report.as_dict(), allow_nan=False)


def test_expectation_of_dare_is_the_delta(tmp_path: Path) -> None:
    base = {"model.w.weight": torch.zeros(300, 200)}
    models = [save(tmp_path / "m0", base), save(tmp_path / "m1", {"model.w.weight": torch.ones(300, 200)})]
    report = go(models, Method("dare_linear", (1.0,), density=0.2, seed=0), tmp_path / "out")
    combined = load(tmp_path / "out")["model.w.weight"]
    assert set(combined.unique().tolist()) == {0.0, 5.0}
    assert float(combined.mean()) == pytest.approx(1, abs=0.03)
    assert report.tensors[0].kept == pytest.approx((0.2,), abs=0.01)


@pytest.mark.parametrize("shards", [10**9, 500])
def test_tied_embedding_is_combined_once(shards: int, tmp_path: Path) -> None:
    tied = CONFIG | {"tie_word_embeddings": True}
    full = [random_weights(0)]
    full += [random_weights(n, full[0]) for n in (1, 2)]
    for weights in full:
        del weights["lm_head.weight"]
    stored_twice = full[2] | {"lm_head.weight": full[2]["model.embed_tokens.weight"].clone()}
    models = [save(tmp_path / "m0", full[0], tied), save(tmp_path / "m1", full[1], tied)]
    models.append(save(tmp_path / "m2", stored_twice, tied))
    report = go(models, Method("linear", (0.5, 0.5)), tmp_path / "out", max_shard_size=shards)
    assert report.tied is True
    assert "lm_head.weight" not in load(tmp_path / "out")
    stored_twice["lm_head.weight"] += 1
    own = save(tmp_path / "m3", stored_twice, CONFIG)
    report = go([models[0], models[1], own], Method("linear", (0.5, 0.5)), tmp_path / "untied", max_shard_size=shards)
    assert report.tied is False
    assert json.loads((tmp_path / "untied" / "config.json").read_text())["tie_word_embeddings"] is False
    wanted = (full[1]["model.embed_tokens.weight"] + stored_twice["lm_head.weight"]) / 2
    torch.testing.assert_close(load(tmp_path / "untied")["lm_head.weight"], wanted)
