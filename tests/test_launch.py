"""Processes: whatever is killed, and whenever, the same command gives the same artifacts."""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from runs_support import Project

from posttrain.errors import Interrupted, StageError, UserError
from posttrain.launch import Interruption, attend, forkable, locked, start, tail
from posttrain.stage_process import command, stage_environment

STAGES = ("sft", "instruct", "dpo", "aligned")


def wait_for(what: Callable[[], object], seconds: float = 30.0) -> None:
    """Waits until something holds; fails when it does not in time."""
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def is_free(run_dir: Path) -> bool:
    """Whether nobody holds the lock of a run folder."""
    with (run_dir / ".lock").open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def stage_processes(project: Project) -> list[int]:
    """Ids of the processes of a project's stages, and of the server that forks them."""
    starts = [f"-m\0posttrain.stages\0{serve}{project.run_dir}".encode() for serve in ("", "--serve\0")]
    found = Path("/proc").glob("[0-9]*/cmdline")
    return [int(path.parent.name) for path in found if any(start in _bytes(path) for start in starts)]


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


@pytest.fixture
def slow(project: Project, monkeypatch: pytest.MonkeyPatch) -> Iterator[Project]:
    """A project whose stages take about a second; what a test leaves running is killed."""
    monkeypatch.setenv("FAKE_STEP", "0.15")
    yield project
    for process in stage_processes(project):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process, signal.SIGKILL)


@pytest.fixture(scope="module")
def expected(finished_template: Path) -> dict[str, str]:
    """What every stage of an uninterrupted run computes."""
    return {stage: (finished_template / f"runs/demo/{stage}/model.safetensors").read_text() for stage in STAGES}


@pytest.fixture(autouse=True)
def _plain_fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE", "")


def faked(project: Project, behaviour: str) -> Project:
    """Sets the behaviour of the fakes until the test ends."""
    os.environ["FAKE"] = behaviour
    return project


def outcome(project: Project) -> dict[str, str]:
    return {stage: (project.run_dir / stage / "model.safetensors").read_text() for stage in STAGES}


def checkpoint(project: Project, stage: str, step: int) -> Path:
    return project.run_dir / f"{stage}.partial/checkpoints/step-{step}"


@pytest.mark.contract(number=1)
@pytest.mark.parametrize("victim", ["stage", "parent", "group"])
def test_kill_9_at_any_moment_loses_no_more_than_the_work_since_a_checkpoint(
    slow: Project, expected: dict[str, str], victim: str
) -> None:
    rng = random.Random(f"posttrain {victim}")
    for _ in range(2):
        run = slow.start()
        time.sleep(rng.uniform(0.3, 3.0))
        stages = stage_processes(slow)
        if victim in ("parent", "group"):
            run.kill()
        if victim in ("stage", "group"):
            for process in stages if victim == "group" else rng.sample(stages, min(1, len(stages))):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
        run.communicate(timeout=60)
        for stage in STAGES:  # under its final name, a folder is complete
            if (slow.run_dir / stage).exists():
                assert (slow.run_dir / stage / "model.safetensors").read_text() == expected[stage]
        wait_for(lambda: not slow.run_dir.exists() or not stage_processes(slow))
    done = slow.shell(FAKE_STEP="0")
    assert done.returncode == 0, done.stderr
    assert outcome(slow) == expected


@pytest.mark.contract(number=1)
@pytest.mark.parametrize("point", ["before_record", "after_record"])
def test_kill_9_between_record_and_rename(project: Project, expected: dict[str, str], point: str) -> None:
    killed = project.shell(POSTTRAIN_KILL_AT=f"dpo:{point}")
    assert killed.returncode == 1
    assert "SIGKILL" in killed.stderr
    assert not (project.run_dir / "dpo").exists()
    assert (project.run_dir / "dpo.partial/stage.json").exists() == (point == "after_record")
    assert project.shell().returncode == 0
    assert outcome(project) == expected
    assert project.stages_run()["dpo"] == (1 if point == "after_record" else 2)


