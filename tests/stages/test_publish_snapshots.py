"""Snapshots of training, published with their data order."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from posttrain.artifact import Artifact
from posttrain.errors import CheckpointError, UserError
from posttrain.pretraining.order import FILE, Order, publish_order, rows_of_step, save_order
from posttrain.recipe.schema import Publish
from posttrain.stages.context import ModelInput, Summary
from posttrain.stages.pretrain import run as pretrain
from posttrain.stages.publish import push, run
from tests.stages.stage_tiny import finish, make_context
from tests.stages.test_pretrain_continue import CATALAN, house, make_run, stage

STEPS = ["step-0", "step-1", "step-2", "step-3"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a finished `pretrain` stage that kept four snapshots."""
    run_dir = make_run(tmp_path_factory.mktemp("trained"), house("llama"))
    config, context = stage(run_dir, tokenizer="@catalan", snapshots={"step_zero": True, "every": 1})
    finish(context, "pretrain", pretrain(config, context))
    return run_dir


@pytest.fixture
def run_dir(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def publish(run_dir: Path, **more: Any) -> Summary:
    config = Publish.model_validate({"kind": "publish", "model": "@more", "snapshots": True, **more})
    context = make_context(run_dir, "release", "sft")
    given = ModelInput("@more", run_dir / "more", None, Artifact.read(run_dir / "more"))
    return run(config, replace(context, inputs={"model": given}))


def test_a_stranger_loads_every_step_and_finds_its_rows(run_dir: Path, tmp_path: Path) -> None:
    target = tmp_path / "shipped"
    expected = [rows_of_step(run_dir / "more", step) for step in (1, 2, 3)]
    publish(run_dir, to=str(target))
    shutil.rmtree(run_dir)
    checked = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=target, capture_output=True, text=True, check=True)
    assert checked.stdout.count(": OK") == sum(path.is_file() for path in target.rglob("*")) - 1
    assert sorted(path.name for path in (target / "snapshots").iterdir()) == STEPS
    weights = []
    for folder in (*(target / "snapshots" / step for step in STEPS), target):
        model, found = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert len(AutoTokenizer.from_pretrained(folder)) <= model.config.vocab_size
        weights.append(model.model.layers[0].mlp.up_proj.weight.detach())
    assert torch.equal(weights[3], weights[4])
    assert not torch.equal(weights[0], weights[1])
    assert len((target / "metrics.jsonl").read_text().splitlines()) > 0
    shown = [rows_of_step(target, step) for step in (1, 2, 3)]
    assert [[(source, row) for source, _, row in step] for step in shown] == [
        [(source, row) for source, _, row in step] for step in expected
    ]
    assert {file for step in shown for _, file, _ in step} == {"texts.jsonl"}
    assert all(1 <= row <= len(CATALAN) for step in shown for _, _, row in step)


def test_the_card_says_how_to_use_them(run_dir: Path, tmp_path: Path) -> None:
    publish(run_dir, to=str(tmp_path / "shipped"))
    card = (tmp_path / "shipped" / "README.md").read_text()
    assert 'each in a folder `snapshots/step-N`: `from_pretrained("snapshots/step-3")`. Steps: 0, 1, 2, 3.' in card
    assert 'rows_of_step(Path("."), 3)' in card
    assert "A base model: it continues texts" in card
    assert "apply_chat_template" not in card
    assert str(run_dir) not in card


def test_without_the_setting_nothing_of_them_is_published(run_dir: Path) -> None:
    summary = publish(run_dir, snapshots=False)
    assert not any(name.startswith("snapshots") or name == FILE for name in summary.files)
    assert Publish.model_validate({"kind": "publish", "model": "@m", "snapshots": False}).snapshots is None


def test_a_stage_without_snapshots_is_refused(run_dir: Path) -> None:
    shutil.rmtree(run_dir / "more" / "snapshots")
    with pytest.raises(UserError, match=r"stages.release.snapshots: more left no snapshots"):
        publish(run_dir)


def test_a_snapshot_of_another_model_is_refused(run_dir: Path) -> None:
    path = run_dir / "more" / "snapshots" / "step-2" / "model.safetensors"
    weights = load_file(path)
    weights.pop("model.norm.weight")
    path.unlink()
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"step-2: holds other tensors"):
        publish(run_dir)


class FakeHub:
    """A repository with branches, as far as publishing needs it."""

    def __init__(self) -> None:
        self.branches: dict[str, set[str]] = {}

    def create_repo(self, repo_id: str, **more: Any) -> None:
        self.branches.setdefault("main", {".gitattributes"})

    def create_branch(self, repo_id: str, *, branch: str, exist_ok: bool) -> None:
        assert exist_ok or branch not in self.branches
        self.branches.setdefault(branch, set(self.branches["main"]))

    def upload_folder(
        self,
        *,
        repo_id: str,
        folder_path: Path,
        commit_message: str,
        revision: str = "main",
        allow_patterns: list[str] | None = None,
        delete_patterns: list[str] | None = None,
    ) -> None:
        files = {str(path.relative_to(folder_path)) for path in folder_path.rglob("*") if path.is_file()}
        kept = {".gitattributes"} if delete_patterns == ["*"] else self.branches[revision]
        self.branches[revision] = kept | (files if allow_patterns is None else files & set(allow_patterns))


def test_the_hub_has_a_branch_for_each_step(run_dir: Path) -> None:
    summary = publish(run_dir)
    hub = FakeHub()
    for _ in range(2):  # publishing again changes nothing
        push(run_dir / "release.partial", summary.files, "me/model", True, [0, 1, 2, 3], api=hub)
        assert sorted(hub.branches) == ["main", *STEPS]
        assert {"README.md", FILE, "metrics.jsonl", "model.safetensors"} <= hub.branches["main"]
        assert not any(name.startswith("snapshots/") for name in hub.branches["main"])
        texts = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
        assert hub.branches["step-2"] == {".gitattributes", "model.safetensors", *texts}


def test_published_names_of_data_files_tell_nothing_of_the_machine(tmp_path: Path) -> None:
    files = [
        "/home/me/data/es/train.jsonl",
        "/home/me/data/ca/train.jsonl",
        "/home/me/other.csv",
        "/home/me/.cache/huggingface/hub/datasets--some--texts/snapshots/0123abc/data/part-0.parquet",
    ]
    places = [np.array([[number, 7]]) for number in range(4)]
    items = np.array([[number, 0] for number in range(4)])
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    save_order(tmp_path / "in", Order(items, np.array([0, 4])), list("abcd"), files, places)
    publish_order(tmp_path / "in", tmp_path / "out")
    names = ["es/train.jsonl", "ca/train.jsonl", "other.csv", "some/texts@0123abc/data/part-0.parquet"]
    assert rows_of_step(tmp_path / "out", 1) == [(source, name, 7) for source, name in zip("abcd", names, strict=True)]
    assert [path.name for path in (tmp_path / "out").iterdir()] == [FILE]
