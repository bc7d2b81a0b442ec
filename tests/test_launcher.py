"""The launcher of a stage's processes: its words for torch, Accelerate's environment, and who is to blame."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.launch import launch_command, launch_command_parser

from posttrain.errors import UserError
from posttrain.recipe.accelerate import read_spread
from posttrain.recipe.bundled import find_bundled, list_bundled
from posttrain.stages import launcher
from posttrain.stages.context import Events, Job
from posttrain.stages.launcher import accelerate_environment, first_host, launch_words

SLURM = {"SLURM_NODEID": "1", "SLURM_JOB_ID": "1234567", "SLURM_JOB_NODELIST": "as01r1b[07-08]"}
CONFIGS = list_bundled("recipes/accelerate")
SAID = ("ACCELERATE_", "FSDP_", "PARALLELISM_", "DEEPSPEED_")
"""How the variables begin that a launcher tells Accelerate's part of a worker with."""


def job_of(config: str | None, processes: int = 2, precision: str = "bf16") -> Job:
    runtime = {"num_processes": processes, "num_machines": 1, "accelerate_config": config}
    return Job("", "", "sft", "sft", {}, {}, 1, precision, runtime, {}, {}, "")


def words_of(config: Path, processes: int, precision: str) -> list[str]:
    """The options of `accelerate launch` for the same."""
    sizes = ["--num_processes", str(processes), "--num_machines", "1", "--main_process_port", "0"]
    return ["--config_file", str(config), "--mixed_precision", precision, *sizes]


@pytest.fixture
def events() -> Any:
    """Events that may be read again: `events.lines()`."""

    @dataclass
    class Heard:
        reading: int
        told: Events

        def lines(self) -> list[dict[str, Any]]:
            os.set_blocking(self.reading, False)
            try:
                return [json.loads(line) for line in os.read(self.reading, 1 << 16).splitlines()]
            except BlockingIOError:
                return []

    reading, writing = os.pipe()
    yield Heard(reading, Events(writing))
    os.close(reading)
    os.close(writing)


class TestWords:
    def test_one_machine_meets_at_a_port_that_is_free(self) -> None:
        words = launch_words({"num_processes": 4, "num_machines": 1}, {})
        assert words[:4] == ["--nproc-per-node", "4", "--max-restarts", "0"]
        assert words[words.index("--rdzv-endpoint") + 1] == "localhost:0"
        assert "--nnodes" not in words

    def test_several_machines_are_told_apart_by_slurm(self) -> None:
        words = launch_words({"num_processes": 8, "num_machines": 2}, SLURM)
        given = dict(zip(words[::2], words[1::2], strict=True))
        assert given["--nproc-per-node"] == "4"
        assert (given["--nnodes"], given["--node-rank"]) == ("2", "1")
        assert (given["--master-addr"], given["--master-port"]) == ("as01r1b07", str(29400 + 4567))

    def test_two_jobs_on_one_node_do_not_meet(self) -> None:
        ports = {
            launch_words({"num_processes": 2, "num_machines": 2}, SLURM | {"SLURM_JOB_ID": job})[-1] for job in "78"
        }
        assert len(ports) == 2

    @pytest.mark.parametrize("missing", sorted(SLURM))
    def test_machines_that_nobody_numbers_are_refused(self, missing: str) -> None:
        environment = {name: value for name, value in SLURM.items() if name != missing}
        with pytest.raises(UserError, match=f"{missing} is not set") as refused:
            launch_words({"num_processes": 2, "num_machines": 2}, environment)
        assert refused.value.where == "runtime.num_machines"

    def test_torch_reads_them(self) -> None:
        from torch.distributed.run import config_from_args, parse_args

        for runtime in ({"num_processes": 4}, {"num_processes": 8, "num_machines": 2}):
            words = launch_words(runtime, SLURM)
            config, *_ = config_from_args(parse_args([*words, "-m", "posttrain.stages", "job.json"]))
            assert config.nproc_per_node == 4
            assert config.min_nodes == config.max_nodes == runtime.get("num_machines", 1)
            assert config.max_restarts == 0

    @pytest.mark.parametrize(
        ("nodes", "first"),
        [
            ("node003", "node003"),
            ("a1,b2", "a1"),
            ("node[003-005,9]", "node003"),
            ("node[9,003-005]", "node9"),
            ("gs07r3b[01,12],gs08", "gs07r3b01"),
            ("login1,node[1-2]", "login1"),
            ("rack[1-2]-node", "rack1-node"),
            ("n[01-04].cluster.es,m1", "n01.cluster.es"),
        ],
    )
    def test_the_first_host_of_a_node_list(self, nodes: str, first: str) -> None:
        assert first_host(nodes) == first