def test_when_the_parent_dies_the_stage_saves_a_checkpoint_and_frees_the_lock(slow: Project) -> None:
    run = slow.start(FAKE_STEP="0.5")
    wait_for(checkpoint(slow, "sft", 2).exists)
    run.kill()
    run.communicate(timeout=60)
    with pytest.raises(UserError, match=f"started by process {run.pid}"):  # its stage still holds the lock
        slow.go()
    wait_for(lambda: is_free(slow.run_dir))
    wait_for(lambda: not stage_processes(slow))
    assert "the parent process is gone" in (slow.run_dir / "sft.partial/log.txt").read_text()
    assert checkpoint(slow, "sft", 3).exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_it_saves_a_checkpoint_and_says_how_to_go_on(
    slow: Project, expected: dict[str, str], number: signal.Signals
) -> None:
    run = slow.start("--set", "stages.dpo.trainer.beta=0.1")
    wait_for(checkpoint(slow, "sft", 2).exists)
    run.send_signal(number)
    said, _ = run.communicate(timeout=60)
    assert run.returncode == 130
    assert "stopping: saving a checkpoint" in said
    assert f"go on with: posttrain run {slow.recipe}" in said
    assert "--set stages.dpo.trainer.beta=0.1" in said
    assert "Traceback" not in said
    assert is_free(slow.run_dir)
    assert "resumed at step" in slow.shell(FAKE_STEP="0").stdout
    assert outcome(slow) == expected


def test_a_second_request_kills_a_stage_that_does_not_listen(slow: Project) -> None:
    run = slow.start(FAKE="sft=stubborn")
    wait_for(lambda: "fake sft" in tail(slow.run_dir / "sft.partial/log.txt"))
    time.sleep(0.3)
    run.send_signal(signal.SIGTERM)
    time.sleep(0.6)
    assert run.poll() is None
    run.send_signal(signal.SIGTERM)
    run.communicate(timeout=20)
    assert run.returncode == 130
    wait_for(lambda: not stage_processes(slow))


def test_a_stage_that_never_looks_ends_at_once(slow: Project) -> None:
    run = slow.start(FAKE="sft=deaf", FAKE_STEP="20")
    wait_for(lambda: "fake sft" in tail(slow.run_dir / "sft.partial/log.txt"))
    began = time.monotonic()
    run.send_signal(signal.SIGTERM)
    run.communicate(timeout=60)
    assert run.returncode == 130
    assert time.monotonic() - began < 10


def test_a_crash_keeps_its_log_and_leaves_the_rest_alone(project: Project) -> None:
    crashed = project.shell(FAKE="dpo=crash")
    assert crashed.returncode == 1
    assert "error: stage dpo: unexpected RuntimeError: the fake broke" in crashed.stderr
    assert f"the whole log is in {project.run_dir / 'dpo.partial/log.txt'}" in crashed.stderr
    assert "Traceback" not in crashed.stderr
    assert "Traceback" in (project.run_dir / "dpo.partial/log.txt").read_text()
    assert project.shell().returncode == 0
    assert project.stages_run() == {"sft": 1, "instruct": 1, "dpo": 2, "aligned": 1}  # one log over both tries


def test_a_death_without_a_word_shows_the_end_of_the_log(project: Project) -> None:
    with pytest.raises(StageError, match="killed by SIGKILL") as error:
        faked(project, "sft=die").go()
    assert "  | fake sft: die" in error.value.found


def test_children_of_a_stage_do_not_outlive_it(project: Project) -> None:
    faked(project, "sft=child").go(until="sft")
    assert is_free(project.run_dir)
    left = [path for path in Path("/proc").glob("[0-9]*/cmdline") if str(project.run_dir).encode() in _bytes(path)]
    assert not left


def test_a_second_run_in_the_same_folder_is_refused(slow: Project) -> None:
    run = slow.start()
    wait_for(lambda: stage_processes(slow))
    second = slow.shell()
    assert second.returncode == 2
    assert f"error: {slow.run_dir}: another run is using this folder" in second.stderr
    run.kill()
    run.communicate(timeout=60)


def test_a_stage_started_by_hand_needs_no_parent(project: Project, expected: dict[str, str]) -> None:
    with pytest.raises(StageError):
        faked(project, "sft=crash").go()
    job = project.run_dir / "sft.partial/job.json"
    done = subprocess.run([sys.executable, "-m", "posttrain.stages", str(job)], env={**os.environ, "FAKE": ""})
    assert done.returncode == 0
    assert (project.run_dir / "sft/model.safetensors").read_text() == expected["sft"]


