"""The `sft` and `dpo` stages as a stage process runs them: the reference is right, or nothing is trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from posttrain.artifact import Artifact, sha256
from posttrain.chat.templates import load_template
from posttrain.errors import Interrupted, StageError
from posttrain.models.lineage import lineage_of
from posttrain.models.load import load_base, load_policy
from posttrain.pretraining.order import rows_of_step
from posttrain.recipe.schema import Dpo, Sft
from posttrain.stages import dpo, sft
from posttrain.stages.context import Context, Summary
from tests.stages.stage_tiny import chats, finish, make_context, preferences, write_lines
from tests.training.spine_tiny import save_base

STEPS = 3


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose SFT stages are done: an adapter, one on 4 bits, and a full model."""
    folder = tmp_path_factory.mktemp("run")
    save_base(folder / "base")
    write_lines(folder / "chats.jsonl", chats(16))
    write_lines(folder / "pairs.jsonl", preferences(13))
    for stage, method in (("lora", {"lora": {"r": 4}}), ("qlora", {"qlora": {"r": 4}}), ("full", "full")):
        context = make_context(folder, stage, "sft", {"learning_rate": 2e-2, "max_steps": STEPS})
        given = {"kind": "sft", "model": "@base", "chat_template": "chatml", "method": method}
        config = Sft.model_validate({**given, "data": {"sources": [{"path": "./chats.jsonl"}], "max_length": 128}})
        finish(context, "sft", sft.run(config, context))
    return folder


def settings(**more: Any) -> Dpo:
    data = {"sources": [{"path": "./pairs.jsonl"}], "max_length": 64}
    return Dpo.model_validate({"kind": "dpo", "model": "@sft", "data": data, **more})


def start(
    run: Path,
    parent: str,
    name: str,
    should_stop: Callable[[], bool] = lambda: False,
    runtime: dict[str, Any] | None = None,
    **trainer: Any,
) -> tuple[Context, Callable[[], Summary]]:
    """A DPO stage that is ready to run."""
    fields = {"learning_rate": 1e-2, "max_steps": STEPS, "save_steps": 2, "logging_steps": 10, **trainer}
    context = make_context(run, name, "dpo", fields, model=parent, should_stop=should_stop, runtime=runtime)
    return context, lambda: dpo.run(settings(), context)


def weights(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path) for path in folder.glob("*.safetensors")}


