"""The wheel carries what the package reads at run time, and works outside the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from this checkout without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    (path,) = folder.glob("*.whl")
    return path


def below(folder: Path, patterns: tuple[str, ...]) -> set[str]:
    """Files below a folder, as paths from the folder's parent."""
    found = {path for pattern in patterns for path in folder.rglob(pattern) if path.is_file()}
    return {str(path.relative_to(folder.parent)) for path in found if "__pycache__" not in path.parts}


def test_recipes_templates_and_shapes_are_inside(wheel: Path) -> None:
    inside = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        f"posttrain/{name}" for folder in ("recipes", "chat_templates") for name in below(ROOT / folder, ("*",))
    }
    expected |= below(ROOT / "posttrain", ("*.py", "*.json"))
    assert expected - inside == set()
    assert "posttrain/recipes/zephyr-7b-qlora.yaml" in inside
    assert "posttrain/models/shapes/mistralai__Mistral-7B-v0.1.json" in inside


def test_nothing_else_is_inside(wheel: Path) -> None:
    strangers = [
        name
        for name in zipfile.ZipFile(wheel).namelist()
        if not name.startswith(("posttrain/", "posttrain-")) or "__pycache__" in name or "/tests/" in name
    ]
    assert strangers == []


def test_a_clean_venv_outside_the_checkout_plans_the_quickstart(wheel: Path, tmp_path: Path) -> None:
    venv, elsewhere = tmp_path / "venv", tmp_path / "elsewhere"
    elsewhere.mkdir()
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    (packages,) = venv.glob("lib/python*/site-packages")
    # The dependencies are those of the running interpreter; its editable posttrain is not among them,
    # since a .pth file inside a folder that a .pth file names is not read.
    (packages / "dependencies.pth").write_text(str(Path(pytest.__file__).resolve().parent.parent))
    install = [sys.executable, "-m", "pip", "--python", str(venv / "bin" / "python")]
    subprocess.run([*install, "install", "--quiet", "--no-deps", "--no-index", str(wheel)], check=True)

    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    where = [str(venv / "bin" / "python"), "-c", "import posttrain; print(posttrain.__file__)"]
    assert str(packages) in subprocess.run(where, cwd=elsewhere, env=environment, capture_output=True, text=True).stdout
    command = [str(venv / "bin" / "posttrain"), "run", "quickstart", "--dry-run"]
    done = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "aligned" in done.stdout + done.stderr
    assert list(elsewhere.iterdir()) == [], "a dry run writes nothing"
