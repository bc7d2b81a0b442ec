"""The Dockerfile without a Docker engine: what its text promises. `scripts/prove_image.sh` builds and runs it."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

from posttrain import __version__

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
Instruction = tuple[str, str]


def instructions(text: str) -> list[Instruction]:
    """Returns (keyword, rest) of every instruction; continued lines are joined, comments left out."""
    lines = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    joined = re.sub(r"\\\n\s*", " ", lines)
    return [(words[0].upper(), words[1]) for line in joined.splitlines() if len(words := line.split(maxsplit=1)) == 2]


DOCKERFILE = instructions((ROOT / "Dockerfile").read_text(encoding="utf-8"))
LAST_STAGE = DOCKERFILE[max(number for number, (keyword, _) in enumerate(DOCKERFILE) if keyword == "FROM") :]


def rest_of(keyword: str, where: list[Instruction] = LAST_STAGE) -> str:
    """What the only instruction of this kind says."""
    (found,) = [rest for name, rest in where if name == keyword]
    return found


def settings(keyword: str, where: list[Instruction]) -> dict[str, str]:
    """NAME=VALUE pairs of ENV, ARG and LABEL; an ARG without a value has an empty one."""
    words = [word for name, rest in where if name == keyword for word in shlex.split(rest)]
    return {word.partition("=")[0]: word.partition("=")[2] for word in words}


def ignored(path: str) -> bool:
    """Whether .dockerignore keeps a path out of the build: the last pattern that fits it or a parent decides."""
    verdict = False
    parents = [path, *(str(parent) for parent in Path(path).parents if str(parent) != ".")]
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        pattern = line.removeprefix("!")
        if pattern and not line.startswith("#"):
            anywhere = pattern.removeprefix("**/")
            names = [part for one in parents for part in Path(one).parts] if anywhere != pattern else parents
            if any(fnmatch(name, anywhere) for name in names):
                verdict = not line.startswith("!")
    return verdict


def test_the_user_is_not_root() -> None:
    user, _, group = rest_of("USER").partition(":")  # numbers: Kubernetes' runAsNonRoot does not know names
    assert int(user) > 0
    assert int(group) > 0


def test_it_is_a_command_that_ends() -> None:
    assert json.loads(rest_of("ENTRYPOINT")) == ["posttrain"]
    assert not {"HEALTHCHECK", "EXPOSE", "ONBUILD"} & {keyword for keyword, _ in DOCKERFILE}


def test_all_that_is_written_lies_on_a_volume() -> None:
    volumes = json.loads(rest_of("VOLUME"))
    assert set(volumes) == {"/cache", "/runs", "/tmp"}
    environment = settings("ENV", LAST_STAGE)
    folders = {name: value for name, value in environment.items() if value.startswith("/") and name != "PATH"}
    assert {"HOME", "HF_HOME", "XDG_CACHE_HOME", "TMPDIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"} <= set(
        folders
    )
    assert [name for name, value in folders.items() if f"/{Path(value).parts[1]}" not in volumes] == []
    assert rest_of("WORKDIR") == "/", "runs go to ./runs, which must be the volume"


def test_there_are_no_secrets_and_no_downloads_past_pip_and_apt() -> None:
    names = [*settings("ARG", DOCKERFILE), *settings("ENV", DOCKERFILE)]
    assert [name for name in names if re.search("TOKEN|SECRET|PASS|CREDENTIAL|KEY", name.upper())] == []
    assert "ADD" not in {keyword for keyword, _ in DOCKERFILE}
    assert not re.search(r"\b(curl|wget|git clone)\b", " ".join(rest for _, rest in DOCKERFILE))


def test_the_labels_tell_what_it_is() -> None:
    labels = settings("LABEL", LAST_STAGE)
    kinds = ("title", "description", "version", "revision", "source", "licenses", "base.name")
    assert set(labels) == {f"org.opencontainers.image.{kind}" for kind in kinds}
    assert labels["org.opencontainers.image.licenses"] == PROJECT["license"]
    arguments = settings("ARG", LAST_STAGE)
    assert arguments["VERSION"] == __version__
    for kind, argument in (("version", "VERSION"), ("revision", "REVISION"), ("source", "SOURCE")):
        assert labels[f"org.opencontainers.image.{kind}"] == "${" + argument + "}"
        assert argument in arguments, "a label of an undeclared argument is empty"


def test_every_source_of_a_copy_exists_and_reaches_the_build() -> None:
    sources = [
        word for name, rest in DOCKERFILE if name == "COPY" and "--from" not in rest for word in rest.split()[:-1]
    ]
    assert {"pyproject.toml", "constraints.txt", "posttrain", "recipes", "chat_templates"} <= set(sources)
    assert [name for name in sources if not (ROOT / name).exists() or ignored(name)] == []


@pytest.mark.parametrize("path", [".git", ".venv", "tests/test_image.py", "runs", "posttrain/__pycache__/cli.pyc"])
def test_nothing_else_reaches_the_build(path: str) -> None:
    assert ignored(path)


def test_files_inside_copied_folders_reach_the_build() -> None:
    assert not ignored("posttrain/stages/sft.py")
    assert not ignored("recipes/data/quickstart/sft.jsonl")


def test_every_version_comes_from_the_constraints() -> None:
    installs = [rest for keyword, rest in DOCKERFILE if keyword == "RUN" and "pip install" in rest]
    assert len(installs) == 3
    assert [rest for rest in installs if "--constraint constraints.txt" not in rest and "--no-index" not in rest] == []


def test_python_of_the_bases_is_admitted() -> None:
    admitted = SpecifierSet(PROJECT["requires-python"])
    assert "3.11" in admitted, "Debian 12"
    assert "3.12" in admitted, "Ubuntu 24.04"


def test_the_requirements_are_those_of_the_project() -> None:
    """Runs the line of the Dockerfile that takes them from pyproject.toml."""
    (step,) = [rest for keyword, rest in DOCKERFILE if keyword == "RUN" and "requirements.txt" in rest]
    (code,) = re.findall(r"python -c '([^']*)'", step)
    arguments = [value for name, value in settings("ARG", DOCKERFILE).items() if name == "EXTRAS"]
    extras = arguments[0].split()
    printed = subprocess.run(
        [sys.executable, "-c", code, *extras], cwd=ROOT, capture_output=True, text=True, check=True
    )
    expected = PROJECT["dependencies"] + [one for name in extras for one in PROJECT["optional-dependencies"][name]]
    assert printed.stdout.splitlines() == expected


def find_tool(name: str) -> str:
    """A linter of the `dev` extra: beside this interpreter, or on the PATH."""
    beside = Path(sys.executable).parent / name
    tool = str(beside) if beside.exists() else shutil.which(name)
    return tool or pytest.skip(f"{name} is not installed")


def test_hadolint_finds_nothing() -> None:
    done = subprocess.run([find_tool("hadolint"), "Dockerfile"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_shellcheck_finds_nothing() -> None:
    scripts = [*ROOT.glob("scripts/*.sh"), *ROOT.glob("scripts/cluster/*.sh"), ROOT / ".ci" / "run"]
    assert ROOT / "scripts" / "prove_image.sh" in scripts
    done = subprocess.run([find_tool("shellcheck"), *map(str, scripts)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--help"], 0, "usage: scripts/prove_image.sh"),
        (["--colour"], 2, "no such option: --colour"),
        (["--suite"], 2, "--suite needs a value"),
    ],
)
def test_the_proof_explains_itself(arguments: list[str], status: int, words: str) -> None:
    script = str(ROOT / "scripts" / "prove_image.sh")
    done = subprocess.run(["bash", script, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == status
    assert words in done.stdout + done.stderr
