"""The command line: frozen, light, and without a traceback for a mistake."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from runs_support import Project
from typer.testing import CliRunner

from posttrain import cli

GOLDEN = Path(__file__).parent / "golden/cli.txt"
HEAVY = ("torch", "transformers", "datasets", "trl", "peft", "accelerate", "bitsandbytes", "pyarrow", "numpy", "pandas")


def surface() -> str:
    """Every command with its arguments and options, one line each."""
    lines = []
    group = typer.main.get_command(cli.app)
    for name, command in sorted(group.commands.items()):  # type: ignore[attr-defined]
        lines.append(name)
        for parameter in command.params:
            if parameter.param_type_name == "argument":
                lines.append(f"  {parameter.metavar}: {'required' if parameter.required else 'optional'}")
                continue
            shape = "many" if parameter.multiple else "flag" if parameter.is_bool_flag else "one"
            lines.append(f"  {' '.join(parameter.opts)}: {shape}, default {parameter.default}")
    return "\n".join(lines) + "\n"


def test_commands_and_options_are_frozen() -> None:
    assert surface() == GOLDEN.read_text(), "an option changed: if meant, write tests/golden/cli.txt again"


def modules_of(*words: str, **env: str) -> tuple[int, set[str]]:
    """Runs a command line in a process of its own and returns its exit code and the modules it loaded."""
    code = (
        "import sys, posttrain.cli\n"
        "try: posttrain.cli.main()\n"
        "except SystemExit as end: code = end.code or 0\n"
        "else: code = 0\n"
        "print('MODULES', code, *sorted(sys.modules))"
    )
    environment = {**os.environ, **env}
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, env=environment)
    last = done.stdout.splitlines()[-1].split()
    assert last[0] == "MODULES", done.stderr
    return int(last[1]), set(last[2:])


def test_help_loads_next_to_nothing() -> None:
    code, modules = modules_of("--help")
    assert code == 0
    assert not modules & {*HEAVY, "pydantic", "yaml", "huggingface_hub", "posttrain.recipe.schema"}


@pytest.mark.parametrize("words", [("schema",), ("version",), ("run", "no-such-recipe"), ("run", "{}", "--dry-run")])
def test_what_the_recipe_alone_decides_loads_nothing_heavy(project: Project, words: tuple[str, ...]) -> None:
    _, modules = modules_of(*(word.format(project.recipe) for word in words))
    assert not modules & set(HEAVY)


def test_a_run_that_only_skips_and_a_refusal_load_nothing_heavy(finished: Project) -> None:
    run = ["run", str(finished.recipe), "--runs-dir", str(finished.runs)]
    for words, expected in ((run, 0), ([*run, "--set", "stages.dpo.trainer.beta=0.2"], 2), (["check", *run[1:]], 0)):
        code, modules = modules_of(*words)
        assert code == expected
        assert not modules & set(HEAVY)


@pytest.mark.contract(number=12)
@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("no-such-recipe",), 2, "error: no-such-recipe: no file, and not among the bundled recipes"),
        (("{}", "--set", "stages.dpo.trainer.bata=0.1"), 2, "did you mean beta?"),
        (("{}", "--set", "stages.sft.model=./nowhere"), 2, "no file or folder"),
        (("{}", "--redo", "dop"), 2, "did you mean dpo?"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(
    project: Project, words: tuple[str, ...], code: int, message: str
) -> None:
    tree = project.tree()
    given = [word.format(project.recipe) for word in words]
    done = subprocess.run(
        [sys.executable, "-m", "posttrain", "run", *given, "--runs-dir", str(project.runs)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == code
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert project.tree() == tree


def test_gates_and_crashes_exit_with_1(project: Project) -> None:
    assert project.shell("--until", "sft", FAKE="sft=gate").returncode == 1
    assert project.shell("--until", "sft", "--redo", "sft", FAKE="sft=crash").returncode == 1


def test_dry_run_shows_the_plan_and_writes_nothing(project: Project) -> None:
    tree = project.tree()
    done = project.shell("--dry-run")
    assert done.returncode == 0
    assert [line.split() for line in done.stdout.splitlines()] == [
        ["sft", "sft", "run"],
        ["instruct", "merge", "run"],
        ["dpo", "dpo", "run"],
        ["aligned", "merge", "run"],
    ]
    assert project.tree() == tree


def test_dry_run_of_a_refusal_exits_with_2(finished: Project) -> None:
    done = finished.shell("--dry-run", "--set", "stages.dpo.trainer.beta=0.2")
    assert done.returncode == 2
    assert re.search(r"dpo +dpo +refuse +stages\.dpo\.trainer\.beta: 0\.1 -> 0\.2", done.stdout)


def test_quiet_prints_nothing(project: Project) -> None:
    done = project.shell("--quiet", "--until", "sft")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_check_shows_settings_without_running(project: Project) -> None:
    done = CliRunner().invoke(cli.app, ["check", str(project.recipe), "--runs-dir", str(project.runs)])
    assert done.exit_code == 0
    assert "demo: 4 stages, seed 42, fp32" in done.output
    assert "learning_rate: 5e-06 (default)" in done.output  # of dpo, which trains an adapter
    assert not project.runs.exists()


def test_schema_is_json() -> None:
    done = CliRunner().invoke(cli.app, ["schema"])
    assert done.exit_code == 0
    assert "stages" in json.loads(done.output)["properties"]


def test_runs_and_prune(finished: Project) -> None:
    finished.go(redo=("dpo",))
    (finished.run_dir / "sft.partial").mkdir()
    half = finished.run_dir / "extra.partial/checkpoints/step-2"
    half.mkdir(parents=True)
    command, runs = CliRunner(), ["--runs-dir", str(finished.runs)]
    listed = command.invoke(cli.app, ["runs", *runs]).output
    assert re.search(r"dpo +done .* value ", listed)
    assert re.search(r"extra +resumable", listed)
    asked = command.invoke(cli.app, ["prune", "demo", *runs], input="n\n")
    assert asked.exit_code == 1
    assert "remove these 7" in asked.output  # dpo and aligned moved aside, four checkpoints, one leftover
    assert (finished.run_dir / ".aside/dpo-1").exists()
    assert command.invoke(cli.app, ["prune", *runs, "--yes"]).exit_code == 0
    assert not list((finished.run_dir / ".aside").iterdir())
    assert not (finished.run_dir / "sft.partial").exists()
    assert not (finished.run_dir / "sft/checkpoints").exists()
    assert half.exists()
    assert finished.go().count("skipped") == 4
    assert "nothing to remove" in command.invoke(cli.app, ["prune", *runs]).output
