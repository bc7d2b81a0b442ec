"""The zoo: the doctor names each defect and nothing else, mends what can be mended, and raises no false alarm."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import zoo_behaviour  # noqa: F401  (each enters its specimens)
import zoo_files  # noqa: F401
import zoo_tokens  # noqa: F401
from zoo import DEFECTS, EMBEDDING, HEAD, Entry, data_file, gemma, llama3, mistral, olmo, qwen, read_tensors
from zoo_healthy import HEALTHY

from posttrain.doctor.catalogue import CATALOGUE
from posttrain.doctor.diagnose import diagnose
from posttrain.doctor.fix import Repair, fix
from posttrain.errors import UserError
from posttrain.recipe.bundled import list_bundled

Tree = dict[str, bytes]


@dataclass(frozen=True)
class Case:
    """An entry, written and looked at once."""

    entry: Entry
    folder: Path
    before: Tree
    """The source, as it was written."""
    after: Tree
    """The source, after it was mended elsewhere."""
    found: tuple
    fixed: Path
    repair: Repair


def tree(folder: Path) -> Tree:
    """Every file of a folder by its relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    """Builds, diagnoses and mends an entry, once for all tests that ask for it."""
    cases: dict[str, Case] = {}

    def get(name: str) -> Case:
        if name not in cases:
            entry, home = DEFECTS[name], tmp_path_factory.mktemp("zoo")
            folder, fixed = home / "sick", home / "mended"
            entry.build().write(folder)
            before, data = tree(folder), data_file(folder)
            found = diagnose(folder, entry.template, data if data.is_file() else None).findings
            repair = fix(folder, fixed, entry.template, Path())
            cases[name] = Case(entry, folder, before, tree(folder), found, fixed, repair)
        return cases[name]

    return get


def named(findings: tuple) -> dict[str, str]:
    """Findings as pytest should show them."""
    return {finding.id: f"{finding.where}: {finding.cause}" for finding in findings}


MENDED = [name for name, entry in DEFECTS.items() if entry.mended]


def test_the_zoo_holds_every_defect_of_the_catalogue():
    assert {entry.id for entry in DEFECTS.values()} == set(CATALOGUE)
    assert all(CATALOGUE[entry.id].mendable for entry in DEFECTS.values() if entry.mended)


def test_the_zoo_is_built_without_the_code_it_tests():
    for path in Path(__file__).parent.glob("zoo*.py"):
        imports = [line for line in path.read_text().splitlines() if line.startswith(("import ", "from "))]
        assert not [line for line in imports if "posttrain" in line]


@pytest.mark.parametrize("name", DEFECTS)
def test_the_defect_is_named_and_nothing_else(case, name):
    here = case(name)
    assert set(named(here.found)) == {here.entry.id}, named(here.found)
    for finding in here.found:
        assert finding.where.strip()
        assert finding.cause.strip()
        assert finding.remedy.strip()
        assert finding.severity == CATALOGUE[finding.id].severity


@pytest.mark.parametrize("name", HEALTHY)
def test_the_healthy_have_nothing(tmp_path, name):
    specimen = HEALTHY[name]()
    specimen.write(tmp_path / "healthy")
    data = data_file(tmp_path / "healthy") if specimen.rows else None
    assert named(diagnose(tmp_path / "healthy", None, data).findings) == {}


@pytest.mark.parametrize("name", HEALTHY)
def test_the_healthy_stay_as_they_are(tmp_path, name):
    HEALTHY[name]().write(tmp_path / "healthy")
    before = tree(tmp_path / "healthy")
    repair = fix(tmp_path / "healthy", tmp_path / "copy", None, Path())
    assert (repair.changes, repair.left) == ((), ())
    assert tree(tmp_path / "copy") == before


@pytest.mark.parametrize("name", MENDED)
def test_mending_leaves_nothing_to_find(case, name):
    here = case(name)
    assert here.repair.changes
    assert set(named(here.repair.left)) == {here.entry.then} - {""}, named(here.repair.left)
    assert diagnose(here.fixed).findings == here.repair.left


@pytest.mark.parametrize("name", [name for name, entry in DEFECTS.items() if not entry.mended])
def test_what_cannot_be_mended_is_said_and_left_alone(case, name):
    here = case(name)
    if data_file(here.folder).is_file():  # a fault of the data, not of the folder
        assert named(here.repair.left) == {}
    else:
        assert set(named(here.repair.left)) == {here.entry.id}
        assert set(named(diagnose(here.fixed).findings)) == {here.entry.id}
    assert here.repair.changes == ()
    assert tree(here.fixed) == here.before


