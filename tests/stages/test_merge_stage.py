"""The `merge` stage and `posttrain merge`: certified chains, the closer base, combinations, sweeps, refusals."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from posttrain import cli
from posttrain.artifact import Artifact, DigestCache, Record, describe_files, sha256, write_record
from posttrain.certify.comparison import Comparison, Mode
from posttrain.certify.handoff import Output, merge_certified
from posttrain.certify.probes import FILE, read_probes
from posttrain.errors import CheckpointError, RecipeError, UserError
from posttrain.models.files import files_of_model
from posttrain.models.lineage import Lineage, Link
from posttrain.models.load import load_base
from posttrain.recipe.schema import Dpo, Merge, Sft
from posttrain.stages import dpo, merge, sft
from posttrain.stages.context import ModelInput, Summary
from posttrain.stages.merge_command import Request, run_merge
from tests.stages.stage_tiny import chats, finish, make_context, preferences, write_lines
from tests.training.spine_tiny import save_base

TRAINER = {"learning_rate": 2e-2, "max_steps": 4, "logging_steps": 10}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base; adapters on it in fp32 (two) and in 4 bits; a DPO adapter above the one in 4 bits."""
    folder = tmp_path_factory.mktemp("merges")
    save_base(folder / "base")
    rows = chats(220)
    for number, row in enumerate(rows):
        row["messages"][0]["content"] += f" ({number})"  # so that each has a prompt of its own
    write_lines(folder / "chats.jsonl", rows)
    write_lines(folder / "few.jsonl", chats(20))
    write_lines(folder / "pairs.jsonl", preferences(13))
    for stage, method, rows in (("lora", "lora", "chats"), ("other", "lora", "few"), ("qlora", "qlora", "chats")):
        context = make_context(folder, stage, "sft", {**TRAINER, "max_steps": 5 if stage == "other" else 4})
        data = {"sources": [{"path": f"./{rows}.jsonl"}], "max_length": 128}
        given = {"kind": "sft", "model": "@base", "chat_template": "chatml", "method": {method: {"r": 4}}, "data": data}
        finish(context, "sft", sft.run(Sft.model_validate(given), context))
    context = make_context(folder, "dpo", "dpo", TRAINER, model="qlora")
    data = {"sources": [{"path": "./pairs.jsonl"}], "max_length": 64}
    finish(context, "dpo", dpo.run(Dpo.model_validate({"kind": "dpo", "model": "@qlora", "data": data}), context))
    return folder


def merged(run: Path, name: str, parent: str | None, **settings: Any) -> tuple[Summary, Path]:
    """Runs a merge stage; `models` of the settings name folders of the run."""
    context = make_context(run, name, "merge", model=parent or "base")
    inputs = dict(context.inputs)
    for label, ref in settings.get("models", {}).items():
        place = run / ref[1:]
        inputs[f"models.{label}"] = ModelInput(ref, place, None, Artifact.read(place))
    given = {"kind": "merge", **({"model": f"@{parent}"} if parent else {}), **settings}
    return merge.run(Merge.model_validate(given), replace(context, inputs=inputs)), context.folder


def certificate_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "certificate.json").read_text())
    return found


@pytest.mark.contract(number=10)
def test_a_chain_is_merged_and_certified_on_rows_that_training_never_saw(run: Path) -> None:
    summary, folder = merged(run, "instruct", "qlora")
    assert summary.failed == []
    found = certificate_of(folder)
    assert (found["verdict"], found["base"]["mode"], found["compared"]["mode"]) == ("pass", "dequantized", "whole")
    assert found["rows"] == {"source": "held_out", "rows": 2}
    assert found["logits"]["relative_error"] < 5e-3
    assert found["logits"]["loss"] == pytest.approx(found["logits"]["reference_loss"], abs=1e-2)
    cosines = [one["cosine"] for one in found["tensors"]]
    assert cosines == sorted(cosines)
    assert {"model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"} <= found["files"].keys()
    assert all(sha256(folder / name) == seen["sha256"] for name, seen in found["files"].items())
    page = (folder / "certificate.md").read_text()
    assert page.startswith("# Certificate: instruct\n\n**PASS**\n")
    assert "rows that training never saw" in page
    assert found["files"]["model.safetensors"]["sha256"] in page
    assert {"certificate.json", "certificate.md"} <= set(summary.files)
    assert read_probes(folder / FILE) == read_probes(run / "qlora" / FILE)


