"""Each contract has a test, and a patch that shows that the test can fail (`scripts/break_contracts.py`)."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "scripts" / "break_contracts.py"


def script() -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("break_contracts", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["break_contracts"] = module  # its dataclass looks itself up there
    spec.loader.exec_module(module)
    return module


BREAKS = script().BREAKS


def marks(test: str) -> list[int]:
    """Numbers of the contracts that a test is marked with, by its node id."""
    file, name = test.partition("[")[0].split("::")
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    found = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
    assert len(found) == 1, f"no test {test}"
    calls = [mark for mark in found[0].decorator_list if isinstance(mark, ast.Call)]
    return [
        ast.literal_eval(call.keywords[0].value) for call in calls if ast.unparse(call.func) == "pytest.mark.contract"
    ]


def test_every_contract_is_broken_somewhere() -> None:
    assert {broken.contract for broken in BREAKS} == set(script().CONTRACTS)


@pytest.mark.parametrize("broken", BREAKS, ids=lambda broken: broken.says.replace(" ", "-"))
def test_a_patch_applies_and_its_tests_bear_the_contracts_mark(broken) -> None:
    ast.parse(script().patched(broken, ROOT))
    for test in broken.tests:
        assert broken.contract in marks(test), f"{test} lacks @pytest.mark.contract(number={broken.contract})"


@pytest.mark.slow
def test_every_break_is_noticed() -> None:
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
