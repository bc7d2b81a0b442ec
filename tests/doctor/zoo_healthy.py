"""The healthy checkpoints of the zoo: nothing may be found in them."""

from __future__ import annotations

import json
from collections.abc import Callable
from hashlib import sha256

import numpy as np
import zoo_templates as templates
from zoo import EMBEDDING, HEAD, Specimen, gemma, llama2, llama3, mistral, olmo, qwen, salamandra


def tokenizer_only() -> Specimen:
    """A folder without model."""
    it = qwen()
    it.config = it.generation = None
    return it


def sharded() -> Specimen:
    """Weights in three files."""
    it = llama3()
    it.shards = 3
    return it


def untied() -> Specimen:
    """A Qwen of the larger sizes."""
    it = qwen()
    it.tensors[HEAD] = np.flip(it.tensors[EMBEDDING]).copy()
    it.config |= {"tie_word_embeddings": False}
    return it


def tied_and_saved_twice() -> Specimen:
    """The matrix is shared, and stands in the file under both names."""
    it = qwen()
    it.tensors[HEAD] = it.tensors[EMBEDDING].copy()
    return it


def padded_matrix() -> Specimen:
    """64 rows more than tokens, zeros as in Qwen's files."""
    it = qwen()
    it.tensors[EMBEDDING] = np.concatenate([it.tensors[EMBEDDING], np.zeros((64, it.tensors[EMBEDDING].shape[1]))])
    it.config |= {"vocab_size": len(it.tensors[EMBEDDING])}
    return it


def reserved_rows_untrained() -> Specimen:
    """Rows that no text and no template uses are zeros, as in Llama-3."""
    it = llama3()
    for number in range(4):
        it.tensors[EMBEDDING][it.id(f"<|reserved_special_token_{number}|>")] = 0
        it.tensors[HEAD][it.id(f"<|reserved_special_token_{number}|>")] = 0
    return it


def tools_and_reasoning() -> Specimen:
    """A template that writes everything, always."""
    it = qwen()
    it.template = templates.CHATML_TOOLS
    return it


def marked() -> Specimen:
    """Generation marks that hold answers and their ends."""
    it = qwen()
    it.template = templates.CHATML_MARKED
    return it


def no_generation_config() -> Specimen:
    """config.json alone says where to stop."""
    it = qwen()
    it.generation = None
    return it


def one_stop() -> Specimen:
    """generation_config.json names one id, not a list."""
    it = mistral()
    it.generation |= {"eos_token_id": it.id("</s>")}
    return it


def template_in_tokenizer_config() -> Specimen:
    """As folders were saved before there was chat_template.jinja."""
    it = qwen()
    it.tokenizer_config["chat_template"], it.template = it.template, None
    return it


def with_data() -> Specimen:
    """Conversations that fit: system, several turns, code, white space, other scripts."""
    it = qwen()
    talk = [
        {"role": "system", "content": "Answer shortly."},
        {"role": "user", "content": "  Write a loop.\n"},
        {"role": "assistant", "content": "    for x in y:\n        pass\n"},
        {"role": "user", "content": "Eskerrik asko! 😀 <think> 漢字"},
        {"role": "assistant", "content": "Ez horregatik."},
    ]
    it.rows = [{"messages": talk}, {"messages": talk[1:3]}, {"messages": talk[3:]}]
    return it


def old_files_that_agree() -> Specimen:
    """What older versions of transformers wrote beside, saying the same; and the record of a stage."""
    it = mistral()
    assert it.template is not None
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    added = {str(entry["id"]): {"content": entry["content"]} | flags for entry in it.tokenizer["added_tokens"]}
    eos = {"content": "</s>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    it.tokenizer_config |= {"added_tokens_decoder": added, "chat_template": it.template, "add_bos_token": True}
    named = {name: it.tokenizer_config[name] for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    it.tokenizer_config["eos_token"] = {"__type": "AddedToken"} | eos
    it.files["special_tokens_map.json"] = json.dumps(named | {"eos_token": eos})
    trained = it.template.encode()
    kept = {"chat_template.jinja": {"sha256": sha256(trained).hexdigest(), "bytes": len(trained)}}
    record = {"stage": "sft", "kind": "sft", "version": 1, "fingerprint": "0" * 64, "identity": {}, "format": 1}
    it.files["stage.json"] = json.dumps(record | {"files": kept})
    return it


def vision_model() -> Specimen:
    """The language model's config and weights stand one level deeper."""
    it = gemma()
    assert it.config is not None
    inner = it.config
    it.config = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": inner}
    it.config |= {"eos_token_id": inner.pop("eos_token_id"), "vision_config": {"hidden_size": 8}}
    it.tensors = {f"language_model.{name}": values for name, values in it.tensors.items()}
    return it


def two_stops() -> Specimen:
    """The tokenizer's eos is the base model's, generation stops at the end of turn too (SalamandraTA)."""
    it = salamandra()
    it.tokenizer_config["eos_token"] = "</s>"
    it.generation |= {"eos_token_id": [it.id("</s>"), it.id("<|im_end|>")]}
    it.config |= {"eos_token_id": it.id("</s>")}
    return it


HEALTHY: dict[str, Callable[[], Specimen]] = {
    build.__name__.replace("_", "-"): build
    for build in [
        qwen,
        llama3,
        olmo,
        mistral,
        salamandra,
        llama2,
        gemma,
        tokenizer_only,
        sharded,
        untied,
        tied_and_saved_twice,
        padded_matrix,
        reserved_rows_untrained,
        tools_and_reasoning,
        marked,
        no_generation_config,
        one_stop,
        template_in_tokenizer_config,
        with_data,
        old_files_that_agree,
        vision_model,
        two_stops,
    ]
}
