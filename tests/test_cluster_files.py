"""The ready files of scripts/cluster and docs/containers.md: what they say is what the command line takes."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import typer
import typer.core
import typer.main
import yaml

from posttrain import __version__
from posttrain.cli import app

ROOT = Path(__file__).resolve().parent.parent
CLUSTER = ROOT / "scripts" / "cluster"
USAGE_ERROR = typer.BadParameter.__mro__[1]  # of the click that Typer carries
IMAGE = re.compile(r"^((\S*/)?posttrain(:\S+)?|\$\{?IMAGE\}?|\S*posttrain\.sif)$")


def parse(words: list[str]) -> None:
    """Lets the command line's own parser read the words that follow `posttrain`; a wrong option raises."""
    group = typer.main.get_command(app)
    assert isinstance(group, typer.core.TyperGroup)
    name, command, rest = group.resolve_command(typer.Context(group, info_name="posttrain"), list(words))
    assert command is not None
    with command.make_context(name, rest):
        pass


def commands_of(text: str) -> list[list[str]]:
    """Command lines of posttrain in shell text: what follows the image's name, or `posttrain` itself."""
    found = []
    for line in re.sub(r"\\\n", " ", text).splitlines():
        words = line.replace("||", "#").replace("&&", "#")
        try:
            split = shlex.split(words, comments=True)
        except ValueError:
            continue  # an apostrophe in prose
        places = [number for number, word in enumerate(split) if IMAGE.match(word)]
        if places and split[places[-1] + 1 :] and not {"build", "convert", "save", "push", "tag"} & set(split[:3]):
            found.append(split[places[-1] + 1 :])
    return found


def code_blocks(markdown: str) -> str:
    """The indented or fenced code of a page."""
    fenced = re.findall(r"^```\w*\n(.*?)^```", markdown, flags=re.M | re.S)
    indented = [line[4:] for line in markdown.splitlines() if line.startswith("    ")]
    return "\n".join([*fenced, *indented])


def kubernetes() -> dict[str, dict[str, Any]]:
    """The documents of the Job's file, by name."""
    documents = yaml.safe_load_all((CLUSTER / "kubernetes-job.yaml").read_text(encoding="utf-8"))
    return {document["metadata"]["name"]: document for document in documents}


def skypilot() -> dict[str, Any]:
    task = yaml.safe_load((CLUSTER / "skypilot.yaml").read_text(encoding="utf-8"))
    assert isinstance(task, dict)
    return task


def test_the_parser_refuses_what_does_not_exist() -> None:
    parse(["run", "quickstart", "--runs-dir", "/runs"])
    for wrong in (["run", "quickstart", "--run-dir", "/runs"], ["go", "quickstart"], ["run"]):
        with pytest.raises(USAGE_ERROR):
            parse(wrong)