def test_an_unreadable_job_is_our_error(tmp_path: Path) -> None:
    job = tmp_path / "sft.partial/job.json"
    job.parent.mkdir()
    job.write_text("{")
    with locked(tmp_path) as lock, pytest.raises(StageError, match="not a job file"):
        attend("sft", start(job, "sft", {}, lock), Interruption(), lambda event: None)


def test_a_stage_that_ends_while_it_is_asked_to_stop_keeps_its_output(slow: Project) -> None:
    run = slow.start(FAKE="sft=late")
    wait_for(checkpoint(slow, "sft", 2).exists)
    run.send_signal(signal.SIGTERM)
    said, _ = run.communicate(timeout=60)
    assert run.returncode == Interrupted.exit_code
    assert "stopped between two stages" in said
    assert slow.stages_run() == {"sft": 1}


def test_stages_are_forked_only_where_it_is_safe_and_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = {"device": "cpu", "threads": 1, "num_processes": 1}
    environment = forkable([cpu, cpu])
    assert environment is not None
    assert (environment["CUDA_VISIBLE_DEVICES"], environment["OMP_NUM_THREADS"]) == ("", "1")
    assert forkable([cpu]) is None
    assert forkable([cpu, {**cpu, "threads": 2}]) is None
    assert forkable([{**cpu, "num_processes": 2}] * 2) is None
    monkeypatch.setattr("posttrain.launch.FORK_STAGES", False)
    assert forkable([cpu, cpu]) is None


def test_stages_that_are_not_forked_compute_the_same(
    project: Project, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("posttrain.launch.FORK_STAGES", False)
    project.go()
    assert outcome(project) == expected


@pytest.mark.slow
def test_two_processes_under_torchrun_report_and_leave_one_artifact(project: Project, expected: dict[str, str]) -> None:
    said = project.go("runtime.num_processes=2", until="sft")
    assert "sft  step 6/6" in said
    assert project.value("sft") == expected["sft"][:64]


def test_the_environment_of_a_stage() -> None:
    cores = len(os.sched_getaffinity(0))
    assert stage_environment({}, {})["OMP_NUM_THREADS"] == str(cores)
    assert stage_environment({}, {"OMP_NUM_THREADS": "1"})["OMP_NUM_THREADS"] == "1"
    assert stage_environment({"threads": 3}, {"OMP_NUM_THREADS": "1"})["OMP_NUM_THREADS"] == "3"
    assert stage_environment({"num_processes": 64}, {})["OMP_NUM_THREADS"] == "1"
    assert stage_environment({"num_processes": 64, "num_machines": 64}, {})["OMP_NUM_THREADS"] == str(cores)
    assert stage_environment({"device": "cpu"}, {"CUDA_VISIBLE_DEVICES": "0"})["CUDA_VISIBLE_DEVICES"] == ""
    assert stage_environment({"device": "auto"}, {"CUDA_VISIBLE_DEVICES": "1"})["CUDA_VISIBLE_DEVICES"] == "1"
    fixed = stage_environment({}, {"HOME": "/home/me"})
    assert (fixed["PYTHONHASHSEED"], fixed["HF_HUB_DISABLE_TELEMETRY"], fixed["HOME"]) == ("0", "1", "/home/me")


def test_one_process_needs_no_launcher_and_several_machines_are_reached_by_srun() -> None:
    job, slurm = Path("job.json"), {"SLURM_JOB_ID": "7"}
    assert command(job, {"num_processes": 1}, slurm)[1:] == ["-m", "posttrain.stages", "job.json"]
    several = ["-m", "posttrain.stages.launcher", "job.json"]
    assert command(job, {"num_processes": 4}, slurm)[1:] == several
    assert command(job, {"num_processes": 1, "accelerate_config": "/ddp.yaml"}, {})[1:] == several
    words = command(job, {"num_processes": 16, "num_machines": 2}, slurm)
    assert words[:2] == ["srun", "--nodes"]
    assert "--kill-on-bad-exit=1" in words
    assert words[-3:] == several
    assert command(job, {"num_processes": 16, "num_machines": 2}, {})[1:] == several