def test_a_small_set_says_that_its_rows_were_trained_on(run: Path) -> None:
    _, folder = merged(run, "aligned", "dpo")
    assert certificate_of(folder)["rows"]["source"] == "training"
    assert "too few were there" in (folder / "certificate.md").read_text()
    assert certificate_of(folder)["verdict"] == "pass"


@pytest.mark.contract(number=10)
def test_auto_measures_both_bases_and_keeps_the_closer_one(run: Path) -> None:
    summary, folder = merged(run, "closer", "qlora", base="auto")
    _, named = merged(run, "named", "qlora", base="dequantized")
    errors = summary.metrics["base"]["relative_error"]
    assert errors["dequantized"] < 0.2 * errors["original"]
    assert (summary.metrics["base"]["asked"], summary.metrics["base"]["mode"]) == ("auto", "dequantized")
    assert certificate_of(folder)["logits"]["relative_error"] == errors["dequantized"]
    assert sha256(folder / "model.safetensors") == sha256(named / "model.safetensors")
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]
    assert f"dequantized {errors['dequantized']:.4g}" in (folder / "certificate.md").read_text()


def test_the_original_base_is_measured_as_the_other_model_that_it_is(run: Path) -> None:
    _, folder = merged(run, "original", "qlora", base="original")
    _, closer = merged(run, "closer-again", "qlora")
    worse, better = (certificate_of(one)["logits"]["relative_error"] for one in (folder, closer))
    assert worse > 5 * better


def test_auto_needs_room_for_both_before_it_begins(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = (run / "base" / "model.safetensors").stat().st_size
    slack = 64 << 20
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=slack + int(1.5 * size)))
    _, folder = merged(run, "room-for-one", "qlora", base="dequantized", dtype="float32")
    assert (folder / "model.safetensors").is_file()
    with pytest.raises(CheckpointError, match="GB are free"):
        merged(run, "room-for-two", "qlora", base="auto", dtype="float32")
    assert not list((run / "room-for-two.partial").glob(".base-*"))


def test_files_that_were_hashed_are_not_hashed_again_for_the_record(run: Path) -> None:
    summary, folder = merged(run, "hashed", "lora")
    assert summary.digests.keys() <= set(summary.files)
    assert "model.safetensors" in summary.digests
    assert describe_files(folder, summary.digests) == summary.digests


def test_a_base_without_a_tokenizer_is_merged_in_both_modes(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "base", tmp_path / "base", ignore=shutil.ignore_patterns("tokenizer*", "special*", "chat_*"))
    bare = ("stage.json", FILE, "tokenizer*", "special*", "chat_*")
    shutil.copytree(run / "lora", tmp_path / "lora", ignore=shutil.ignore_patterns(*bare))
    lineage = Lineage(Link(tmp_path / "base", "base", None), (Link(tmp_path / "lora", "lora", None),))
    probes = read_probes(run / "lora" / FILE)
    modes: tuple[Mode, ...] = ("whole", "layers")
    for mode in modes:
        (tmp_path / mode).mkdir()
        how = Comparison(probes, "cpu", mode=mode)
        _, certificate = merge_certified(tmp_path / mode, lineage, Output("bfloat16"), how, lambda _: None)
        assert certificate.failures == []


