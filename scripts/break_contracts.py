"""Breaks the contracts of the design one by one and shows that their tests notice.

    python scripts/break_contracts.py [--only 4 9] [--list]

For each break: one small patch is applied to a temporary copy of the package, the contract's tests run on
the copy, and must fail. Before that, the same tests must pass on the copy as it is. Exit code 0 when they
pass without patches and every patch is noticed, else 1.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("posttrain", "tests", "scripts", "recipes", "chat_templates", "pyproject.toml")
CONTRACTS = (1, 2, 3, 4, 7, 8, 9, 11, 12, 14)
"""Contracts of the design that must have a break here."""
TESTS_FAILED = 1
"""pytest's exit code; a patch that cannot even be imported gives another one."""


@dataclass(frozen=True)
class Break:
    """A patch that violates a contract, and the tests that must notice."""

    contract: int
    says: str
    """What is wrong with the patched code."""
    file: str
    old: str
    """Stands exactly once in the file."""
    new: str
    tests: tuple[str, ...]


BREAKS = (
    Break(
        1,
        "a checkpoint is written under its final name",
        "posttrain/pretraining/checkpoint.py",
        ', folder / f".{_PREFIX}{step}"\n',
        ', folder / f"{_PREFIX}{step}"\n',
        ("tests/pretraining/test_checkpoint.py::test_one_that_was_interrupted_is_never_resumed_from",),
    ),
    Break(
        1,
        "a stage works under its final name",
        "posttrain/pipeline/plan.py",
        '    return run_dir / f"{stage}.partial"\n',
        "    return run_dir / stage\n",
        ("tests/test_launch.py::test_kill_9_between_record_and_rename[before_record]",),
    ),
    Break(
        2,
        "finished stages run again",
        "posttrain/pipeline/plan.py",
        '        "skip",\n        _elsewhere(',
        '        "run",\n        _elsewhere(',
        ("tests/test_pipeline.py::test_a_second_run_skips_everything",),
    ),
    Break(
        2,
        "a changed stage is taken for the finished one",
        "posttrain/pipeline/plan.py",
        "    if record.fingerprint != job.fingerprint:\n",
        "    if False:\n",
        ("tests/test_pipeline.py::test_a_change_is_refused_with_its_one_field_and_redo_runs_what_depends_on_it",),
    ),
    Break(
        3,
        "execution fields of the trainer enter the fingerprint",
        "posttrain/recipe/trainer_lists.py",
        "if name in fields and name not in EXECUTION}",
        "if name in fields}",
        ("tests/test_pipeline.py::test_execution_and_spelled_out_defaults_leave_fingerprints_alone",),
    ),
    Break(
        3,
        "the seed does not enter the fingerprint",
        "posttrain/pipeline/identity.py",
        '        "seed": seed,\n        "precision": recipe.precision,\n        "trainer"',
        '        "precision": recipe.precision,\n        "trainer"',
        ("tests/test_pipeline.py::test_what_changes_a_result_changes_fingerprints_from_there_on",),
    ),
    Break(
        4,
        "random states are not in the checkpoint",
        "posttrain/pretraining/loop.py",
        "            self._save_rng_state(str(folder))  # every process its own\n",
        "",
        ("tests/training/test_resume.py::test_interrupted_and_resumed_is_never_interrupted[sft-qlora-False]",),
    ),
    Break(
        4,
        "the optimizer is not in the checkpoint",
        "posttrain/pretraining/loop.py",
        "                save_optimizer(model, self.optimizer, folder)\n",
        "                save_optimizer(model, type(self.optimizer.optimizer)(self.optimizer.param_groups), folder)\n",
        ("tests/training/test_resume.py::test_interrupted_and_resumed_is_never_interrupted[dpo-lora-False]",),
    ),
    Break(
        7,
        "the end of turn is no stop in the generation config",
        "posttrain/chat/contract.py",
        "    generation_config.eos_token_id = stops\n",
        "    generation_config.eos_token_id = [token for token in stops if token != end.id]\n",
        ("tests/chat/test_chat_contract.py::test_agree_sets_everything_and_says_so_once",),
    ),
    Break(
        7,
        "an adapter is saved without its generation config",
        "posttrain/stages/conversation.py",
        "    base.generation_config.save_pretrained(folder)\n",
        "",
        ("tests/stages/test_contracts.py::test_the_saved_folders_stop",),
    ),
    Break(
        7,
        "a saved folder that does not stop passes",
        "posttrain/chat/contract.py",
        "    if not isinstance(stops, list) or end.id not in stops:\n",
        "    if False:\n",
        ("tests/chat/test_chat_contract.py::test_saved_folder_that_does_not_stop_is_refused",),
    ),
    Break(
        8,
        "positions run on over the documents of a packed row (SFT)",
        "posttrain/pretraining/packing.py",
        "= document.positions\n",
        "= np.arange(at, end)\n",
        ("tests/training/test_sft_losses.py::test_packed_is_unpacked_however_the_step_is_cut",),
    ),
    Break(
        8,
        "positions run on over the answers of a packed row (DPO)",
        "posttrain/training/layout.py",
        "= np.arange(shared, length)",
        "= np.arange(start, end)",
        ("tests/training/test_dpo_losses.py::test_every_loss_type_is_trls_own[sigmoid]",),
    ),
    Break(
        9,
        "the bare base is the reference",
        "posttrain/training/reference.py",
        "    logps = trainer.policy_logps(",
        "    with trainer.model.disable_adapter():\n        logps = trainer.policy_logps(",
        ("tests/stages/test_contracts.py::test_the_reference_of_dpo_is_the_sft_policy",),
    ),
    Break(
        9,
        "a wrong reference does not stop the stage",
        "posttrain/stages/dpo.py",
        "    if problems:\n",
        "    if False:\n",
        ("tests/stages/test_contracts.py::test_dpo_against_the_bare_base_is_stopped",),
    ),
    Break(
        11,
        "a refused row is not written into the ledger",
        "posttrain/stages/prepare.py",
        "        ledger.drop(name, reason, rows)\n",
        "",
        ("tests/stages/test_contracts.py::test_rows_do_not_vanish",),
    ),
    Break(
        11,
        "any share of rows may be dropped",
        "posttrain/data/ledger.py",
        "        if dropped <= max_dropped * rows_in:\n",
        "        if True:\n",
        (
            "tests/data/test_data_ledger.py::test_max_dropped_says_how_many_why_and_where",
            "tests/stages/test_contracts.py::test_rows_do_not_vanish",
        ),
    ),
    Break(
        12,
        "a user's mistake ends in a traceback",
        "posttrain/cli.py",
        "    except PosttrainError as error:\n        print(",
        "    except KeyboardInterrupt as error:\n        print(",
        ("tests/test_cli.py::test_a_mistake_is_one_message_and_exit_code_2",),
    ),
    Break(
        12,
        "a mistake leaves the run's folder behind",
        "posttrain/pipeline/run.py",
        "            shutil.rmtree(run_dir)\n",
        "            pass\n",
        ("tests/test_pipeline.py::test_a_mistake_found_by_the_first_stage_leaves_nothing",),
    ),
    Break(
        14,
        "fewer processes than the recipe asks for will do",
        "posttrain/stages/setup.py",
        "    if wanted != got:\n",
        "    if False:\n",
        ("tests/stages/test_contracts.py::test_a_machine_that_is_not_the_recipes_is_refused",),
    ),
    Break(
        14,
        "a trainable weight without a gradient passes",
        "posttrain/stages/setup.py",
        "        if param.grad is None:\n",
        "        if False:\n",
        ("tests/training/test_stops.py::test_a_trainable_weight_that_gets_no_gradient_stops_the_first_step",),
    ),
)


