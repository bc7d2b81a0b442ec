"""A checkpoint as the doctor reads it: single rows of any dtype and shard, and little of large files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from zoo import EMBEDDING, HEAD, llama3, qwen
from zoo_tokenizers import surround, token_count

from posttrain.doctor.checkpoint import Checkpoint, find_checkpoint, listed, open_checkpoint, read_rows
from posttrain.errors import CheckpointError, UserError

MEASURE = """
import json, sys
from pathlib import Path
from posttrain.doctor.diagnose import diagnose
found = [finding.id for finding in diagnose(Path(sys.argv[1])).findings]
heavy = [name for name in ("torch", "datasets", "trl", "peft") if name in sys.modules]
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
print(json.dumps([found, heavy, int(status["VmHWM"].split()[0]) / 1024]))
"""


def measured(folder: Path) -> tuple[list[str], list[str], float]:
    """Diagnoses in a process of its own: (ids, heavy modules, MB at the most).

    The memory is VmHWM: the kernel's ru_maxrss of a child begins at what its parent held.
    """
    done = subprocess.run([sys.executable, "-c", MEASURE, str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found, heavy, megabytes = json.loads(done.stdout)
    return found, heavy, megabytes


@pytest.mark.parametrize(("dtype", "exact"), [("F32", True), ("BF16", False), ("F16", False)])
@pytest.mark.parametrize("shards", [1, 3])
def test_single_rows_of_any_dtype_and_shard(tmp_path, dtype, exact, shards):
    it = llama3()
    it.dtype, it.shards = dtype, shards
    it.write(tmp_path / "model")
    opened = Checkpoint(tmp_path / "model")
    for place, name in ((opened.embedding(), EMBEDDING), (opened.head(), HEAD)):
        rows = read_rows(place, [7, 0, 7])
        wanted = it.tensors[name][[7, 0, 7]]
        assert rows.dtype == np.float32
        assert rows.shape == wanted.shape
        assert (rows == wanted).all() if exact else np.allclose(rows, wanted, rtol=2**-7)


def test_what_the_files_say(tmp_path):
    it = qwen()
    it.write(tmp_path / "model")
    opened = open_checkpoint(tmp_path / "model")
    assert opened.rows == len(it.tensors[EMBEDDING])
    assert opened.tied
    assert opened.head() is None
    assert opened.stops == [it.id("<|im_end|>")]
    assert opened.template.source == it.template == opened.own_source
    head = {key: value for key, value in opened.tokenizer_json.items() if key != "model"}
    assert opened.tokenizer_head == head


def test_a_tokenizer_file_in_another_order_is_read_whole(tmp_path):
    it = qwen()
    it.tokenizer = {"model": it.tokenizer["model"]} | {k: v for k, v in it.tokenizer.items() if k != "model"}
    it.write(tmp_path / "model")
    assert open_checkpoint(tmp_path / "model").tokenizer_head["added_tokens"] == it.tokenizer["added_tokens"]


def test_ids_of_configs_are_one_several_or_none():
    assert (listed(None), listed(3), listed([3, 4])) == ([], [3], [3, 4])


def test_what_is_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"neither config\.json nor tokenizer files"):
        open_checkpoint(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="an adapter without a tokenizer"):
        open_checkpoint(tmp_path)
    with pytest.raises(UserError, match=r"runs/RECIPE/STAGE"):
        find_checkpoint("@sft")
    with pytest.raises(CheckpointError, match="no such folder"):
        find_checkpoint("./nowhere")


def sparse_70b(folder: Path) -> None:
    """A checkpoint of Llama-3-70B's shape whose files take no room: only the rows the template uses are written."""
    it = llama3()
    grown = 128_256 - token_count(it.tokenizer)
    first = min(entry["id"] for entry in it.tokenizer["added_tokens"])
    it.tokenizer["model"]["vocab"] |= {f"word{number}": number for number in range(first, first + grown)}
    for entry in it.tokenizer["added_tokens"]:
        entry["id"] += grown
    surround(it.tokenizer, ["<|begin_of_text|>"])
    it.say(**{f"{name}_token_id": it.config[f"{name}_token_id"] + grown for name in ("bos", "eos", "pad")})
    rows, width, inner, layers = 128_256, 8192, 28_672, 80
    it.config |= {"vocab_size": rows, "hidden_size": width, "num_hidden_layers": layers, "intermediate_size": inner}
    it.tensors, it.shards = {}, 1
    it.write(folder)
    (folder / "model.safetensors").unlink()
    attention = {"q_proj": (width, width), "k_proj": (1024, width), "v_proj": (1024, width), "o_proj": (width, width)}
    mlp = {"gate_proj": (inner, width), "up_proj": (inner, width), "down_proj": (width, inner)}
    shapes = {EMBEDDING: (rows, width), HEAD: (rows, width), "model.norm.weight": (width,)}
    for layer in range(layers):
        shapes |= {f"model.layers.{layer}.self_attn.{name}.weight": shape for name, shape in attention.items()}
        shapes |= {f"model.layers.{layer}.mlp.{name}.weight": shape for name, shape in mlp.items()}
    weight_map, names = {}, list(shapes)
    for shard in range(30):
        file = f"model-{shard + 1:05}-of-00030.safetensors"
        weight_map |= _write_sparse(folder / file, {name: shapes[name] for name in names[shard::30]}, it)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def _write_sparse(path: Path, shapes: dict[str, tuple[int, ...]], it) -> dict[str, str]:
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
        for name in {EMBEDDING, HEAD} & shapes.keys():
            width, begin = shapes[name][1], header[name]["data_offsets"][0]
            chance = np.random.default_rng(1)
            for token in it.tokenizer["added_tokens"]:
                file.seek(8 + len(text) + begin + token["id"] * width * 2)
                row = chance.normal(0, 0.02, width).astype("<f4").view("<u4") >> 16
                file.write(row.astype("<u2").tobytes())
    return dict.fromkeys(shapes, path.name)


def test_a_70b_checkpoint_takes_little_memory_and_no_torch(tmp_path):
    folder = tmp_path / "model"
    sparse_70b(folder)
    size = sum(path.stat().st_size for path in folder.iterdir())
    assert size > 130e9
    assert sum(os.stat(path).st_blocks * 512 for path in folder.iterdir()) < 100e6
    found, heavy, megabytes = measured(folder)
    assert (found, heavy) == ([], [])
    assert megabytes < 500


def test_a_tokenizer_alone_needs_no_torch(shared_dir):
    found, heavy, megabytes = measured(shared_dir / "tokenizers" / "mistral03")
    assert heavy == []
    assert found == ["pad-missing", "system-dropped", "roles-refused", "content-trimmed"]
    assert megabytes < 500
