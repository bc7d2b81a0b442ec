"""Every broken input gives one clear error at the exact place, exit code 2, no traceback, and leaves no trace."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from broken.case import Case
from broken.inputs import ADAPTERS, CHECKPOINTS, DATA
from broken.recipes import REFERENCES, TYPES, TYPOS, YAML
from broken.whole import make_whole

from posttrain import cli
from posttrain.pipeline import run as pipeline

RECIPE_ALONE = {"typos and values": TYPOS, "types": TYPES, "references": REFERENCES, "YAML": YAML}
KINDS = {**RECIPE_ALONE, "data": DATA, "checkpoints": CHECKPOINTS, "adapters": ADAPTERS}
ALL = [pytest.param(case, id=f"{kind}: {case.name}") for kind, cases in KINDS.items() for case in cases]
WORDS = ["run", "recipe.yaml"]

MEASURE = """
import contextlib, io, json, os, resource, sys
from posttrain.cli import main

def cpu():
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime

results, before = [], 0.0
for folder in sys.argv[1:]:
    os.chdir(folder)
    sys.argv, said = ["posttrain", "run", "recipe.yaml"], io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            main()
        code = 0
    except SystemExit as end:
        code = end.code
    now = cpu()
    results.append([code, said.getvalue(), now - before])  # the first one pays for the interpreter and all imports
    before = now
print(json.dumps({"results": results, "modules": list(sys.modules)}))
"""


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project that nothing is wrong with, to be copied."""
    folder = tmp_path_factory.mktemp("whole") / "whole"
    make_whole(folder)
    return folder


def broken(whole: Path, folder: Path, case: Case) -> Path:
    """Copies the whole project and breaks it."""
    shutil.copytree(whole, folder)
    case.break_it(folder)
    return folder


def tree(folder: Path) -> dict[str, object]:
    """Everything below a folder: name, size, time of the last change, content."""
    found: dict[str, object] = {}
    for path in [folder, *folder.rglob("*")]:
        content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
        found[str(path.relative_to(folder))] = (path.stat().st_size, path.stat().st_mtime_ns, content)
    return found


def run_here(*words: str) -> int:
    """Runs a command line in this process and returns its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["posttrain", *words])
        with pytest.raises(SystemExit) as end:
            cli.main()
    return int(end.value.code or 0)


def assert_one_error(case: Case, folder: Path, code: int, stderr: str) -> None:
    """One error of at most two lines (finding, remedy), where and as the case says."""
    said = stderr.replace(f"{folder}/", "").splitlines()
    assert code == 2, stderr
    assert said[0].startswith(f"error: {case.where}"), f"{said[0]}\nnot at {case.where}"
    assert case.found in said[0]
    assert len(said) <= 2, stderr
    assert all(line.startswith("  -> ") for line in said[1:])
    assert "Traceback" not in stderr


class Started(AssertionError):
    """A stage's process was about to start."""


@pytest.fixture
def nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise Started

    monkeypatch.setattr(pipeline, "start", refuse)


def test_there_are_six_of_each_of_seven_kinds() -> None:
    assert len(KINDS) == 7
    for kind, cases in KINDS.items():
        assert len({case.name for case in cases}) == len(cases) >= 6, kind


@pytest.mark.usefixtures("nothing_starts")
def test_the_whole_project_passes(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "project"
    shutil.copytree(whole, folder)
    monkeypatch.chdir(folder)
    before = tree(folder)
    assert run_here("check", "recipe.yaml") == 0
    assert tree(folder) == before
    with pytest.raises(Started):
        run_here(*WORDS, "--quiet")


@pytest.mark.contract(number=12)
@pytest.mark.usefixtures("nothing_starts")
@pytest.mark.parametrize("case", ALL)
def test_one_error_and_no_trace(
    case: Case, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = broken(whole, tmp_path / "project", case)
    monkeypatch.chdir(folder)
    before = tree(folder)
    code = run_here(*WORDS)
    said = capfd.readouterr()
    assert said.out == ""
    assert_one_error(case, folder, code, said.err)
    assert tree(folder) == before


@pytest.mark.parametrize("kind", RECIPE_ALONE)
def test_the_recipe_alone_answers_at_once_and_loads_nothing_heavy(kind: str, whole: Path, tmp_path: Path) -> None:
    cases = KINDS[kind]
    folders = [broken(whole, tmp_path / f"project{number}", case) for number, case in enumerate(cases)]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, folders)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert not {"torch", "transformers", "datasets"} & set(report["modules"])
    for case, folder, (code, stderr, seconds) in zip(cases, folders, report["results"], strict=True):
        assert_one_error(case, folder, code, stderr)
        assert seconds < 1, f"{case.name}: {seconds:.2f} s of CPU"


@pytest.mark.parametrize("kind", ["YAML", "data", "checkpoints", "adapters"])
def test_the_same_from_a_shell(kind: str, whole: Path, tmp_path: Path) -> None:
    case = KINDS[kind][0]
    folder = broken(whole, tmp_path / "project", case)
    before = tree(folder)
    command = [sys.executable, "-m", "posttrain", *WORDS]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env={**os.environ, "COLUMNS": "80"})
    assert done.stdout == ""
    assert_one_error(case, folder, done.returncode, done.stderr)
    assert tree(folder) == before