@pytest.mark.parametrize("parent", ["lora", "dpo"])
def test_layer_by_layer_gives_the_figures_of_whole_models(run: Path, parent: str) -> None:
    found = {}
    for mode in ("whole", "layers"):
        _, folder = merged(run, f"{parent}-{mode}", parent, certificate={"mode": mode})
        found[mode] = certificate_of(folder)
        assert found[mode]["compared"]["mode"] == mode
    whole, layers = found["whole"]["logits"], found["layers"]["logits"]
    assert abs(whole["relative_error"] - layers["relative_error"]) < 2e-6
    assert whole["loss"] == pytest.approx(layers["loss"], rel=1e-5)
    assert whole["reference_loss"] == pytest.approx(layers["reference_loss"], rel=1e-5)
    assert whole["top1_agreement"] == layers["top1_agreement"]
    assert found["whole"]["files"] == found["layers"]["files"]


@pytest.mark.contract(number=10)
@pytest.mark.parametrize(
    ("limits", "word"),
    [
        ({"relative_error": 1e-12}, "relative error"),
        ({"max_logit_difference": 1e-12}, "largest logit difference"),
        ({"min_delta_cosine": 0.999999, "dtype": "bfloat16"}, "rounding left less"),
    ],
)
def test_beyond_a_limit_of_the_recipe_the_stage_fails(run: Path, limits: dict[str, Any], word: str) -> None:
    dtype = limits.pop("dtype", "float32")
    summary, folder = merged(run, f"strict-{word.split()[0]}", "qlora", certificate=limits, dtype=dtype)
    assert any(word in line for line in summary.failed)
    assert certificate_of(folder)["verdict"] == "fail"
    assert "**FAIL**" in (folder / "certificate.md").read_text()


