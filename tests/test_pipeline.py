"""Plans: rerun means skip, change means stop; identity is apart from execution; artifacts are whole."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from runs_support import Project

from posttrain.artifact import Artifact
from posttrain.errors import CheckpointError, StageError, UserError
from posttrain.launch import locked
from posttrain.pipeline.inputs import Pins
from posttrain.pipeline.plan import Plan, plan, show

BETA = "stages.dpo.trainer.beta=0.2"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def planned(project: Project, *overrides: str, **options: object) -> Plan:
    return plan(project.load(*overrides), project.run_dir, **options)  # type: ignore[arg-type]


def actions(project: Project, *overrides: str, **options: object) -> dict[str, str]:
    return {stage.stage: stage.action for stage in planned(project, *overrides, **options).stages}


def prints(project: Project, *overrides: str) -> dict[str, str]:
    return {stage.stage: stage.fingerprint for stage in planned(project, *overrides).stages}


@pytest.mark.contract(number=2)
def test_a_second_run_skips_everything(project: Project) -> None:
    assert set(actions(project).values()) == {"run"}
    project.go()
    assert project.stages_run() == {"sft": 1, "instruct": 1, "dpo": 1, "aligned": 1}
    said = project.go()
    assert project.stages_run() == {"sft": 1, "instruct": 1, "dpo": 1, "aligned": 1}
    assert said.count("skipped: value") == 4
    assert project.fingerprints() == prints(project)


@pytest.mark.contract(number=2)
def test_a_change_is_refused_with_its_one_field_and_redo_runs_what_depends_on_it(finished: Project) -> None:
    before = {stage: finished.value(stage) for stage in finished.stages_run()}
    tree = finished.tree()
    with pytest.raises(UserError) as refused:
        finished.go(BETA)
    assert refused.value.found.splitlines()[1:] == [
        "  stages.dpo.trainer.beta: 0.1 -> 0.2",
        "  aligned: depends on dpo",
    ]
    assert "--redo dpo" in refused.value.todo
    assert finished.tree() == tree
    finished.go(BETA, redo=("dpo",))
    assert {stage for stage in before if finished.value(stage) != before[stage]} == {"dpo", "aligned"}
    assert sorted(path.name for path in (finished.run_dir / ".aside").iterdir()) == ["aligned-1", "dpo-1"]
    assert set(actions(finished, BETA).values()) == {"skip"}


@pytest.mark.contract(number=2)
def test_a_change_upstream_lists_every_stage_below(finished: Project) -> None:
    refused = {stage.stage: stage for stage in planned(finished, "stages.sft.method.lora.r=8").refused}
    assert refused["sft"].differences == (("stages.sft.method.lora.r", 4, 8),)
    assert {name: stage.depends_on for name, stage in refused.items()} == {
        "sft": (),
        "instruct": ("sft",),
        "dpo": ("sft",),
        "aligned": ("sft",),
    }
    both = {stage.stage: stage for stage in planned(finished, "stages.sft.method.lora.r=8", BETA).refused}
    assert both["dpo"].differences == (("stages.dpo.trainer.beta", 0.1, 0.2),)
    assert both["aligned"].depends_on == ("sft", "dpo")


def test_recipe_wide_fields_are_named_as_in_the_recipe(finished: Project) -> None:
    refused = planned(finished, "precision=bf16").refused
    assert [stage.differences for stage in refused] == [(("precision", "fp32", "bf16"),)] * 4


@pytest.mark.contract(number=3)
@pytest.mark.parametrize(
    "override",
    [
        "runtime.device=auto",
        "runtime.threads=2",
        "runtime.micro_batch_size=4",
        "runtime.micro_batch_tokens=auto",
        "runtime.share_prefix=off",
        "stages.dpo.trainer.learning_rate=5e-6",  # its default: the parent is an adapter, so it trains one
        "stages.sft.runtime.num_processes=2",
        "stages.sft.trainer.logging_steps=7",
        "stages.sft.trainer.save_steps=3",
        "stages.sft.trainer.gradient_checkpointing=true",
        "stages.sft.data.sources[0].weight=1.0",
        "stages.sft.trainer.num_train_epochs=3",
        "stages.sft.data.history=refuse",
        "stages.dpo.data.system=keep",
    ],
)
def test_execution_and_spelled_out_defaults_leave_fingerprints_alone(project: Project, override: str) -> None:
    assert prints(project, override) == prints(project)


@pytest.mark.contract(number=3)
@pytest.mark.parametrize(
    ("override", "changed"),
    [
        ("seed=7", {"sft", "instruct", "dpo", "aligned"}),
        ("stages.dpo.seed=7", {"dpo", "aligned"}),
        ("stages.sft.trainer.learning_rate=0.1", {"sft", "instruct", "dpo", "aligned"}),
        ("stages.dpo.data.sources[0].weight=2.0", {"dpo", "aligned"}),
        ("stages.dpo.data.max_dropped=0.5", {"dpo", "aligned"}),
        ("stages.sft.data.history=split", {"sft", "instruct", "dpo", "aligned"}),
        ("stages.dpo.data.system=fold", {"dpo", "aligned"}),
        ("stages.instruct.certificate.mean_kl=0.1", {"instruct"}),
        ("stages.aligned.dtype=float16", {"aligned"}),
    ],
)
def test_what_changes_a_result_changes_fingerprints_from_there_on(
    project: Project, override: str, changed: set[str]
) -> None:
    old, new = prints(project), prints(project, override)
    assert {stage for stage in old if old[stage] != new[stage]} == changed


@pytest.mark.contract(number=3)
def test_paths_and_names_leave_fingerprints_alone(project: Project) -> None:
    old = prints(project)
    (project.folder / "data").mkdir()
    for name, to in (("base", "data/model"), ("chat.jsonl", "data/x.jsonl"), ("chat.jinja", "data/t.jinja")):
        shutil.move(project.folder / name, project.folder / to)
    text = project.recipe.read_text()
    for name, to in (
        ("./base", "./data/model"),
        ("./chat.jsonl", "./data/x.jsonl"),
        ("./chat.jinja", "./data/t.jinja"),
    ):
        text = text.replace(name, to)
    project.recipe.write_text(text.replace("name: demo", "name: other").replace("aligned:", "final:"))
    assert list(prints(project).values()) == list(old.values())


@pytest.mark.parametrize(
    ("path", "place"),
    [
        ("base/model.safetensors", "stages.sft.model.content"),
        ("base/config.json", "stages.sft.model.content"),
        ("chat.jsonl", "stages.sft.data.sources[0].content"),
        ("chat.jinja", "stages.sft.chat_template"),
    ],
)
def test_bytes_of_inputs_are_identity(finished: Project, path: str, place: str) -> None:
    (finished.folder / path).write_text((finished.folder / path).read_text() + " \n")
    assert [difference[0] for difference in planned(finished).refused[0].differences] == [place]
    with pytest.raises(UserError, match="--redo sft") as error:
        finished.go()
    assert "…" in str(error.value)


def test_a_model_given_another_way_is_shown_as_the_recipe_spells_it(finished: Project) -> None:
    shutil.copytree(finished.folder / "base", finished.folder / "base2")
    (finished.folder / "base2/model.safetensors").write_text("others")
    refused = planned(finished, "stages.sft.model=./base2").refused
    assert refused[0].differences == (("stages.sft.model", "./base", "./base2"),)


def test_a_finished_model_of_another_run_is_known_by_its_own_identity(finished: Project) -> None:
    shutil.copytree(finished.run_dir / "sft", finished.folder / "adapter")
    identity = planned(finished, "stages.dpo.model=./adapter").stages[2].identity["model"]
    assert identity["artifact"] == finished.fingerprints()["sft"]


def test_hub_ids_are_pinned_once(tmp_path: Path, project: Project) -> None:
    pins = {"model:owner/base": COMMIT, "dataset:owner/rows": COMMIT[::-1]}
    project.run_dir.mkdir(parents=True)
    (project.run_dir / "revisions.json").write_text(json.dumps(pins))
    hub = ("stages.sft.model=owner/base", "stages.sft.data.sources[0].path=owner/rows")
    job = planned(project, *hub).stages[0].job
    assert job.identity["model"] == {"hub": "owner/base", "commit": COMMIT}
    assert job.inputs["model"] == {"ref": "owner/base", "folder": None, "revision": COMMIT}
    assert job.spelled_inputs() == {"model": f"owner/base@{COMMIT}"}
    assert job.config["data"]["sources"][0]["revision"] == COMMIT[::-1]
    assert prints(project, f"stages.sft.model=owner/base@{COMMIT}", hub[1]) == prints(project, *hub)
    fresh = Pins(tmp_path / "pins.json")
    fresh.save()
    assert not fresh.path.exists()


@pytest.mark.parametrize("override", ["stages.sft.model=./nowhere", "stages.dpo.data.sources[0].path=./no.jsonl"])
def test_missing_inputs_are_found_before_anything_is_written(project: Project, override: str) -> None:
    tree = project.tree()
    with pytest.raises(UserError) as error:
        project.go(override)
    assert error.value.where == f"--set {override.split('=')[0]}"
    assert project.tree() == tree


def test_a_secret_is_never_recorded(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "hf_secret")
    with pytest.raises(UserError, match="would be recorded") as error:
        project.go("stages.sft.data.sources[0].text_format=${MY_TOKEN}")
    assert "hf_secret" not in str(error.value)
    project.go("description=${MY_TOKEN}", until="sft")
    written = [path for path in project.run_dir.rglob("*") if path.is_file()]
    assert not [path for path in written if b"hf_secret" in path.read_bytes()]


def test_until_stops_after_a_stage_and_unknown_stages_are_named(project: Project) -> None:
    project.go(until="instruct")
    assert set(project.stages_run()) == {"sft", "instruct"}
    with pytest.raises(UserError, match="did you mean dpo"):
        project.go(redo=("dop",))


def test_redo_moves_outputs_beyond_until_aside_too(finished: Project) -> None:
    finished.go(redo=("sft",), until="sft")
    assert not (finished.run_dir / "aligned").exists()
    assert len(list((finished.run_dir / ".aside").iterdir())) == 4


def test_a_finished_file_that_changed_is_an_error(finished: Project) -> None:
    path = finished.run_dir / "sft/model.safetensors"
    text = path.read_text()
    path.write_text(text[::-1])
    assert actions(finished, until="sft") == {"sft": "skip"}
    with pytest.raises(CheckpointError, match="content changed"):
        planned(finished, verify=True)
    path.write_text(text[1:])
    with pytest.raises(CheckpointError, match="6399 bytes, 6400"):
        planned(finished)
    path.unlink()
    with pytest.raises(CheckpointError, match="missing"):
        planned(finished)
    assert actions(finished, redo=("sft",))["sft"] == "redo"


def test_a_folder_that_no_stage_left_is_not_touched(project: Project) -> None:
    (project.run_dir / "sft").mkdir(parents=True)
    with pytest.raises(UserError, match="in the way"):
        project.go()


def test_a_complete_partial_folder_is_only_renamed(finished: Project) -> None:
    (finished.run_dir / "sft").rename(finished.run_dir / "sft.partial")
    assert actions(finished)["sft"] == "publish"
    finished.go()
    assert finished.stages_run()["sft"] == 1


def half_done(project: Project, stage: str = "dpo") -> Path:
    """Leaves a stage as a kill after its checkpoint at step 4 would."""
    (project.run_dir / stage).rename(project.run_dir / f"{stage}.partial")
    (project.run_dir / f"{stage}.partial/stage.json").unlink()
    shutil.move(project.run_dir / "aligned", project.folder / "expected")
    return project.run_dir / f"{stage}.partial"


def test_an_unfinished_stage_resumes(finished: Project) -> None:
    half_done(finished)
    assert planned(finished).stages[2].reason == "resumes from its last checkpoint"
    assert "resumed at step 4" in finished.go()
    expected = (finished.folder / "expected/model.safetensors").read_text()
    assert finished.value("aligned") == expected[:64]


def test_checkpoints_of_other_settings_are_refused_and_redo_keeps_them(finished: Project) -> None:
    partial = half_done(finished)
    with pytest.raises(UserError, match=r"trainer\.beta: 0\.1 -> 0\.2"):
        finished.go(BETA)
    assert partial.exists()
    finished.go(BETA, redo=("dpo",))
    assert (finished.run_dir / ".aside/dpo.partial-1/checkpoints/step-4").exists()


def test_a_partial_folder_without_checkpoints_gives_way(finished: Project) -> None:
    partial = half_done(finished)
    shutil.rmtree(partial / "checkpoints")
    assert "moved dpo.partial to .aside/dpo.partial-1" in finished.go(BETA)


def test_checkpoints_of_other_versions_are_resumed_only_when_told(finished: Project) -> None:
    partial = half_done(finished)
    job = json.loads((partial / "job.json").read_text())
    job["versions"]["torch"] = "1.0"
    (partial / "job.json").write_text(json.dumps(job))
    with pytest.raises(UserError, match=r"torch 1\.0 -> "):
        finished.go()
    assert "resumed at step 4" in finished.go(other_versions=True)


def test_a_gate_that_did_not_hold_stops_this_run_and_the_next(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE", "instruct=gate")
    for _ in range(2):
        with pytest.raises(StageError, match=r"accuracy 0\.1 < 0\.5") as error:
            project.go()
        assert error.value.exit_code == 1
    assert project.stages_run() == {"sft": 1, "instruct": 1}
    artifact = Artifact.read(project.run_dir / "instruct")
    assert artifact is not None
    assert artifact.record.summary["failed"] == ["accuracy 0.1 < 0.5"]


def test_tables_are_shown_at_the_end_skipped_or_not(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE", "sft=table")
    assert project.go().endswith("\ntable of sft\n")
    assert project.go().endswith("\ntable of sft\n")


@pytest.mark.contract(number=12)
def test_a_mistake_found_by_the_first_stage_leaves_nothing(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE", "sft=user")
    tree = project.tree()
    with pytest.raises(UserError, match="no answer") as error:
        project.go()
    assert (error.value.where, error.value.exit_code) == ("rows.jsonl:3", 2)
    assert project.tree() == tree
    monkeypatch.setenv("FAKE", "dpo=user")
    with pytest.raises(UserError, match="no answer"):
        project.go()
    assert sorted(path.name for path in project.run_dir.iterdir() if path.is_dir()) == ["instruct", "sft"]


def test_a_locked_folder_is_refused_by_name(project: Project) -> None:
    project.run_dir.mkdir(parents=True)
    with locked(project.run_dir), pytest.raises(UserError, match="another run is using") as error:
        project.go()
    assert error.value.where == str(project.run_dir)
    project.go(until="sft")


def test_a_publication_elsewhere_is_pointed_out(project: Project) -> None:
    extra = '  release: {kind: publish, model: "@aligned", to: ./one}\n'
    project.recipe.write_text(project.recipe.read_text() + extra)
    project.go()
    assert "--redo release publishes again" in project.go("stages.release.to=./two")
    assert planned(project, "stages.release.license=mit").refused[0].stage == "release"


def test_evaluation_identity_holds_columns_suites_and_gates(project: Project) -> None:
    extra = """  report:
    kind: evaluate
    models: {base: ./base, aligned: "@aligned"}
    chat_template: ./chat.jinja
    suites: [{name: pairs, kind: preference, data: [{path: ./pairs.jsonl}]}]
    require: [{suite: pairs, metric: accuracy, model: aligned, min: 0.5}]
"""
    project.recipe.write_text(project.recipe.read_text() + extra)
    project.go()
    refused = planned(project, "stages.report.require[0].min=0.6").refused[0]
    assert refused.differences == (("stages.report.require[0].min", 0.5, 0.6),)
    below = {stage.stage: stage for stage in planned(project, BETA).refused}["report"]
    assert (below.differences, below.depends_on) == ((), ("dpo",))
    assert set(planned(project).stages[-1].job.inputs) == {"models.base", "models.aligned"}


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner)))
def test_any_value_can_be_shown_in_one_short_line(value: object) -> None:
    assert len(show(value)) <= 120
    assert "\n" not in show([value])