class TestEnvironment:
    def test_without_a_config_nothing_is_set(self) -> None:
        assert accelerate_environment(job_of(None), {}) == {}

    @pytest.mark.parametrize("precision", ["bf16", "fp32"])
    @pytest.mark.parametrize("name", CONFIGS)
    def test_it_is_what_accelerates_own_launcher_sets(
        self, name: str, precision: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # In this process: their command up to the call that starts processes.
        path, given = find_bundled("recipes/accelerate", name), {"bf16": "bf16", "fp32": "no"}[precision]
        seen: dict[str, str] = {}
        before = dict(os.environ)
        monkeypatch.setattr("torch.distributed.run.run", lambda _: seen.update(os.environ))
        if read_spread(path) == "deepspeed":
            pretend_deepspeed(monkeypatch)
        launch_command(launch_command_parser().parse_args([*words_of(path, 2, given), "script.py"]))
        set_by_them = {key: value for key, value in seen.items() if before.get(key) != value}
        ours = accelerate_environment(job_of(str(path), precision=precision), before)
        set_by_them.pop("OMP_NUM_THREADS", None)
        assert ours == set_by_them
        assert ours["ACCELERATE_MIXED_PRECISION"] == given

    @pytest.mark.parametrize("name", ["ddp", "fsdp2"])
    def test_it_is_what_a_script_finds_under_accelerate_launch(self, name: str, tmp_path: Path) -> None:
        path = find_bundled("recipes/accelerate", name)
        script = tmp_path / "script.py"
        script.write_text(
            "import json, os, pathlib\n"
            "folder = pathlib.Path(__file__).parent\n"
            "(folder / (os.environ['RANK'] + '.json')).write_text(json.dumps(dict(os.environ)))\n"
        )
        clean = {key: value for key, value in os.environ.items() if not key.startswith(SAID)}
        words = [sys.executable, "-m", "accelerate.commands.launch", *words_of(path, 2, "bf16"), str(script)]
        subprocess.run(words, env=clean, check=True, capture_output=True)
        ours = accelerate_environment(job_of(str(path)), clean)
        for rank in ("0", "1"):
            found = json.loads((tmp_path / f"{rank}.json").read_text())
            assert {key: found.get(key) for key in ours} == ours
            assert {key for key in found if key.startswith(SAID)} <= ours.keys()

    def test_a_library_that_is_not_there_is_said_before_anything_starts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(launcher, "is_deepspeed_available", lambda: False)
        with pytest.raises(UserError, match=r"deepspeed: is not installed\n  -> .*posttrain\[deepspeed\]"):
            accelerate_environment(job_of(str(find_bundled("recipes/accelerate", "zero2"))), {})

    def test_consumer_gpus_on_an_old_driver_do_not_reach_one_another(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert launcher._without_peer_access({}) == {}
        monkeypatch.setattr(launcher, "check_cuda_p2p_ib_support", lambda: False)
        told = {"NCCL_P2P_DISABLE": "1", "NCCL_IB_DISABLE": "1"}  # what accelerate/state.py asks for
        assert launcher._without_peer_access({}) == told
        assert launcher._without_peer_access({"NCCL_P2P_DISABLE": "0"}) == {"NCCL_IB_DISABLE": "1"}

    @pytest.mark.parametrize(
        ("text", "says"),
        [
            ("distributed_type: FSDP\nfsdp_config: {fsdp_version: 2}\nnum_procesess: 8\n", "num_procesess"),
            ("distributed_type: MULTI_GPU\ngpu_ids: '0'\n", "Less than two GPU ids"),
        ],
    )
    def test_what_accelerate_refuses_is_the_users_mistake(self, text: str, says: str, tmp_path: Path) -> None:
        config = tmp_path / "mine.yaml"
        config.write_text(f"compute_environment: LOCAL_MACHINE\n{text}")
        with pytest.raises(UserError) as refused:
            accelerate_environment(job_of(str(config)), {})
        assert refused.value.where == str(config)
        assert says in refused.value.found


def pretend_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets Accelerate's launcher believe that DeepSpeed is there: only a name of a file is asked of it."""
    import types

    runner = types.ModuleType("deepspeed.launcher.runner")
    runner.DEEPSPEED_ENVIRONMENT_NAME = ".deepspeed_env"  # type: ignore[attr-defined]
    for name in ("deepspeed", "deepspeed.launcher"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "deepspeed.launcher.runner", runner)
    for place in ("accelerate.commands.launch", "posttrain.stages.launcher"):
        monkeypatch.setattr(f"{place}.is_deepspeed_available", lambda: True)


@dataclass
class Failed:
    """As torch's ProcessFailure says it."""

    exitcode: int
    timestamp: int = 100


class TestBlame:
    def test_the_killed_one_is_named(self, events: Any) -> None:
        failures = {1: Failed(-signal.SIGKILL), 0: Failed(1)}
        assert launcher._judge(failures, events.told) == 1  # type: ignore[arg-type]
        assert events.lines() == [{"event": "killed", "rank": 1, "signal": "SIGKILL"}]

    def test_one_that_torch_killed_later_is_not(self, events: Any) -> None:
        failures = {0: Failed(1), 1: Failed(-signal.SIGKILL, 130)}
        assert launcher._judge(failures, events.told) == 1  # type: ignore[arg-type]
        assert events.lines() == []

    def test_one_that_was_asked_to_end_is_not(self, events: Any) -> None:
        failures = {0: Failed(-signal.SIGTERM), 1: Failed(-signal.SIGSEGV)}
        assert launcher._judge(failures, events.told) == 1  # type: ignore[arg-type]
        assert events.lines() == [{"event": "killed", "rank": 1, "signal": "SIGSEGV"}]

    @pytest.mark.parametrize(("codes", "code"), [((2, 1), 2), ((1, 2), 2), ((130, 130), 130), ((-15, -15), 1)])
    def test_the_exit_code_is_that_of_the_first(self, codes: tuple[int, int], code: int, events: Any) -> None:
        failures = dict(enumerate(map(Failed, codes)))
        assert launcher._judge(failures, events.told) == code  # type: ignore[arg-type]
        assert events.lines() == []

    def test_a_users_mistake_is_told_with_its_place(
        self, tmp_path: Path, events: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setenv("POSTTRAIN_EVENTS_FD", str(events.told._descriptor))
        config = tmp_path / "mine.yaml"
        config.write_text("compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\nnum_procesess: 8\n")
        job = tmp_path / "job.json"
        job.write_text(job_of(str(config)).dump())
        assert launcher.main([str(job)]) == 2
        (heard,) = events.lines()
        assert (heard["event"], heard["where"], heard["exit_code"]) == ("error", str(config), 2)
        assert "Traceback" not in capsys.readouterr().err
