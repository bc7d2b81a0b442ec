"""Lineage: what a model folder stands on, kept in its record, true after a move, refused where it is not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from posttrain.artifact import Record, write_record
from posttrain.errors import CheckpointError
from posttrain.models.lineage import Lineage, Link, Quantization, lineage_of, read_lineage

NF4 = Quantization("nf4", True, "bfloat16")


def leave(run: Path, stage: str, lineage: Lineage | None, fingerprint: str = "") -> Link:
    """Writes a stage's folder: an adapter where the lineage has adapters."""
    folder = run / stage
    folder.mkdir(parents=True)
    own = Link(folder, f"@{stage}", fingerprint or f"print of {stage}")
    adapter = lineage is not None
    if adapter:
        (folder / "adapter_config.json").write_text("{}")
    grown = lineage.grown(own, lineage.quantization) if lineage else Lineage(own)
    record = Record(
        stage=stage, kind="sft", version=1, fingerprint=own.fingerprint or "", identity={}, lineage=grown.as_dict(run)
    )
    write_record(folder, record)
    return own


def chain(run: Path, outside: Path) -> Path:
    """base (of another run) <- sft <- dpo; returns the newest folder."""
    base = Link(outside, "owner/base@abc", None)
    sft = leave(run, "sft", Lineage(base, (), NF4))
    leave(run, "dpo", Lineage(base, (sft,), NF4))
    return run / "dpo"


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    folder = tmp_path / "hub" / "base"
    folder.mkdir(parents=True)
    return folder


def test_a_chain_is_read_back_link_by_link(tmp_path: Path, outside: Path) -> None:
    lineage = lineage_of(chain(tmp_path / "run", outside), "@dpo")
    assert lineage.base == Link(outside, "owner/base@abc", None)
    assert [(link.label, link.folder.name, link.fingerprint) for link in lineage.adapters] == [
        ("@sft", "sft", "print of sft"),
        ("@dpo", "dpo", "print of dpo"),
    ]
    assert lineage.quantization == NF4


def test_what_was_quantised_is_kept_and_lacking_in_older_records(tmp_path: Path, outside: Path) -> None:
    noted = Quantization("nf4", True, "bfloat16", modules=("a.q_proj", "a.k_proj"), device="cuda")
    saved = json.loads(json.dumps(Lineage(Link(outside, "b", None), (), noted).as_dict(tmp_path)))
    found = read_lineage(saved, tmp_path).quantization
    assert found is not None
    assert (found.modules, found.device) == (("a.q_proj", "a.k_proj"), "cuda")
    assert found == NF4  # the same numbers: a stage may go on from an older one
    del saved["quantization"]["modules"], saved["quantization"]["device"]
    assert read_lineage(saved, tmp_path).quantization == NF4
    assert "q_proj" not in str(noted)  # it goes into identities


def test_a_whole_model_stands_on_itself(tmp_path: Path, outside: Path) -> None:
    assert lineage_of(outside, "./base") == Lineage(Link(outside, "./base", None))
    leave(tmp_path / "run", "base", None)
    assert lineage_of(tmp_path / "run" / "base", "@base").base.fingerprint == "print of base"


def test_a_run_that_moved_keeps_its_links(tmp_path: Path, outside: Path) -> None:
    chain(tmp_path / "run", outside)
    shutil.move(tmp_path / "run", tmp_path / "elsewhere")
    lineage = lineage_of(tmp_path / "elsewhere" / "dpo", "@dpo")
    assert [link.folder for link in lineage.adapters] == [tmp_path / "elsewhere" / name for name in ("sft", "dpo")]


def test_a_run_behind_a_symbolic_link_can_move_too(tmp_path: Path, outside: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "runs").symlink_to(tmp_path / "disk")
    base = leave(tmp_path / "runs" / "demo", "base", None)
    stands_on = lineage_of(base.folder, "@base")  # resolved, as a stage does it
    leave(tmp_path / "runs" / "demo", "sft", stands_on)
    saved = json.loads((tmp_path / "disk/demo/sft/stage.json").read_text())["lineage"]
    assert [link["folder"] for link in (saved["base"], *saved["adapters"])] == ["base", "sft"]
    shutil.move(tmp_path / "disk" / "demo", tmp_path / "demo")
    assert lineage_of(tmp_path / "demo" / "sft", "sft").base.folder == tmp_path / "demo" / "base"


def test_a_parent_that_was_made_again_is_refused(tmp_path: Path, outside: Path) -> None:
    newest = chain(tmp_path / "run", outside)
    shutil.rmtree(tmp_path / "run" / "sft")
    with pytest.raises(CheckpointError, match=r"stands on @sft \(.*sft\), which is gone"):
        lineage_of(newest, "@dpo")
    leave(tmp_path / "run", "sft", Lineage(Link(outside, "b", None)), fingerprint="another")
    with pytest.raises(CheckpointError, match="was trained on another @sft than the one now in"):
        lineage_of(newest, "@dpo")
    (tmp_path / "run" / "sft" / "stage.json").unlink()
    with pytest.raises(CheckpointError, match="was trained on another @sft"):
        lineage_of(newest, "@dpo")


@pytest.mark.parametrize("record", [False, True])
def test_an_adapter_of_unknown_origin_is_refused(tmp_path: Path, record: bool) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/base"}')  # never trusted
    if record:
        write_record(folder, Record(stage="x", kind="merge", version=1, fingerprint="f", identity={}))
    with pytest.raises(CheckpointError, match="nothing proves which base and adapters it was trained on"):
        lineage_of(folder, "./adapter")


def test_the_plain_form_says_everything(tmp_path: Path) -> None:
    run = tmp_path / "run"
    lineage = Lineage(Link(run / "base", "@base", "f"), (Link(tmp_path / "far", "./far", None),), NF4)
    saved = json.loads(json.dumps(lineage.as_dict(run)))
    assert saved["base"] == {"folder": "base", "label": "@base", "fingerprint": "f"}
    assert saved["adapters"][0]["folder"] == str(tmp_path / "far")
    assert read_lineage(saved, run) == lineage