@pytest.mark.parametrize("parent", ["lora", "qlora", "full"])
def test_at_step_zero_the_policy_is_its_reference(run: Path, parent: str) -> None:
    context, go = start(run, parent, f"dpo-{parent}")
    summary = go()
    proof = summary.metrics["step_zero"]
    assert proof["largest_difference_per_token"] < 1e-5
    assert proof["loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert summary.metrics["steps"] == STEPS
    assert len(rows_of_step(context.folder, 1)) == 4
    assert summary.metrics["pairs"]["layout"] == "shared_prefix"
    assert 0 < summary.metrics["pairs"]["saved_tokens"] < summary.metrics["pairs"]["plain_tokens"]
    assert summary.metrics["attention"] == {"backend": "packed_sdpa", "skipped": {}}
    assert summary.metrics["memory"]["measured_bytes"] > 1 << 26
    assert summary.metrics["memory"]["predicted_bytes"] > 1 << 26
    if parent != "full":
        assert [link["label"] for link in summary.lineage["adapters"]] == [f"@{parent}", f"@dpo-{parent}"]  # type: ignore[index]


def test_the_record_names_the_template_that_was_trained(run: Path) -> None:
    context, go = start(run, "lora", "recorded")
    expected = {
        "template": "chatml",
        "digest": load_template("chatml", run).digest,
        "end_of_turn": "<|im_end|>",
        "masks": "marks",
    }
    for artifact in (Artifact.read(run / "lora"), finish(context, "dpo", go())):
        assert artifact is not None
        assert artifact.record.summary["metrics"]["chat"] == expected
        assert sha256(artifact.folder / "chat_template.jinja") == expected["digest"]


def test_both_layouts_train_to_the_same_loss(run: Path) -> None:
    found = {}
    for wanted in ("on", "off"):
        _, go = start(run, "lora", f"layout-{wanted}", runtime={"share_prefix": wanted})
        found[wanted] = go().metrics
    assert [found[wanted]["pairs"]["layout"] for wanted in found] == ["shared_prefix", "packed"]
    assert found["on"]["last_loss"] == pytest.approx(found["off"]["last_loss"], rel=1e-5)
    assert len({cache.stem for cache in cache_of(run)}) >= 2  # each has references of its own path


def cache_of(run: Path) -> set[Path]:
    return set((run / ".cache" / "reference").glob("*.npy"))


def test_a_cached_reference_that_is_not_the_policys_aborts(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = cache_of(run)
    start(run, "lora", "honest", ld_alpha=0.4)[1]()
    (cache,) = cache_of(run) - before
    table = np.load(cache)
    monkeypatch.setattr(dpo, "run_loop", lambda *_: pytest.fail("trained"))
    for shift in (1e-3, -2.0, float("inf")):
        np.save(cache, table + np.array([0, shift], dtype=np.float32))
        context, go = start(run, "lora", "moved", ld_alpha=0.4)
        with pytest.raises(StageError, match=r"step 0: policy and reference differ: sequence 1: .* per token"):
            go()
        assert not (context.folder / "checkpoints").exists()


def test_the_bare_base_is_never_the_reference(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What tools have done wrong: reference log-probs of the model with every adapter off."""
    original = dpo.reference_logps

    def of_the_base(trainer: Any, *rest: Any) -> torch.Tensor:
        with trainer.model.disable_adapter():
            return original(trainer, *rest)

    monkeypatch.setattr(dpo, "reference_logps", of_the_base)
    monkeypatch.setattr(dpo, "run_loop", lambda *_: pytest.fail("trained"))
    _, go = start(run, "lora", "wrong", ld_alpha=0.75)
    with pytest.raises(StageError, match="policy and reference differ"):
        go()


def test_the_loss_is_looked_at_beside_the_log_probs(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dpo.SpineDpoTrainer, "loss_before_training", lambda *_: 0.8)
    _, go = start(run, "lora", "loss")
    with pytest.raises(StageError, match=r"the loss is 0.800000 where ratio 0 means 0.693147"):
        go()


@pytest.mark.parametrize("parent", ["qlora", "full"])
def test_a_stage_that_was_stopped_twice_ends_as_one_that_never_was(run: Path, parent: str) -> None:
    straight, go = start(run, parent, f"straight-{parent}", beta=0.2)
    go()
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return asked > 1

    torn, go = start(run, parent, f"torn-{parent}", stop, beta=0.2)
    with pytest.raises(Interrupted, match="step 2 of 3"):
        go()
    assert [path.name for path in (torn.folder / "checkpoints").iterdir()] == ["checkpoint-2"]
    torn, go = start(run, parent, f"torn-{parent}", beta=0.2)
    summary = go()
    assert summary.metrics["resumed_from"] == 2
    assert weights(torn.folder) == weights(straight.folder)
    assert weights(torn.folder)
    orders = [np.load(context.folder / "data_order.npz")["items"].tolist() for context in (torn, straight)]
    assert orders[0] == orders[1]


def test_a_stop_in_the_reference_pass_keeps_what_is_done(run: Path) -> None:
    before = cache_of(run)
    _, go = start(run, "lora", "early", lambda: True, ld_alpha=0.9)
    with pytest.raises(Interrupted, match="reference log-probs: stopped as asked"):
        go()
    (cache,) = cache_of(run) - before
    assert np.isnan(np.load(cache)).all()
    _, go = start(run, "lora", "early", ld_alpha=0.9)
    go()
    assert not np.isnan(np.load(cache)).any()


def test_the_saved_adapter_is_the_policy_that_was_trained(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    live: list[torch.Tensor] = []
    ids = torch.tensor([[256, 3, 4, 257, 10, 256, 9]])
    original = dpo.save_policy

    @torch.no_grad()
    def logits(model: Any) -> torch.Tensor:
        return model(input_ids=ids).logits

    def save(policy: Any, *rest: Any) -> None:
        live.append(logits(policy.model.eval()))
        original(policy, *rest)

    monkeypatch.setattr(dpo, "save_policy", save)
    context, go = start(run, "qlora", "saved", beta=0.3)
    finish(context, "dpo", go())
    lineage = lineage_of(run / "saved", "@saved")
    reloaded = logits(load_policy(lineage, torch.float32, "cpu", "sdpa"))
    assert torch.equal(reloaded, live[-1])
    base = load_base(run / "base", torch.float32, "cpu", "sdpa", lineage.quantization)
    assert (logits(base) - reloaded).abs().max() > 1e-2
