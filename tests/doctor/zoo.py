"""Small checkpoints, healthy or with exactly one defect, built without any code of `posttrain`.

A `Specimen` is a checkpoint in memory; `write` lays it down as a model folder: tokenizer.json,
tokenizer_config.json, chat_template.jinja, config.json, generation_config.json, safetensors.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import zoo_templates as templates
from zoo_tokenizers import Spec, byte_level, sentencepiece, surround, token_count, token_id

WIDTH = 32
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_DTYPES = {"BF16": "<u2", "F16": "<f2", "F32": "<f4"}


@dataclass
class Specimen:
    """A checkpoint before it is written; defects are put in by changing it."""

    tokenizer: Spec
    tokenizer_config: dict[str, Any]
    template: str | None
    config: dict[str, Any] | None
    """None: a folder with a tokenizer only."""
    generation: dict[str, Any] | None
    tensors: dict[str, np.ndarray]
    """Name -> float32 values."""
    dtype: str = "F32"
    shards: int = 1
    files: dict[str, str] = field(default_factory=dict)
    """Further files: relative path -> text. They are written last."""
    rows: list[dict[str, Any]] | None = None
    """Rows of a data file beside the folder."""

    def id(self, token: str) -> int:
        """Id of a token."""
        return token_id(self.tokenizer, token)

    def replace(self, old: str, new: str, count: int = -1) -> None:
        """Changes a piece of the template that must be there, everywhere or `count` times."""
        assert self.template is not None
        assert old in self.template, old
        self.template = self.template.replace(old, new, count)

    def say(self, **fields: Any) -> None:
        """Sets fields in config.json and generation_config.json alike."""
        for settings in (self.config, self.generation):
            if settings is not None:
                settings |= fields

    def write(self, folder: Path) -> None:
        """Writes the folder, and `<folder>.jsonl` beside it where there are rows of data."""
        folder.mkdir(parents=True)
        (folder / "tokenizer.json").write_text(json.dumps(self.tokenizer, ensure_ascii=False), encoding="utf-8")
        for name, value in {
            "tokenizer_config.json": self.tokenizer_config,
            "config.json": self.config,
            "generation_config.json": self.generation,
        }.items():
            if value is not None:
                (folder / name).write_text(json.dumps(value, indent=2), encoding="utf-8")
        if self.template is not None:
            (folder / "chat_template.jinja").write_text(self.template, encoding="utf-8")
        if self.config is not None:
            _write_weights(folder, self.tensors, self.dtype, self.shards)
        for name, text in self.files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8")
        if self.rows is not None:
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows]
            data_file(folder).write_text("".join(lines), encoding="utf-8")


def data_file(folder: Path) -> Path:
    """Where the data of a specimen lie."""
    return folder.with_suffix(".jsonl")


def read_tensors(folder: Path) -> dict[str, np.ndarray]:
    """Reads every tensor of a folder, as the stored words (BF16 stays uint16)."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        blob = path.read_bytes()
        start = 8 + int.from_bytes(blob[:8], "little")
        for name, entry in json.loads(blob[8:start]).items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                words = np.frombuffer(blob[start + begin : start + end], _DTYPES[entry["dtype"]])
                found[name] = words.reshape(entry["shape"])
    return found


def _write_weights(folder: Path, tensors: dict[str, np.ndarray], dtype: str, shards: int) -> None:
    names = list(tensors)
    if shards == 1:
        _write_safetensors(folder / "model.safetensors", tensors, dtype)
        return
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in names[shard::shards]}
        _write_safetensors(folder / file, part, dtype)
        weight_map |= dict.fromkeys(part, file)
    size = sum(tensor.size for tensor in tensors.values()) * np.dtype(_DTYPES[dtype]).itemsize
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _write_safetensors(path: Path, tensors: dict[str, np.ndarray], dtype: str) -> None:
    header, blobs, end = {}, [], 0
    for name, values in tensors.items():
        blob = _words(values, dtype).tobytes()
        header[name] = {"dtype": dtype, "shape": list(values.shape), "data_offsets": [end, end + len(blob)]}
        blobs.append(blob)
        end += len(blob)
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(blobs))


