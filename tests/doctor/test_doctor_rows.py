"""First values of rows: what they begin as, in every dtype, tied or not, in one shard or several; no matrix shrinks."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from zoo import EMBEDDING, HEAD, Specimen, llama3, olmo, qwen, read_tensors

from posttrain.doctor.checkpoint import Checkpoint, TensorPlace, read_rows
from posttrain.doctor.rows import DIFFERENCE, NewRow, _encode, first_values, rows_after, write_rows
from posttrain.errors import CheckpointError, UserError


def laid(tmp_path: Path, specimen: Specimen) -> Checkpoint:
    """A specimen as a folder, opened."""
    specimen.write(tmp_path / "model")
    return Checkpoint(tmp_path / "model")


def floats(checkpoint: Checkpoint, name: str) -> np.ndarray:
    """A whole matrix as float32."""
    place = Checkpoint(checkpoint.folder).tensors[name]
    return read_rows(place, range(place.shape[0]))


@pytest.mark.parametrize(
    ("rows", "highest", "after"),
    [(512, 100, 512), (512, 511, 512), (512, 512, 576), (520, 520, 528), (521, 521, 522), (128, 300, 320)],
)
def test_matrices_grow_by_what_they_were_padded_to_and_never_shrink(rows: int, highest: int, after: int) -> None:
    assert rows_after(rows, highest) == after


@pytest.mark.parametrize("build", [qwen, llama3, olmo], ids=["tied-bf16", "untied-f32", "untied-f16"])
@pytest.mark.parametrize("shards", [1, 3])
def test_new_rows_are_the_mean_of_their_sources_and_all_else_stays(tmp_path: Path, build, shards: int) -> None:
    specimen = build()
    specimen.shards = shards
    checkpoint = laid(tmp_path, specimen)
    before, rows = read_tensors(checkpoint.folder), specimen.tensors[EMBEDDING].shape[0]
    names = [name for name in (EMBEDDING, HEAD) if name in before]
    means = {name: floats(checkpoint, name)[[5, 9]].mean(axis=0) for name in names}
    new = [NewRow("<|one|>", 7, (5, 9)), NewRow("<|two|>", rows, (5, 9)), NewRow("<|three|>", rows + 1, ())]
    assert write_rows(checkpoint, new) == rows_after(rows, rows + 1)
    after = read_tensors(checkpoint.folder)
    assert after.keys() == before.keys()  # a tied model gets no output matrix
    for name, values in before.items():
        kept = np.delete(after[name][: len(values)], 7, axis=0) if name in names else after[name]
        np.testing.assert_array_equal(kept, np.delete(values, 7, axis=0) if name in names else values)
    for name in names:
        made = floats(checkpoint, name)
        assert len(made) == rows_after(rows, rows + 1)
        for number in (7, rows):
            ratio = np.linalg.norm(made[number] - means[name]) / np.linalg.norm(means[name])
            assert ratio == pytest.approx(DIFFERENCE, rel=0.05)
        assert (made[7] != made[rows]).any()
        usual = np.median(np.linalg.norm(made[:rows], axis=1))
        assert 0.5 < np.linalg.norm(made[rows + 1]) / usual < 2
        assert np.isfinite(made).all()


def test_the_index_of_shards_tells_the_new_size(tmp_path: Path) -> None:
    specimen = llama3()
    specimen.shards = 2
    checkpoint = laid(tmp_path, specimen)
    index = checkpoint.folder / "model.safetensors.index.json"
    old = json.loads(index.read_text())
    rows = specimen.tensors[EMBEDDING].shape[0]
    added = write_rows(checkpoint, [NewRow("<|x|>", rows, ())]) - rows
    new = json.loads(index.read_text())
    assert new["weight_map"] == old["weight_map"]
    assert new["metadata"]["total_size"] == old["metadata"]["total_size"] + 2 * 4 * added * 32


def test_a_shard_without_a_matrix_and_a_linked_source_are_left_alone(tmp_path: Path) -> None:
    specimen = qwen()
    specimen.shards = 3
    checkpoint = laid(tmp_path, specimen)
    files = sorted(checkpoint.folder.glob("*.safetensors"))
    for path in files:
        os.link(path, tmp_path / path.name)
    before = {path.name: path.read_bytes() for path in files}
    write_rows(checkpoint, [NewRow("<|x|>", 3, (4,))])
    assert {path.name: (tmp_path / path.name).read_bytes() for path in files} == before
    same = [path.name for path in files if os.path.samefile(path, tmp_path / path.name)]
    assert len(same) == 2
    assert not list(checkpoint.folder.glob(".*"))


def test_the_same_names_give_the_same_bytes(tmp_path: Path) -> None:
    made = []
    for home in ("one", "two"):
        checkpoint = laid(tmp_path / home, llama3())
        write_rows(checkpoint, [NewRow("<|im_start|>", 3, (40, 41)), NewRow("<|im_end|>", 4, (40, 41))])
        made.append((checkpoint.folder / "model.safetensors").read_bytes())
    assert made[0] == made[1]


def test_a_source_of_zeros_gives_no_row_of_zeros(tmp_path: Path) -> None:
    specimen = olmo()
    specimen.tensors[EMBEDDING][3] = specimen.tensors[HEAD][3] = 0
    checkpoint = laid(tmp_path, specimen)
    place = checkpoint.embedding()
    assert place is not None
    assert np.linalg.norm(first_values(place, [NewRow("x", 5, (3,))])) > 0.05


def test_the_bias_of_an_output_matrix_grows_with_it(tmp_path: Path) -> None:
    specimen = olmo()
    rows = specimen.tensors[HEAD].shape[0]
    specimen.tensors["lm_head.bias"] = np.linspace(-1, 1, rows, dtype=np.float32)
    checkpoint = laid(tmp_path, specimen)
    after = write_rows(checkpoint, [NewRow("<|x|>", rows, (2,))])
    bias = read_tensors(checkpoint.folder)["lm_head.bias"]
    assert bias.shape == (after,)
    assert bias[rows] == pytest.approx(bias[2], rel=2 * DIFFERENCE)


def test_bfloat16_is_rounded_as_torch_rounds() -> None:
    import torch

    bits = np.random.default_rng(1).integers(0, 2**32, 20_000, dtype=np.uint32)
    values = np.concatenate([bits.view(np.float32), np.array([0, -0.0, 1.00390625, 1.01171875], np.float32)])
    values = values[np.isfinite(values)]
    theirs = torch.from_numpy(values).bfloat16().view(torch.int16).numpy().view("<u2")
    np.testing.assert_array_equal(np.frombuffer(_encode(values, "BF16"), "<u2"), theirs)


def test_quantised_and_unequal_matrices_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uneven = llama3()
    uneven.tensors[HEAD] = uneven.tensors[HEAD][:-16]
    with pytest.raises(CheckpointError, match="only one of them was resized"):
        write_rows(laid(tmp_path / "uneven", uneven), [NewRow("<|x|>", 3, ())])
    checkpoint = laid(tmp_path / "quantised", qwen())
    place = checkpoint.embedding()
    assert place is not None
    odd = TensorPlace(place.name, place.file, "U8", place.shape, place.begin, place.end)
    monkeypatch.setattr(Checkpoint, "embedding", lambda _: odd)
    with pytest.raises(CheckpointError, match="before it was quantised"):
        write_rows(checkpoint, [NewRow("<|x|>", 3, ())])


def test_a_full_disk_is_told_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = laid(tmp_path, qwen())
    before = sorted(checkpoint.folder.iterdir())
    monkeypatch.setattr("posttrain.doctor.rows.shutil.disk_usage", lambda _: type("Usage", (), {"free": 10}))
    with pytest.raises(UserError, match="10 free"):
        write_rows(checkpoint, [NewRow("<|x|>", 3, ())])
    assert sorted(checkpoint.folder.iterdir()) == before