def patched(broken: Break, root: Path) -> str:
    """Text of the broken file; ValueError where the patch does not apply exactly once."""
    text = (root / broken.file).read_text(encoding="utf-8")
    if text.count(broken.old) != 1:
        raise ValueError(f"{broken.file}: {text.count(broken.old)} times, not once: {broken.old!r}")
    return text.replace(broken.old, broken.new)


def copy_tree(folder: Path) -> None:
    """Copies package and tests, so that nothing is ever patched in place."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, folder / name)


def run_tests(folder: Path, tests: tuple[str, ...]) -> tuple[int, str]:
    """Runs tests on a copy of the package; returns pytest's exit code and its last line."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    words = [sys.executable, "-P", "-m", "pytest", "--basetemp", str(folder / "tmp"), *tests]
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
    lines = (done.stdout + done.stderr).strip().splitlines() or ["no output"]
    return done.returncode, "\n".join(lines[-25:]) if done.returncode not in (0, TESTS_FAILED) else lines[-1]


def try_break(broken: Break, folder: Path) -> tuple[bool, str]:
    """Patches the copy, runs the tests and takes the patch back; returns whether they failed, and their last line."""
    path = folder / broken.file
    sound = path.read_text(encoding="utf-8")
    path.write_text(patched(broken, folder), encoding="utf-8")
    try:
        code, said = run_tests(folder, broken.tests)
    finally:
        path.write_text(sound, encoding="utf-8")
    return code == TESTS_FAILED, said


def check_all(breaks: list[Break], folder: Path) -> bool:
    """Prints the table and returns whether every contract is guarded."""
    copy_tree(folder)
    every = tuple(dict.fromkeys(test for broken in breaks for test in broken.tests))
    began = time.monotonic()
    code, said = run_tests(folder, every)
    print(f"as it is: {said} ({time.monotonic() - began:.0f} s)", flush=True)
    if code:
        return False
    guarded = True
    for broken in breaks:
        began = time.monotonic()
        noticed, said = try_break(broken, folder)
        guarded = guarded and noticed
        verdict = "noticed" if noticed else "NOT NOTICED"
        seconds = time.monotonic() - began
        print(f"{broken.contract:3}  {verdict:<11}  {broken.says:<60}  {seconds:4.0f} s  {said}", flush=True)
    return guarded


def main() -> int:
    """Parses the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=int, nargs="+", default=[], metavar="N", help="these contracts")
    parser.add_argument("--list", action="store_true", help="show the breaks and stop")
    options = parser.parse_args()
    chosen = [broken for broken in BREAKS if not options.only or broken.contract in options.only]
    if options.list:
        for broken in chosen:
            print(f"{broken.contract:3}  {broken.file}: {broken.says}")
        return 0
    with tempfile.TemporaryDirectory(prefix="posttrain-breaks-") as folder:
        guarded = check_all(chosen, Path(folder))
    print("every break is noticed" if guarded else "FAILED")
    return 0 if guarded else 1


if __name__ == "__main__":
    sys.exit(main())
