"""`--executor slurm`: a job for each stage that must run, over fakes of Slurm's commands on the PATH."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest
from runs_support import Project
from slurm_support import Cluster

from posttrain.errors import RecipeErrors, StageError, UserError
from posttrain.launch import locked
from posttrain.pipeline.run import Request
from posttrain.slurm.resources import resources
from posttrain.slurm.submit import Submitted, submit_recipe

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    made = Cluster(tmp_path / "cluster")
    monkeypatch.setenv("PATH", str(made.bin), prepend=":")
    monkeypatch.setenv("FAKE_SLURM", str(made.folder))
    for name in ("SLURM_CLUSTERS", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    return made


def submit(project: Project, *overrides: str, **request: object) -> list[Submitted]:
    wanted = Request(**request)  # type: ignore[arg-type]
    return submit_recipe(project.load(*overrides), project.runs, wanted, overrides, lambda _: None)


def test_a_recipe_goes_through_the_cluster_to_its_end(project: Project, cluster: Cluster) -> None:
    done = project.shell("--executor", "slurm", "--set", "seed=7")
    assert done.returncode == 0, done.stderr
    head, *rows = [line.split() for line in done.stdout.splitlines()[:5]]
    assert head == ["stage", "job", "nodes", "x", "processes", "GPUs", "CPUs", "log"]
    assert [row[:7] for row in rows[:2]] == [
        ["sft", "101", "1", "x", "1", "-", "1"],
        ["instruct", "102", "1", "x", "1", "-", "1"],
    ]
    assert "squeue -j 101,102,103,104" in done.stdout
    assert cluster.states() == dict.fromkeys(["sft", "instruct", "dpo", "aligned"], "pending")
    assert cluster.work() == dict.fromkeys(["sft", "instruct", "dpo", "aligned"], "completed")
    assert project.stages_run() == {"sft": 1, "instruct": 1, "dpo": 1, "aligned": 1}  # each in its own job
    log = (project.run_dir / ".slurm/1/dpo.out").read_text()
    assert "sft       skipped" in log
    assert "dpo       done" in log
    there = project.fingerprints()
    assert project.go("seed=7").count("skipped") == 4  # to a run here, it is the same run
    assert project.fingerprints() == there
    again = project.shell("--executor", "slurm", "--set", "seed=7")
    assert again.stdout == "nothing to submit: every stage is finished\n"
    assert len(cluster.jobs()) == 4


def test_jobs_follow_one_another_and_begin_when_all_were_taken(project: Project, cluster: Cluster) -> None:
    jobs = submit(project)
    assert [one.job for one in jobs] == ["101", "102", "103", "104"]
    first, second, third, _ = (cluster.options(one.stage) for one in jobs)
    assert "hold" in first
    assert "dependency" not in first
    assert (second["dependency"], third["dependency"]) == ("afterok:101", "afterok:102")
    assert second["kill-on-invalid-dep"] == "yes"
    assert first["job-name"] == "demo-sft"
    assert first["chdir"] == str(Path.cwd())
    assert cluster.states()["sft"] == "pending"  # released
    assert json.loads((project.run_dir / ".slurm/jobs.json").read_text())["dpo"] == "103"


def test_only_what_lacks_is_submitted(project: Project, cluster: Cluster) -> None:
    project.go(until="instruct")
    assert [one.stage for one in submit(project, until="dpo")] == ["dpo"]
    cluster.work()
    assert [one.stage for one in submit(project)] == ["aligned"]
    assert cluster.work() == {"dpo": "completed", "aligned": "completed"}
    assert submit(project) == []


def test_a_job_that_fails_ends_those_behind_it_and_the_next_submission_goes_on(
    project: Project, cluster: Cluster
) -> None:
    submit(project, until="dpo")
    states = cluster.work(FAKE="instruct=crash")
    assert states == {"sft": "completed", "instruct": "failed", "dpo": "cancelled"}
    assert "unexpected RuntimeError: the fake broke" in (project.run_dir / ".slurm/1/instruct.out").read_text()
    assert [one.stage for one in submit(project, until="instruct")] == ["instruct"]
    assert (project.run_dir / ".slurm/2/instruct.sbatch").is_file()
    assert cluster.work()["instruct"] == "completed"


def test_the_signal_before_the_time_limit_saves_and_a_requeued_job_goes_on(project: Project, cluster: Cluster) -> None:
    submit(project, until="sft")
    log = project.run_dir / ".slurm/1/sft.out"

    def stop(process: subprocess.Popen[bytes]) -> None:
        while not list(project.run_dir.glob("sft.partial/checkpoints/step-*")):
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)  # B:TERM: to the script's process alone

    assert cluster.options("sft")["signal"] == "B:TERM@120"
    assert cluster.work(stop, FAKE_STEP="0.1") == {"sft": "failed"}
    assert "goes on from its checkpoint when the job is requeued" in log.read_text()
    assert cluster.start("101", lambda _: None) == 0  # the very same script
    assert "resumed at step" in log.read_text()
    assert project.fingerprints().keys() == {"sft"}


def test_the_recipe_is_the_one_of_the_submission(project: Project, cluster: Cluster) -> None:
    before = {stage.stage: stage.fingerprint for stage in Request().plan(project.load(), project.run_dir).stages}
    submit(project, until="instruct")
    project.recipe.write_text("name: [")
    cluster.work()
    assert project.fingerprints() == {name: before[name] for name in ("sft", "instruct")}  # its relative paths too


def test_redo_moves_the_old_output_aside_before_anything_runs(finished: Project, cluster: Cluster) -> None:
    assert [one.stage for one in submit(finished, redo=("dpo",))] == ["dpo", "aligned"]
    assert sorted(path.name for path in (finished.run_dir / ".aside").iterdir()) == ["aligned-1", "dpo-1"]
    assert "--redo" not in (finished.run_dir / ".slurm/1/dpo.sbatch").read_text()  # or a requeued job would do it again
    assert cluster.work() == {"dpo": "completed", "aligned": "completed"}


def test_jobs_in_the_queue_refuse_another_submission(project: Project, cluster: Cluster) -> None:
    submit(project, until="instruct")
    tree = project.tree()
    message = r"in the queue: sft \(101\), instruct \(102\)\n.*scancel 102 101"
    with pytest.raises(UserError, match=message):
        submit(project)
    with locked(project.run_dir), pytest.raises(UserError, match=message):  # as while the first of them runs
        submit(project)
    assert project.tree() == tree
    subprocess.run(["scancel", "102", "101"], check=True)
    assert len(submit(project)) == 4


def test_jobs_that_the_cluster_forgot_are_gone(project: Project, cluster: Cluster) -> None:
    submit(project, until="sft")
    (cluster.folder / "jobs.json").unlink()
    assert [one.stage for one in submit(project, until="sft")] == ["sft"]


def test_a_cluster_that_does_not_answer_is_not_taken_for_an_empty_queue(
    project: Project, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit(project)
    monkeypatch.setenv("FAKE_SLURM_DOWN", "1")
    with pytest.raises(UserError, match="squeue: Unable to contact slurm controller"):
        submit(project)


def test_jobs_that_cannot_be_cancelled_are_named(
    project: Project, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    (cluster.bin / "scancel").write_text("#!/bin/sh\necho 'scancel: error: Kill job error: down' >&2\nexit 1\n")
    monkeypatch.setenv("FAKE_SLURM_REFUSE", "-dpo")
    with pytest.raises(UserError, match=r"stage dpo: .*\n.*Kill job error: down\): scancel 101 102"):
        submit(project)
    assert json.loads((project.run_dir / ".slurm/jobs.json").read_text()) == {"sft": "101", "instruct": "102"}


@pytest.mark.parametrize("refused", ["sft", "dpo"])
def test_a_refused_job_leaves_nothing(
    project: Project, cluster: Cluster, monkeypatch: pytest.MonkeyPatch, refused: str
) -> None:
    tree = project.tree()
    monkeypatch.setenv("FAKE_SLURM_REFUSE", f"-{refused}")
    done = project.shell("--executor", "slurm")
    assert done.returncode == 2
    assert f"stage {refused}: sbatch: invalid partition specified: moon; Batch job submission failed" in done.stderr
    assert "Traceback" not in done.stderr
    assert set(cluster.states().values()) <= {"cancelled"}
    assert set(project.tree()) - set(tree) <= {"runs", "runs/.cache"}
    monkeypatch.delenv("FAKE_SLURM_REFUSE")
    assert len(submit(project)) == 4


def test_redo_of_a_refused_job_moves_nothing(
    finished: Project, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = finished.tree()
    monkeypatch.setenv("FAKE_SLURM_REFUSE", "-aligned")
    with pytest.raises(UserError, match="stage aligned: sbatch"):
        submit(finished, redo=("dpo",))
    assert finished.tree() == tree


def test_a_first_job_that_cannot_be_released_cancels_all(
    project: Project, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_SLURM_NO_RELEASE", "1")
    with pytest.raises(UserError, match="scontrol release 101: Access/permission denied"):
        submit(project)
    assert set(cluster.states().values()) == {"cancelled"}


def test_without_slurm_it_says_what_is_missing(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = project.tree()
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match=r"sbatch, squeue, scontrol, scancel: not on the PATH\n.*login node"):
        submit(project)
    assert project.tree() == tree


def test_what_a_run_refuses_is_refused_before_anything_is_submitted(project: Project, cluster: Cluster) -> None:
    (project.folder / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "b"}\n')
    with pytest.raises(UserError, match=r"pairs\.jsonl"):
        submit(project)
    assert cluster.jobs() == {}
    assert not project.runs.exists()


def test_a_gate_that_did_not_hold_stops_a_submission_too(project: Project, cluster: Cluster) -> None:
    assert project.shell("--until", "sft", FAKE="sft=gate").returncode == 1
    with pytest.raises(StageError, match="stage sft: did not hold"):
        submit(project)
    assert cluster.jobs() == {}


def test_what_jobs_read_from_the_hub_must_be_on_disk(
    project: Project, cluster: Cluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(RecipeErrors) as refused:
        submit(project, f"stages.sft.model=owner/base@{COMMIT}", f"stages.dpo.model=owner/other@{COMMIT}")
    assert [problem.where for problem in refused.value.problems] == [f"owner/base@{COMMIT}", f"owner/other@{COMMIT}"]
    assert "hf download owner/base --revision" in str(refused.value)
    assert not project.runs.exists()
    snapshot = tmp_path / "hub/models--owner--base/snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    for file in (project.folder / "base").iterdir():
        (snapshot / file.name).write_bytes(file.read_bytes())
    assert len(submit(project, f"stages.sft.model=owner/base@{COMMIT}")) == 4
    assert "HF_HUB_OFFLINE:-1" in (project.run_dir / ".slurm/1/sft.sbatch").read_text()


def test_a_model_that_is_half_on_disk_is_refused(
    project: Project, cluster: Cluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    snapshot = tmp_path / "hub/models--owner--base/snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").write_bytes((project.folder / "base/model.safetensors").read_bytes())
    with pytest.raises(UserError, match=r"config\.json"):
        submit(project, f"stages.sft.model=owner/base@{COMMIT}")


def test_rows_of_the_hub_must_be_on_disk(project: Project, cluster: Cluster, tmp_path: Path) -> None:
    source = "stages.{}.data.sources=[{{path: owner/rows, revision: " + COMMIT + "}}]"
    sets = [word for stage in ("sft", "dpo") for word in ("--set", source.format(stage))]
    offline = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    done = project.shell("--executor", "slurm", *sets, **offline)
    assert done.returncode == 2
    assert done.stderr.count(f"error: owner/rows@{COMMIT}: ") == 1  # wanted twice, said once
    assert cluster.jobs() == {}
    assert not project.run_dir.exists()


def test_a_push_from_an_offline_job_is_refused(
    project: Project, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    push = "stages.release={kind: publish, model: '@aligned', hub: owner/name}"
    with pytest.raises(UserError, match=r"stages\.release\.hub: jobs run offline and cannot push"):
        submit(project, push)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert len(submit(project, push)) == 5


def test_a_submission_from_within_a_job_does_not_hand_its_sizes_on(
    project: Project, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SLURM_NTASKS", "SLURM_MEM_PER_NODE", "SQUEUE_STATES", "SLURM_CONF", "SLURM_CLUSTERS"):
        monkeypatch.setenv(name, "1")
    assert submit(project)[0].job == "101"  # the cluster's name after it is not part of it
    assert cluster.jobs()["101"]["inherited"] == ["SLURM_CLUSTERS", "SLURM_CONF"]


BASE = {"num_processes": 1, "num_machines": 1, "device": "auto", "threads": None, "dataset_num_proc": None, "slurm": {}}


@pytest.mark.parametrize(
    ("kind", "runtime", "options"),
    [
        ("sft", {}, []),
        ("sft", {"device": "cuda"}, ["--gpus-per-node=1"]),
        ("sft", {"device": "cuda", "num_processes": 8, "threads": 4}, ["--gpus-per-node=8", "--cpus-per-task=32"]),
        ("sft", {"device": "cuda", "num_processes": 8, "num_machines": 2}, ["--gpus-per-node=4"]),
        ("sft", {"device": "cpu", "threads": 2, "dataset_num_proc": 6}, ["--cpus-per-task=6"]),
        ("merge", {"device": "cuda"}, ["--gpus-per-node=1"]),
        ("publish", {"device": "cuda"}, []),
        ("sft", {"device": "cuda", "slurm": {"gres": "gpu:h100:4"}}, ["--gres=gpu:h100:4"]),
        ("sft", {"threads": 2, "slurm": {"cpus-per-task": 20}}, ["--cpus-per-task=20"]),
        ("sft", {"slurm": {"qos": "acc", "time": "24:00:00", "mem": 0, "requeue": True}},
         ["--qos=acc", "--time=24:00:00", "--mem=0", "--requeue"]),
    ],
)  # fmt: skip
def test_resources(kind: str, runtime: dict[str, object], options: list[str]) -> None:
    asked = resources(kind, {**BASE, **runtime})
    nodes = int(str(runtime.get("num_machines", 1)))
    assert list(asked.options) == [f"--nodes={nodes}", "--ntasks-per-node=1", "--signal=B:TERM@120", *options]
    assert asked.nodes * asked.processes == runtime.get("num_processes", 1)


def test_a_stage_may_have_a_job_of_its_own_kind(project: Project, cluster: Cluster) -> None:
    submit(
        project,
        "runtime.slurm={partition: gpu, time: 24:00:00, account: bsc 01}",
        "stages.instruct.runtime={slurm: {partition: cpu}}",
    )
    assert {key: cluster.options("sft")[key] for key in ("partition", "time", "account")} == {
        "partition": "gpu",
        "time": "24:00:00",
        "account": "bsc 01",
    }
    assert "time" not in cluster.options("instruct")
    lines = (project.run_dir / ".slurm/1/sft.sbatch").read_text().splitlines()
    assert "#SBATCH '--account=bsc 01'" in lines
    assert "#SBATCH --cpus-per-task=1" in lines


@pytest.mark.contract(number=3)
def test_slurm_options_leave_fingerprints_alone(project: Project) -> None:
    one, other = (
        [stage.fingerprint for stage in Request().plan(project.load(*given), project.run_dir).stages]
        for given in ((), ("runtime.slurm.partition=gpu", "stages.dpo.runtime.slurm.mem=64G"))
    )
    assert one == other


@pytest.mark.parametrize(
    ("key", "value", "found"),
    [
        ("nodes", "2", "cannot be set here\n  -> set runtime.num_machines"),
        ("ntasks", "2", "cannot be set here\n  -> set runtime.num_processes"),
        ("signal", "USR1", "cannot be set here"),
        ("test-only", "true", "cannot be set here"),
        ("-p", "gpu", "is no long option of sbatch\n  -> write p"),
        ("cpus_per_task", "4", "is no long option of sbatch\n  -> write cpus-per-task"),
        ("requeue", "false", "false is no value of an option"),
        ("time", "1.5", "the number 1.5, not"),
        ("comment", '"a\\nb"', "is not one line of text"),
    ],
)
def test_options_that_a_recipe_cannot_give(project: Project, key: str, value: str, found: str) -> None:
    with pytest.raises(RecipeErrors) as refused:
        project.load(f"runtime.slurm.{key}={value}")
    assert str(refused.value).startswith(f"--set runtime.slurm.{key}")
    assert found in str(refused.value)
    with pytest.raises(RecipeErrors, match=r"stages\.sft\.runtime\.slurm"):
        project.load(f"stages.sft.runtime.slurm.{key}={value}")


def test_the_ready_made_job_runs_a_recipe(tmp_path: Path) -> None:
    """What bash does with it; `scripts/prove_slurm.sh` gives it to a real `sbatch`."""
    script = Path(__file__).resolve().parent.parent / "scripts/cluster/slurm.sbatch"
    program = tmp_path / "posttrain"
    program.write_text('#!/bin/sh\necho "$$ $SRUN_CPUS_PER_TASK $HF_HUB_OFFLINE $*"\n')
    program.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_CPUS_PER_TASK": "80", "POSTTRAIN_RUNS": "/big disk"}
    words = ["bash", script, "my.yaml", "--until", "sft"]
    started = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment)
    said, _ = started.communicate(timeout=10)
    # in the shell's place, by its process id: signals reach it
    assert said == f"{started.pid} 80 1 run my.yaml --until sft --runs-dir /big disk\n"
    refused = subprocess.run(["bash", script], capture_output=True, text=True, env=environment)
    assert refused.returncode != 0
    assert "which recipe?" in refused.stderr