@pytest.mark.parametrize("name", DEFECTS)
def test_the_source_is_never_changed(case, name):
    here = case(name)
    assert here.after == here.before


@pytest.mark.parametrize("name", MENDED)
def test_mending_twice_is_mending_once(case, name, tmp_path):
    here = case(name)
    again = fix(here.fixed, tmp_path / "again", None, Path())
    assert again.changes == ()
    assert tree(tmp_path / "again") == tree(here.fixed)


@pytest.mark.parametrize("name", [name for name, entry in DEFECTS.items() if not entry.weights])
def test_weights_are_untouched_where_they_are_not_the_defect(case, name):
    here = case(name)
    weights = [name for name in here.before if ".safetensors" in name]
    after = tree(here.fixed)
    assert [after[name] for name in weights] == [here.before[name] for name in weights]
    assert "posttrain_tokens.json" not in after


@pytest.mark.parametrize("name", [name for name, entry in DEFECTS.items() if entry.weights])
def test_exactly_the_rows_that_are_noted_change(case, name):
    here = case(name)
    old, new = read_tensors(here.folder), read_tensors(here.fixed)
    assert old.keys() == new.keys()  # ties stay tied
    noted = {entry["id"] for entry in json.loads((here.fixed / "posttrain_tokens.json").read_text())["new"]}
    assert noted
    for tensor, values in old.items():
        assert new[tensor].dtype == values.dtype
        assert len(new[tensor]) >= len(values)  # no matrix ever shrinks
        same = new[tensor][: len(values)] == values
        changed = set(np.flatnonzero(~same.reshape(len(values), -1).all(axis=1)).tolist())
        if tensor in (EMBEDDING, HEAD):
            assert noted == changed | {row for row in noted if row >= len(values)}
            assert new[tensor][sorted(noted)].any(axis=1).all()  # no row begins as zeros
        else:
            assert not changed


def test_many_defects_at_once_are_all_named_and_mended(tmp_path):
    it = llama3()
    it.tokenizer["truncation"] = {"direction": "Right", "max_length": 12, "strategy": "LongestFirst", "stride": 0}
    it.tokenizer_config |= {"add_bos_token": False, "model_max_length": 10**30}
    del it.tokenizer_config["pad_token"]
    it.say(pad_token_id=-1, eos_token_id=it.id("<|end_of_text|>"))
    it.replace("{{- bos_token -}}", "{{- bos_token + bos_token -}}")
    it.tensors[EMBEDDING][it.id("<|eot_id|>")] = 0
    it.write(tmp_path / "sick")
    assert set(named(diagnose(tmp_path / "sick").findings)) == {
        "truncation-baked-in",
        "bos-flag-lies",
        "max-length-unset",
        "pad-missing",
        "id-out-of-range",
        "end-of-turn-not-eos",
        "bos-doubled",
        "token-row-untrained",
    }
    repair = fix(tmp_path / "sick", tmp_path / "mended", None, Path())
    assert named(repair.left) == {}
    assert diagnose(tmp_path / "mended").findings == ()


@pytest.mark.parametrize("name", list_bundled("chat_templates"))
@pytest.mark.parametrize("specimen", [qwen, llama3, olmo, mistral, gemma], ids=lambda build: build.__name__)
def test_what_a_bundled_template_is_known_to_do_is_a_note(homes, specimen, name):
    """What is graver is only that tokenizer and template do not belong together."""
    findings = diagnose(homes / specimen.__name__, name).findings
    grave = {finding.id for finding in findings if finding.severity != "note"}
    assert grave <= {"template-tokens-missing", "bos-not-in-template", "bos-missing"}, named(findings)


@pytest.fixture(scope="module")
def homes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Healthy checkpoints of several families."""
    home = tmp_path_factory.mktemp("homes")
    for build in (qwen, llama3, olmo, mistral, gemma):
        build().write(home / build.__name__)
    return home


def test_an_existing_folder_is_not_written_over(tmp_path):
    qwen().write(tmp_path / "healthy")
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError):
        fix(tmp_path / "healthy", tmp_path / "there", None, Path())