def test_the_kubernetes_job_is_confined_and_resumes() -> None:
    files = kubernetes()
    job = files["posttrain"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    user = f"{pod['securityContext']['runAsUser']}:{pod['securityContext']['runAsGroup']}"
    assert f"USER {user}\n" in (ROOT / "Dockerfile").read_text(encoding="utf-8")
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert container["image"].endswith(f":{__version__}")
    mounted = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert {"/runs", "/cache", "/tmp"} <= set(mounted)
    assert set(mounted.values()) == set(volumes)
    for path in ("/runs", "/cache"):  # what must outlive the pod
        claim = volumes[mounted[path]]["persistentVolumeClaim"]["claimName"]
        assert files[claim]["kind"] == "PersistentVolumeClaim"
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert pod["restartPolicy"] == "Never", "a pod failure policy needs it"
    assert job["backoffLimit"] > 0
    ignored, failed = job["podFailurePolicy"]["rules"]
    assert (ignored["action"], ignored["onPodConditions"][0]["type"]) == ("Ignore", "DisruptionTarget")
    assert (failed["action"], failed["onExitCodes"]["values"]) == ("FailJob", [2])
    assert failed["onExitCodes"]["containerName"] == container["name"]


def test_the_kubernetes_job_says_a_command() -> None:
    (container,) = kubernetes()["posttrain"]["spec"]["template"]["spec"]["containers"]
    assert "command" not in container, "the image's entry point"
    parse(container["args"])
    assert (ROOT / "recipes" / f"{container['args'][1]}.yaml").is_file()


def test_the_skypilot_task_says_a_command() -> None:
    task = skypilot()
    (words,) = commands_of(task["run"])
    parse(words)
    assert (ROOT / "recipes" / f"{task['envs']['RECIPE']}.yaml").is_file()
    assert task["envs"]["IMAGE"].endswith(f":{__version__}")
    for source in task["file_mounts"].values():
        assert isinstance(source, dict) or (ROOT / source).exists()


@pytest.mark.parametrize("name", ["scripts/cluster/apptainer.sh", "docs/containers.md"])
def test_the_commands_of_text_are_commands(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    text = "\n".join(re.findall(r"^#   (.*)", text, flags=re.M)) if name.endswith(".sh") else code_blocks(text)
    commands = commands_of(text)
    assert commands
    for words in commands:
        parse(words)


def fake(folder: Path, name: str, body: str) -> dict[str, str]:
    """Puts a command of this name first on the PATH; returns the environment that finds it."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/bash\n{body}\n", encoding="utf-8")
    (folder / name).chmod(0o755)
    return {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}


def mirror(*words: object) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(CLUSTER / "mirror_runs.sh"), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def files_below(folder: Path) -> dict[str, str]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_text(encoding="utf-8") for path in found}


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A folder of runs with a checkpoint."""
    checkpoint = tmp_path / "runs" / "mine" / "sft.partial" / "checkpoint-10"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainable.safetensors").write_text("ten", encoding="utf-8")
    (tmp_path / "store").mkdir()
    return tmp_path / "runs"


def test_a_copy_of_the_runs_comes_back(runs: Path, tmp_path: Path) -> None:
    assert mirror("restore", tmp_path / "new", tmp_path / "store").returncode == 0
    assert not (tmp_path / "new").exists()
    assert mirror("save", runs, tmp_path / "store").returncode == 0
    (runs / "mine" / "sft.partial" / "checkpoint-10").rename(runs / "mine" / "sft.partial" / "checkpoint-20")
    (runs / "mine" / "log.txt").write_text("twenty", encoding="utf-8")
    assert mirror("save", runs, tmp_path / "store").returncode == 0
    assert mirror("save", runs, tmp_path / "store").returncode == 0, "the first copy, once more"
    assert mirror("restore", tmp_path / "new", tmp_path / "store").returncode == 0
    assert files_below(tmp_path / "new") == files_below(runs)


@pytest.mark.parametrize("damage", ["a file less", "a shorter file", "no list"])
def test_a_copy_that_was_cut_off_is_not_used(runs: Path, tmp_path: Path, damage: str) -> None:
    store = tmp_path / "store"
    mirror("save", runs, store)
    first = files_below(runs)
    (runs / "mine" / "log.txt").write_text("more", encoding="utf-8")
    mirror("save", runs, store)
    if damage == "a file less":
        (store / "b" / "mine" / "log.txt").unlink()
    elif damage == "a shorter file":
        (store / "b" / "mine" / "log.txt").write_text("mo", encoding="utf-8")
    else:
        (store / "b.list").unlink()
    assert mirror("restore", tmp_path / "new", store).returncode == 0
    assert files_below(tmp_path / "new") == first


def test_watching_saves_until_it_is_asked_to_stop(runs: Path, tmp_path: Path) -> None:
    script = str(CLUSTER / "mirror_runs.sh")
    watcher = subprocess.Popen(["bash", script, "watch", str(runs), str(tmp_path / "store"), "0.1"])
    deadline = time.monotonic() + 20
    while not (tmp_path / "store" / "b.list").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    watcher.send_signal(signal.SIGTERM)
    assert watcher.wait(timeout=20) == 0
    assert mirror("restore", tmp_path / "new", tmp_path / "store").returncode == 0
    assert files_below(tmp_path / "new") == files_below(runs)


@pytest.mark.parametrize("status", [0, 1])
def test_the_skypilot_task_restores_runs_and_saves(tmp_path: Path, status: int) -> None:
    """Its `run` block with a folder for a bucket and a fake docker, twice: as after a preemption."""
    body = f'[ -f "$HOME/runs/steps" ] && echo resumed; echo step >> "$HOME/runs/steps"; echo "$@"; exit {status}'
    environment = fake(tmp_path / "bin", "docker", body)
    environment |= skypilot()["envs"] | {"HF_TOKEN": ""}
    told = []
    for machine in ("one", "two"):
        home = tmp_path / machine
        home.mkdir()
        (home / "bucket").symlink_to(tmp_path / "bucket")
        (tmp_path / "bucket").mkdir(exist_ok=True)
        shutil.copy(CLUSTER / "mirror_runs.sh", home)
        command = ["bash", "-c", skypilot()["run"]]
        done = subprocess.run(
            command, env={**environment, "HOME": str(home)}, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == status, done.stderr
        told.append(done.stdout)
    assert "resumed" not in told[0]
    assert "resumed" in told[1]
    assert f"--volume {tmp_path}/two/runs:/runs" in told[1]
    assert "run zephyr-7b-qlora --runs-dir /runs" in told[1]


def test_apptainer_gets_the_folders_and_no_settings_of_the_cluster(tmp_path: Path) -> None:
    environment = fake(tmp_path / "bin", "apptainer", 'printf "%s\\n" "$@"; env | sed s/^/env:/')
    environment |= {"HF_HOME": "/home/me/hf", "PYTHONPATH": "/home/me/lib", "CUDA_VISIBLE_DEVICES": "3"}
    environment |= {"POSTTRAIN_RUNS": str(tmp_path / "runs"), "POSTTRAIN_CACHE": str(tmp_path / "cache")}
    command = ["bash", str(CLUSTER / "apptainer.sh"), "run", "posttrain.sif", "run", "quickstart", "--quiet"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True)
    words = [line for line in done.stdout.splitlines() if not line.startswith("env:")]
    assert words[:2] == ["run", "--nv"]
    assert words[-4:] == ["posttrain.sif", "run", "quickstart", "--quiet"]
    assert f"{tmp_path}/runs:/runs" in words
    assert "HF_HUB_OFFLINE=1" in words or os.environ.get("HF_HUB_OFFLINE") == "0"
    assert (tmp_path / "runs").is_dir()
    assert "env:CUDA_VISIBLE_DEVICES=3" in done.stdout
    assert "env:HF_HOME" not in done.stdout
    assert "env:PYTHONPATH" not in done.stdout


def test_apptainer_converts_a_saved_image(tmp_path: Path) -> None:
    environment = fake(tmp_path / "bin", "apptainer", 'echo "$@"; cat "${3#docker-archive:}"') | {
        "TMPDIR": str(tmp_path)
    }
    (tmp_path / "saved.tar").write_text("a tar", encoding="utf-8")
    subprocess.run(["gzip", "--keep", "saved.tar"], cwd=tmp_path, check=True)
    for name in ("saved.tar", "saved.tar.gz"):
        command = ["bash", str(CLUSTER / "apptainer.sh"), "convert", name, "posttrain.sif"]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True)
        assert done.stdout.startswith("build posttrain.sif docker-archive:")
        assert "a tar" in done.stdout
    assert list(tmp_path.glob("posttrain-*")) == [], "what was unpacked is removed"


def test_shellcheck_finds_nothing_in_the_skypilot_task(tmp_path: Path) -> None:
    beside = Path(sys.executable).parent / "shellcheck"
    tool = str(beside) if beside.exists() else shutil.which("shellcheck")
    if tool is None:
        pytest.skip("shellcheck is not installed")
    (tmp_path / "run.sh").write_text("#!/bin/bash\n" + skypilot()["run"], encoding="utf-8")
    done = subprocess.run([tool, str(tmp_path / "run.sh")], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