@pytest.mark.contract(number=10)
def test_one_flipped_bit_after_the_merge_fails_the_certificate(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from posttrain.certify import handoff

    def flip(folder: Path, *rest: Any) -> Any:
        report = original(folder, *rest)
        weights = bytearray((folder / "model.safetensors").read_bytes())
        weights[-3] ^= 1
        (folder / "model.safetensors").write_bytes(weights)
        return report

    original = handoff.merge_into
    monkeypatch.setattr(handoff, "merge_into", flip)
    summary, _ = merged(run, "flipped", "lora")
    assert summary.failed[0] == "certificate: model.safetensors does not have the SHA-256 it was written with"
    assert "model.norm.weight" in summary.failed[1]  # the last tensor, whose numbers are looked at as well
    code, output, _ = command(str(run / "lora"), "--out", str(tmp_path / "out"))
    assert code == 1
    assert "certificate: fail" in output
    assert certificate_of(tmp_path / "out")["verdict"] == "fail"  # it stands, so that one can look at it


def test_a_scaled_delta_lies_between_base_and_adapter(run: Path) -> None:
    summary, folder = merged(run, "half", "lora", scale=0.5)
    _, full = merged(run, "full", "lora")
    name = "model.layers.0.self_attn.q_proj.weight"
    base, half, whole = (load_file(one / "model.safetensors")[name] for one in (run / "base", folder, full))
    assert (half - (base + whole) / 2).abs().max() < 1e-6
    found = certificate_of(folder)
    assert (found["logits"], found["verdict"], found["method"]["kind"]) == (None, "pass", "scale")
    assert list(found["inputs"]) == ["1: @lora"]
    assert 1e-3 < found["inputs"]["1: @lora"]["relative_error"] < 1
    assert "scale of 1 model" in summary.headline
    assert "## Against each of the models combined" in (folder / "certificate.md").read_text()


def test_adapters_are_combined_by_their_deltas(run: Path) -> None:
    models = {"one": "@lora", "two": "@other"}
    _, folder = merged(run, "soup", None, models=models, method="linear", weights={"one": 0.25, "two": 0.75})
    name = "model.layers.1.mlp.down_proj.weight"
    one, two, mean = (
        load_file(place / "model.safetensors")[name]
        for place in (merged(run, "m1", "lora")[1], merged(run, "m2", "other")[1], folder)
    )
    assert (mean - (0.25 * one + 0.75 * two)).abs().max() < 1e-6
    found = certificate_of(folder)
    assert found["rows"]["source"] == "training"  # of one of them alone
    assert list(found["inputs"]) == ["1: @lora", "2: @other"]
    load_base(folder, torch.float32, "cpu", "sdpa")


def test_dare_is_decided_by_the_stages_seed_and_ties_by_none(run: Path) -> None:
    models = {"one": "@lora", "two": "@other"}
    for method in ("dare_ties", "ties"):
        hashes = [
            sha256(
                merged(run, f"{method}{number}", None, models=models, method=method, density=0.5)[1]
                / "model.safetensors"
            )
            for number in range(2)
        ]
        assert hashes[0] == hashes[1]


def test_a_whole_model_is_refused_where_a_delta_is_asked_for(run: Path) -> None:
    with pytest.raises(RecipeError, match="whole model"):
        merged(run, "nothing", "base")


def command(*words: str) -> tuple[int, str, str]:
    done = CliRunner().invoke(cli.app, ["merge", *words])
    error = f"{type(done.exception).__name__}: {done.exception}" if done.exception else ""
    return done.exit_code, done.output, error


def test_the_command_merges_a_lineage_as_the_stage_does(run: Path, tmp_path: Path) -> None:
    _, staged = merged(run, "staged", "dpo", dtype="float32")
    code, output, _ = command(str(run / "dpo"), "--out", str(tmp_path / "out"), "--dtype", "float32")
    assert code == 0, output
    assert sha256(tmp_path / "out" / "model.safetensors") == sha256(staged / "model.safetensors")
    assert "certificate: pass" in output
    assert certificate_of(tmp_path / "out")["merged"] == "out"
    given = run_merge(Request((str(run / "qlora"), str(run / "dpo")), tmp_path / "both", dtype="float32"), print)
    assert not given.failed  # the chain as given is the chain of its last link
    assert sha256(tmp_path / "both" / "model.safetensors") == sha256(staged / "model.safetensors")


def test_a_foreign_adapter_is_merged_only_where_its_base_is_told(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "lora", tmp_path / "foreign", ignore=shutil.ignore_patterns("stage.json", FILE))
    request = Request((str(tmp_path / "foreign"),), tmp_path / "out", rows=run / "few.jsonl")
    with pytest.raises(CheckpointError, match="nothing proves which weights"):
        run_merge(request, print)
    with pytest.raises(UserError, match="brought no rows"):
        run_merge(replace(request, base_model=str(run / "base"), rows=None), print)
    done = run_merge(replace(request, base_model=str(run / "base")), print)
    assert not done.failed
    assert certificate_of(tmp_path / "out")["rows"] == {"source": "given", "rows": 20}
    with pytest.raises(UserError, match="exists already"):
        run_merge(replace(request, base_model=str(run / "base")), print)


@pytest.mark.contract(number=10)
@pytest.mark.parametrize("recorded", [True, False], ids=["a stage's base", "another house's base"])
def test_an_adapter_whose_base_was_changed_is_refused(run: Path, tmp_path: Path, recorded: bool) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("*.partial"))
    if recorded:  # the base is what a stage left, and the adapter's record knows it by its fingerprint
        files = describe_files(copy / "base", ["model.safetensors", "config.json"])
        write_record(copy / "base", Record("base", "pretrain", 1, "f", {}, files=files))
    record = json.loads((copy / "lora" / "stage.json").read_text())
    record["lineage"]["base"]["fingerprint"] = "f" if recorded else None
    cache = DigestCache(tmp_path / "cache")
    record["identity"]["model"] = {"content": cache.tree(copy / "base", files_of_model(copy / "base"))}
    (copy / "lora" / "stage.json").write_text(json.dumps(record))
    assert not run_merge(Request((str(copy / "lora"),), tmp_path / "right"), print).failed
    assert certificate_of(tmp_path / "right")["base"]["proved_by"][0].startswith("the SHA-256 of its files")
    weights = load_file(copy / "base" / "model.safetensors")
    save_file({name: 2 * w for name, w in weights.items()}, copy / "base" / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="is not what @lora was trained on"):
        run_merge(Request((str(copy / "lora"),), tmp_path / "out"), print)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="leave it out"):
        run_merge(Request((str(copy / "lora"),), tmp_path / "two", base_model=str(run / "base")), print)


