"""Contracts that whole training stages keep, shown on the recipe that `scripts/kill_runs.py` interrupts."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from posttrain.artifact import Artifact
from posttrain.chat.contract import end_of_turn
from posttrain.chat.render import render_pair
from posttrain.chat.templates import read_folder_template
from posttrain.chat.tokenizer import load_tokenizer
from posttrain.errors import DataError, StageError
from posttrain.models.lineage import lineage_of
from posttrain.models.load import load_policy
from posttrain.pipeline.plan import partial_of, plan
from posttrain.recipe.load import load_recipe
from posttrain.recipe.schema import Runtime
from posttrain.stages import dpo as dpo_stage
from posttrain.stages.__main__ import Stop, complete
from posttrain.stages.context import Context, Events
from posttrain.stages.setup import set_up

RECIPE = Path(__file__).resolve().parents[2] / "scripts" / "kill_runs" / "recipe.yaml"


def run_stage(run_dir: Path, name: str, *overrides: str) -> Artifact:
    """Completes one stage here, as its process would; the stages it reads are there."""
    loaded = load_recipe(str(RECIPE), list(overrides), os.environ)
    job = next(stage.job for stage in plan(loaded, run_dir).stages if stage.stage == name)
    partial = partial_of(run_dir, name)
    partial.mkdir(parents=True, exist_ok=True)
    complete(job, partial, Events(None), Stop(), time.time())
    artifact = Artifact.read(run_dir / name)
    assert artifact is not None
    return artifact


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a base and an SFT adapter on it."""
    folder = tmp_path_factory.mktemp("contracts") / "kills"
    run_stage(folder, "base")
    run_stage(folder, "sft_lora")
    return folder


@pytest.fixture(scope="module")
def aligned(run_dir: Path) -> Artifact:
    """DPO with a new adapter above the one of SFT."""
    return run_stage(run_dir, "dpo_lora")


@pytest.mark.contract(number=7)
def test_the_saved_folders_stop(run_dir: Path, aligned: Artifact) -> None:
    for folder in (run_dir / "sft_lora", aligned.folder):
        template = read_folder_template(folder)
        assert template is not None
        end = end_of_turn(load_tokenizer(folder), template)
        assert end.text == "<|im_end|>"
        assert end.id in json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    assert Artifact.read(run_dir / "sft_lora").record.summary["metrics"]["rows_that_stop"] == 1.0  # type: ignore[union-attr]


@torch.no_grad()
def scores(folder: Path) -> torch.Tensor:
    """Log-probs of both answers of every pair under a saved model, each sequence by itself: [N, 2] fp32."""
    tokenizer, template = load_tokenizer(folder), read_folder_template(folder)
    assert template is not None
    model = load_policy(lineage_of(folder, "model"), torch.float32, "cpu", "sdpa")
    found = []
    for line in (RECIPE.parent / "pairs.jsonl").read_text().splitlines():
        row = json.loads(line)
        asked = [{"role": "user", "content": row["prompt"]}]
        answers = [[{"role": "assistant", "content": row[key]}] for key in ("chosen", "rejected")]
        prompt, *sides = render_pair(tokenizer, template, asked, *answers)
        for side in sides:
            ids = torch.tensor([[*prompt, *side]])
            logps = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
            found.append(logps[-len(side) :].sum())
    return torch.stack(found).view(-1, 2)


@pytest.mark.contract(number=9)
def test_the_reference_of_dpo_is_the_sft_policy(run_dir: Path, aligned: Artifact) -> None:
    proof = aligned.record.summary["metrics"]["step_zero"]
    assert proof["largest_difference_per_token"] < 1e-5
    assert proof["loss"] == pytest.approx(math.log(2), abs=1e-6)
    (table,) = (run_dir / ".cache" / "reference").glob("*.npy")
    known = torch.from_numpy(np.load(table))
    assert torch.allclose(known, scores(run_dir / "sft_lora"), atol=1e-4)
    assert not torch.allclose(known, scores(aligned.folder), atol=1e-2)


def bare(run_dir: Path, folder: Path) -> Path:
    """A copy of a run before its DPO."""
    shutil.copytree(run_dir, folder, ignore=shutil.ignore_patterns("dpo_lora*", ".cache"))
    return folder


@pytest.mark.contract(number=9)
def test_dpo_against_the_bare_base_is_stopped(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def of_the_base(trainer: Any, *rest: Any) -> torch.Tensor:
        with trainer.model.disable_adapter():
            return original(trainer, *rest)

    original = dpo_stage.reference_logps
    monkeypatch.setattr(dpo_stage, "reference_logps", of_the_base)
    copy = bare(run_dir, tmp_path / "kills")
    with pytest.raises(StageError, match="policy and reference differ") as error:
        run_stage(copy, "dpo_lora")
    assert "step 0" in error.value.where
    assert not (copy / "dpo_lora").exists()
    assert not list((copy / "dpo_lora.partial").glob("checkpoints/*"))


@pytest.mark.contract(number=11)
def test_every_row_and_token_is_in_the_ledger(run_dir: Path, aligned: Artifact) -> None:
    for stage in ("base", "sft_lora", "dpo_lora"):
        artifact = Artifact.read(run_dir / stage)
        assert artifact is not None
        assert artifact.record.ledger is not None
        total = artifact.record.ledger["total"]
        assert total["rows"]["in"] == total["rows"]["trained"] == 20
        rest = {key: count for key, count in total["tokens"].items() if key not in ("in", "dropped")}
        assert total["tokens"]["in"] == sum(rest.values()) > 0


@pytest.mark.contract(number=11)
def test_rows_do_not_vanish(run_dir: Path, tmp_path: Path) -> None:
    """`max_length` of 33 tokens leaves out some of the 20 conversations, which is more than 2 % of them."""
    copy, shorter = bare(run_dir, tmp_path / "kills"), "stages.sft_full.data.max_length=33"
    with pytest.raises(DataError, match=r"of 20 rows \(.* were dropped: longer than max_length"):
        run_stage(copy, "sft_full", shorter, "stages.sft_full.data.long_rows=drop")
    assert not (copy / "sft_full").exists()


def context(folder: Path, **runtime: Any) -> Context:
    """What `set_up` looks at."""
    return Context(
        run_dir=folder,
        recipe_dir=folder,
        stage="sft",
        folder=folder,
        seed=1,
        precision="fp32",
        runtime=Runtime(**runtime),
        trainer={},
        inputs={},
        identity={},
        fingerprint="",
        events=Events(None),
        should_stop=Stop(),
    )


@pytest.mark.contract(number=14)
@pytest.mark.parametrize(
    ("runtime", "found"),
    [
        ({"device": "cpu", "num_processes": 2}, "1 processes started, the recipe asks for 2"),
        ({"device": "cpu", "num_processes": 4, "num_machines": 2}, "1 processes started, the recipe asks for 4"),
        ({"device": "cuda"}, "torch sees no GPU"),
    ],
)
def test_a_machine_that_is_not_the_recipes_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runtime: dict[str, Any], found: str
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(StageError, match=found):
        set_up(context(tmp_path, **runtime))
    assert set_up(context(tmp_path, device="cpu", attn_implementation="eager")).attn_implementation == "eager"