def _words(values: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "BF16":  # the upper half of a float32
        return (values.astype("<f4").view("<u4") >> 16).astype("<u2")
    return values.astype(_DTYPES[dtype])


def _tokenizer_config(**names: Any) -> dict[str, Any]:
    fixed = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    return fixed | {"model_max_length": 2048} | names


def _model(family: str, tokenizer: Spec, tied: bool, **ids: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Config and weights of a one-layer model with as many rows as the tokenizer needs, and up to 15 more."""
    rows = -(-token_count(tokenizer) // 16) * 16
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": family,
        "vocab_size": rows,
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": tied,
    }
    chance = np.random.default_rng(rows)
    shapes = {EMBEDDING: (rows, WIDTH), "model.layers.0.self_attn.q_proj.weight": (WIDTH, WIDTH)}
    shapes |= {"model.norm.weight": (WIDTH,)} | ({} if tied else {HEAD: (rows, WIDTH)})
    tensors = {name: chance.normal(0, 0.02, shape).astype(np.float32) for name, shape in shapes.items()}
    return config | ids, tensors


def _generation(*stops: int, **ids: Any) -> dict[str, Any]:
    return {"do_sample": True, "eos_token_id": list(stops)} | ids


def qwen() -> Specimen:
    """As Qwen: byte-level, ChatML tokens after the vocabulary, no BOS, tied, bfloat16."""
    spec = byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    pad, end = token_id(spec, "<|endoftext|>"), token_id(spec, "<|im_end|>")
    config, tensors = _model("qwen2", spec, tied=True, eos_token_id=end, pad_token_id=pad)
    names = _tokenizer_config(eos_token="<|im_end|>", pad_token="<|endoftext|>")
    return Specimen(spec, names, templates.CHATML, config, _generation(end, pad_token_id=pad), tensors, dtype="BF16")


def llama3() -> Specimen:
    """As Llama-3: BOS from the post-processor and from the template, several stops, reserved tokens, untied."""
    headers = ["<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>"]
    reserved = [f"<|reserved_special_token_{number}|>" for number in range(4)]
    spec = byte_level(["<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>", *headers, *reserved])
    surround(spec, ["<|begin_of_text|>"])
    bos, pad, end = (token_id(spec, name) for name in ("<|begin_of_text|>", "<|finetune_right_pad_id|>", "<|eot_id|>"))
    stops = [end, token_id(spec, "<|end_of_text|>"), token_id(spec, "<|eom_id|>")]
    config, tensors = _model("llama", spec, tied=False, bos_token_id=bos, eos_token_id=end, pad_token_id=pad)
    names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "pad_token": "<|finetune_right_pad_id|>"}
    generation = _generation(*stops, bos_token_id=bos, pad_token_id=pad)
    return Specimen(spec, _tokenizer_config(**names), templates.LLAMA3, config, generation, tensors)


def olmo(*spare: str) -> Specimen:
    """As OLMo-2 with Zephyr's layout: no chat tokens, eos closes every turn, nothing ever writes BOS."""
    spec = byte_level(["<|endoftext|>", "<|padding|>", *spare])
    end, pad = token_id(spec, "<|endoftext|>"), token_id(spec, "<|padding|>")
    config, tensors = _model("olmo2", spec, tied=False, eos_token_id=end, pad_token_id=pad)
    names = _tokenizer_config(eos_token="<|endoftext|>", pad_token="<|padding|>")
    return Specimen(spec, names, templates.ZEPHYR, config, _generation(end, pad_token_id=pad), tensors, dtype="F16")


def mistral() -> Specimen:
    """As Mistral v7: SentencePiece, `</s>` after answers, BOS from post-processor and template."""
    blocks = ["[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"]
    spec = sentencepiece(["<unk>", "<s>", "</s>", "<pad>", *blocks])
    return _spm("mistral", spec, templates.MISTRAL, eos="</s>")


def salamandra() -> Specimen:
    """As Salamandra with a clean template: SentencePiece, 0 unk, 1 bos, 2 eos, 4 and 5 ChatML."""
    spec = sentencepiece(["<unk>", "<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>"])
    return _spm("llama", spec, templates.CHATML_BOS, eos="<|im_end|>")


def llama2() -> Specimen:
    """As Llama-2: three special tokens, the pad is `<unk>`, which bytes keep out of every text."""
    spec = sentencepiece(["<unk>", "<s>", "</s>"])
    return _spm("llama", spec, templates.ZEPHYR_BOS, eos="</s>", pad="<unk>")


def gemma() -> Specimen:
    """As Gemma: SentencePiece, tied, BOS is a must."""
    spec = sentencepiece(["<pad>", "</s>", "<s>", "<unk>", "<start_of_turn>", "<end_of_turn>"])
    specimen = _spm("gemma2", spec, templates.GEMMA, eos="<end_of_turn>", tied=True)
    assert specimen.generation is not None
    specimen.generation["eos_token_id"] = [specimen.id("<end_of_turn>"), specimen.id("</s>")]
    return specimen


def _spm(family: str, spec: Spec, template: str, eos: str, tied: bool = False, pad: str = "<pad>") -> Specimen:
    surround(spec, ["<s>"])
    ids = {"bos_token_id": token_id(spec, "<s>"), "pad_token_id": token_id(spec, pad)}
    config, tensors = _model(family, spec, tied, eos_token_id=token_id(spec, eos), **ids)
    names = {"bos_token": "<s>", "eos_token": eos, "pad_token": pad, "unk_token": "<unk>"}
    generation = _generation(token_id(spec, eos), **ids)
    return Specimen(spec, _tokenizer_config(**names), template, config, generation, tensors)


@dataclass(frozen=True)
class Entry:
    """One checkpoint of the zoo."""

    id: str
    """Of the defect, as in `posttrain.doctor.catalogue`."""
    build: Callable[[], Specimen]
    mended: bool
    """Whether `fix` leaves nothing to find."""
    template: str | None = None
    """What `--template` names."""
    weights: bool = False
    """Whether mending may write into the matrices."""
    then: str = ""
    """What is found once this is mended, and cannot be."""


DEFECTS: dict[str, Entry] = {}


def defect(
    id: str, mended: bool = False, template: str | None = None, weights: bool = False, then: str = ""
) -> Callable[[Callable[[], Specimen]], Callable[[], Specimen]]:
    """Enters what a function builds into `DEFECTS`, under the function's name."""

    def enter(build: Callable[[], Specimen]) -> Callable[[], Specimen]:
        name = build.__name__.strip("_").replace("_", "-")
        assert name not in DEFECTS, name
        DEFECTS[name] = Entry(id, build, mended, template, weights, then)
        return build

    return enter
