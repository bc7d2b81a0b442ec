"""The publish stage: what a stranger receives works, is whole, and appears at once or not at all."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from posttrain.artifact import RECORD, Artifact, Record
from posttrain.errors import PosttrainError, UserError
from posttrain.recipe.bundled import find_bundled
from posttrain.recipe.schema import Publish, Runtime
from posttrain.stages.context import Context, Events, ModelInput
from posttrain.stages.publish import copy_to, push, run
from tests.evaluation.tiny import save


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run with a finished merge stage and its recipe."""
    folder = tmp_path / "demo"
    aligned = save(folder / "aligned", 1, find_bundled("chat_templates", "chatml").read_text(encoding="utf-8"))
    record = Record("aligned", "merge", 1, "f" * 64, {"seed": 3}, summary={"headline": "certified"})
    (aligned / RECORD).write_text(json.dumps(asdict(record)))
    (aligned / "log.txt").write_text("not for strangers")
    (folder / "recipe.yaml").write_text("# recipe.yaml as it ran; paths start from /home/me\nname: demo\n")
    return folder


def context(run_dir: Path, **inputs: ModelInput) -> Context:
    folder = run_dir / "release.partial"
    folder.mkdir(exist_ok=True)
    (folder / "job.json").write_text("{}")
    aligned = run_dir / "aligned"
    return Context(
        run_dir=run_dir,
        recipe_dir=run_dir,
        stage="release",
        folder=folder,
        seed=42,
        precision="fp32",
        runtime=Runtime(device="cpu"),
        trainer={},
        inputs={"model": ModelInput("@aligned", aligned, artifact=Artifact.read(aligned)), **inputs},
        identity={},
        fingerprint="",
        events=Events(None),
        should_stop=lambda: False,
    )


def publish(run_dir: Path, **more: Any) -> Any:
    return run(Publish.model_validate({"kind": "publish", "model": "@aligned", **more}), context(run_dir))


def test_published_folder_is_self_contained(run_dir: Path, tmp_path: Path) -> None:
    target = tmp_path / "shipped" / "model"
    summary = publish(run_dir, to=str(target), license="apache-2.0")
    assert sorted(str(path.relative_to(target)) for path in target.rglob("*")) == [
        "README.md",
        "SHA256SUMS",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "recipe.yaml",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert sorted(summary.files) == sorted(path.name for path in target.iterdir())
    assert summary.headline.startswith("demo-aligned: 9 files, ")
    checked = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=target, capture_output=True, text=True, check=True)
    assert checked.stdout.count(": OK") == 8

    shutil.rmtree(run_dir)  # nothing is left of what it came from
    model, tokenizer = AutoModelForCausalLM.from_pretrained(target), AutoTokenizer.from_pretrained(target)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Kaixo"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    assert model.generate(**ids, max_new_tokens=2, do_sample=False).shape[1] > ids["input_ids"].shape[1]
    assert (target / "recipe.yaml").read_text() == "name: demo\n"
    assert "license: apache-2.0" in (target / "README.md").read_text()
    assert "| aligned | merge | certified |" in (target / "README.md").read_text()


def test_weights_are_linked_inside_the_run_and_copied_outside(run_dir: Path, tmp_path: Path) -> None:
    publish(run_dir, to=str(tmp_path / "out"))
    ours = run_dir / "aligned" / "model.safetensors"
    assert os.path.samefile(ours, run_dir / "release.partial" / "model.safetensors")
    assert not os.path.samefile(ours, tmp_path / "out" / "model.safetensors")


def test_publishing_again_changes_nothing_and_other_folders_are_left_alone(run_dir: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    publish(run_dir, to=str(target))
    before = {path: path.stat().st_mtime_ns for path in target.iterdir()}
    publish(run_dir, to=str(target))
    assert {path: path.stat().st_mtime_ns for path in target.iterdir()} == before
    (target / "README.md").write_text("mine now")
    with pytest.raises(UserError, match="holds another model"):
        publish(run_dir, to=str(target))
    assert (target / "README.md").read_text() == "mine now"
    foreign = tmp_path / "thesis"
    foreign.mkdir()
    with pytest.raises(UserError, match="not a published model"):
        publish(run_dir, to=str(foreign))
    assert list(foreign.iterdir()) == []


def test_failed_copy_leaves_nothing(run_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        copy_to(run_dir / "aligned", ["config.json", "gone"], tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]


def drop_stop(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"eos_token_id": 3}')


def drop_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()


def lose_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights.pop("model.norm.weight")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def cut_weights(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def make_adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (drop_stop, "the model would not stop"),
        (drop_template, "lacks chat_template.jinja"),
        (lose_weight, "model.norm.weight"),
        (cut_weights, "where its header promises"),
        (make_adapter, "is an adapter"),
    ],
)
def test_what_a_stranger_could_not_use_is_not_published(run_dir: Path, tmp_path: Path, damage: Any, found: str) -> None:
    damage(run_dir / "aligned")
    with pytest.raises(PosttrainError) as caught:
        publish(run_dir, to=str(tmp_path / "out"))
    assert caught.value.exit_code == 2
    assert found in caught.value.found
    assert not (tmp_path / "out").exists()


def test_report_of_an_evaluation_goes_into_the_card(run_dir: Path) -> None:
    report = {"models": ["aligned"], "suites": [], "gates": [], "notes": ["Nine rows."]}
    (run_dir / "report").mkdir()
    config = Publish.model_validate({"kind": "publish", "model": "@aligned", "report": "@report"})
    given = context(run_dir, report=ModelInput("@report", run_dir / "report"))
    with pytest.raises(UserError, match=r"report\.json"):
        run(config, given)
    (run_dir / "report" / "report.json").write_text(json.dumps(report))
    run(config, given)
    assert "- Nine rows." in (given.folder / "README.md").read_text()


class FakeHub:
    """What huggingface_hub's HfApi is asked to do."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def create_repo(self, repo_id: str, **more: Any) -> None:
        self.calls.append(("create_repo", {"repo_id": repo_id, **more}))

    def upload_folder(self, **more: Any) -> None:
        self.calls.append(("upload_folder", more))


def test_hub_receives_exactly_the_published_files_privately(tmp_path: Path) -> None:
    hub = FakeHub()
    push(tmp_path, ["README.md", "model.safetensors"], "me/model", private=True, api=hub)
    (created, how), (uploaded, what) = hub.calls
    assert (created, how) == ("create_repo", {"repo_id": "me/model", "private": True, "exist_ok": True})
    assert uploaded == "upload_folder"
    assert (what["repo_id"], what["folder_path"]) == ("me/model", tmp_path)
    assert what["allow_patterns"] == ["README.md", "model.safetensors"]


def test_hub_that_refuses_is_a_users_error(tmp_path: Path) -> None:
    from huggingface_hub.errors import LocalTokenNotFoundError

    class Closed(FakeHub):
        def create_repo(self, repo_id: str, **more: Any) -> None:
            raise LocalTokenNotFoundError("no token")

    with pytest.raises(UserError, match="hf auth login"):
        push(tmp_path, [], "me/model", private=True, api=Closed())
