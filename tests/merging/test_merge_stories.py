"""Genuine trained weights: an SFT and a DPO adapter, trained for real, become one model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Literal

import pytest
import torch
from merging import tiny
from merging.stories import Chain, train_chain
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import BPE

from posttrain.artifact import sha256
from posttrain.certify.certificate import Limits, default_limits, failures, verify_bytes
from posttrain.certify.comparison import Comparison
from posttrain.certify.handoff import Output, merge_certified
from posttrain.certify.logits import compare_logits, load_merged, logits_of
from posttrain.certify.probes import Probe, Probes
from posttrain.merging.merge import merge
from posttrain.models.lineage import Lineage, Link


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.fixture(scope="module")
def chain(shared_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    return train_chain(shared_dir, tmp_path_factory.mktemp("chain"))


def test_the_adapters_learned_something(chain: Chain) -> None:
    assert chain.losses[1] < 0.5 * chain.losses[0]
    assert chain.margins[0] == 0
    assert chain.margins[1] > 1


@pytest.mark.contract(number=10)
@pytest.mark.parametrize("size", [10**9, 300_000], ids=["one shard", "several"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merged_chain_is_certified(chain: Chain, dtype: str, size: int, tmp_path: Path) -> None:
    before = {path: sha256(path) for path in chain.base.iterdir()}
    report = merge(chain.base, chain.adapters, tmp_path / "out", dtype, max_shard_size=size)

    merged = load_merged(tmp_path / "out", torch.float32)
    measured = compare_logits(logits_of(chain.in_use), logits_of(merged), chain.rows)
    assert failures(measured, default_limits(dtype, quantised=False, base_mode="original")) == []
    if dtype == "float32":
        assert measured["relative_error"] <= 1e-6
    else:
        merge(chain.base, chain.adapters, tmp_path / "exact", "float32")
        exact = tensors(tmp_path / "exact")
        assert all(torch.equal(tensor, exact[name].bfloat16()) for name, tensor in tensors(tmp_path / "out").items())
    assert verify_bytes(tmp_path / "out", report.files) == []
    assert len(report.tensors) == 5 * 7
    assert [len(tensor.keys) for tensor in report.tensors].count(2) == 5 * 3  # both adapters are in these
    assert (len(list((tmp_path / "out").glob("*.safetensors"))) > 1) == (size < 10**9)
    assert report.tied is True
    assert {path: sha256(path) for path in chain.base.iterdir()} == before


@pytest.fixture(scope="module")
def lineage(chain: Chain, tmp_path_factory: pytest.TempPathFactory) -> Lineage:
    """The chain on a base that can be loaded as a policy: with a tokenizer, though one that knows no word."""
    base = shutil.copytree(chain.base, tmp_path_factory.mktemp("lineage") / "base")
    base.chmod(0o755)
    Tokenizer(BPE()).save(str(base / "tokenizer.json"))
    sft, dpo = (Link(folder, f"@{folder.name}", None) for folder in chain.adapters)
    return Lineage(Link(base, "stories260k", None), (sft, dpo))


def comparison(chain: Chain, mode: Literal["whole", "layers"]) -> Comparison:
    rows = [Probe(row, row) for row in chain.rows]
    return Comparison(Probes("held_out", rows), "cpu", mode=mode)


@pytest.mark.parametrize("mode", ["whole", "layers"])
def test_certificate_of_the_chain(
    mode: Literal["whole", "layers"], chain: Chain, lineage: Lineage, tmp_path: Path
) -> None:
    output = Output("float32", max_shard_size=300_000)
    _, certificate = merge_certified(tmp_path, lineage, output, comparison(chain, mode), lambda _: None)
    assert (certificate.verdict, certificate.failures) == ("pass", [])
    assert certificate.logits is not None
    assert certificate.logits["relative_error"] <= 1e-6
    assert certificate.logits["loss"] == pytest.approx(certificate.logits["reference_loss"], rel=1e-5)
    assert certificate.parts == ["stories260k", "@sft", "@dpo"]
    assert verify_bytes(tmp_path, certificate.files) == []


def test_bit_that_flips_while_the_certificate_is_made(chain: Chain, lineage: Lineage, tmp_path: Path) -> None:
    shard = tmp_path / "model-00003-of-00004.safetensors"

    def flip(line: str) -> None:
        if "comparing" in line:
            whole = bytearray(shard.read_bytes())
            whole[-1] ^= 1
            shard.write_bytes(whole)

    output = Output("bfloat16", max_shard_size=150_000)
    _, certificate = merge_certified(tmp_path, lineage, output, comparison(chain, "whole"), flip)
    assert certificate.verdict == "fail"
    assert [failure for failure in certificate.failures if shard.name in failure]


def test_each_link_counts(chain: Chain, tmp_path: Path) -> None:
    for number, adapters in enumerate(([], chain.adapters[:1], chain.adapters[1:])):
        merge(chain.base, adapters, tmp_path / str(number), "float32")
        merged = load_merged(tmp_path / str(number), torch.float32)
        measured = compare_logits(logits_of(chain.in_use), logits_of(merged), chain.rows)
        assert len(failures(measured, Limits(relative_error=0.1, mean_kl=0.05, min_top1_agreement=0.7))) >= 2


def test_merge_of_nothing_tells_the_same_story(chain: Chain, tmp_path: Path) -> None:
    ids = json.loads((chain.base / "greedy_ids_from_bos.json").read_text())
    merge(chain.base, [], tmp_path / "out", "float32", max_shard_size=300_000)
    logits = tiny.load_base(tmp_path / "out")(input_ids=torch.tensor([ids])).logits[0]
    assert logits.argmax(-1)[:-1].tolist() == ids[1:]