def test_a_sweep_writes_every_scale_and_tells_what_each_costs(run: Path, tmp_path: Path) -> None:
    code, output, _ = command(str(run / "lora"), "--out", str(tmp_path / "sweep"), "--scale", "0,0.5,1")
    assert code == 0, output
    assert sorted(path.name for path in (tmp_path / "sweep").iterdir()) == ["scale-0", "scale-0.5", "scale-1"]
    table = [line.split("|")[1:4] for line in output.splitlines() if line.startswith("| ") and line[2].isdigit()]
    errors = [float(error) for _, _, error in table]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-5
    assert sha256(tmp_path / "sweep" / "scale-1" / "tokenizer.json") == sha256(run / "lora" / "tokenizer.json")


def test_four_bit_adapters_are_scaled_on_the_base_that_training_saw(run: Path, tmp_path: Path) -> None:
    done = run_merge(Request((str(run / "qlora"),), tmp_path / "one", scales=(1.0,), dtype="float32"), print)
    _, chain = merged(run, "as-chain", "qlora", dtype="float32")
    assert not done.failed
    one, other = (load_file(place / "model.safetensors") for place in (tmp_path / "one", chain))
    assert max((one[name] - other[name]).abs().max().item() for name in other) < 1e-6
    assert certificate_of(tmp_path / "one")["base"]["mode"] == "dequantized"
    assert not list((tmp_path / "one").glob(".base-*"))


def test_an_adapter_is_extracted_and_gives_the_model_back(run: Path, tmp_path: Path) -> None:
    _, tuned = merged(run, "to-extract", "lora", dtype="float32")
    kept = tmp_path / "tuned"
    shutil.copytree(tuned, kept)
    request = Request((str(kept),), tmp_path / "adapter", base_model=str(run / "base"), extract=4)
    lines = run_merge(request, print).lines
    assert "adapter of rank 4" in lines[0]
    assert "100.00 % of the difference" in lines[1]
    texts = write_lines(tmp_path / "texts.jsonl", [{"text": "A town by the sea."}, {"text": "<|im_end|> is text"}])
    back = Request((str(tmp_path / "adapter"),), tmp_path / "back", base_model=str(run / "base"), rows=texts)
    assert not run_merge(back, print).failed
    one, other = (load_file(place / "model.safetensors") for place in (kept, tmp_path / "back"))
    assert max((one[name] - other[name]).abs().max().item() for name in one) < 1e-5


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"base": "dequantised"}, "--base"),
        ({"dtype": "int8"}, "--dtype"),
        ({"method": "mean"}, "--method"),
        ({"method": "scale"}, "without a scale"),
        ({"scales": (0.5,), "method": "ties"}, "--weight"),
        ({"weights": (0.5,)}, "--weight"),
        ({"scales": (0.5,), "base": "auto"}, "auto"),
        ({"method": "ties"}, "inputs|density"),
        ({"method": "slerp", "t": 0.5}, "inputs"),
        ({"extract": 4}, "--base-model"),
        ({"max_shard_size": "five"}, "five"),
        ({"scales": (1.0, 0.5, 1.0)}, "twice"),
        ({"scales": (0.1, 0.10000001)}, "twice"),
        ({"scales": (float("nan"),)}, "not a number"),
        ({"base": "dequantized"}, "not quantised"),
    ],
)
def test_options_that_mean_nothing_together_are_refused_before_work(
    run: Path, tmp_path: Path, settings: dict[str, Any], word: str
) -> None:
    with pytest.raises(UserError, match=word):
        run_merge(Request((str(run / "lora"),), tmp_path / "out", **settings), print)
    assert list(tmp_path.iterdir()) == []
