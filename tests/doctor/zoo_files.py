"""The zoo's first house: files that are broken or contradict each other, and sizes that do not fit."""

from __future__ import annotations

import json
from hashlib import sha256

import zoo_templates as templates
from zoo import EMBEDDING, HEAD, Specimen, defect, llama3, mistral, olmo, qwen, salamandra
from zoo_tokenizers import add_token, token_count

# files


@defect("tokenizer-broken")
def tokenizer_cut_short() -> Specimen:
    it = qwen()
    it.files["tokenizer.json"] = json.dumps(it.tokenizer)[:-500]
    return it


@defect("tokenizer-broken", mended=True)
def merge_with_a_space() -> Specimen:
    """Merges as strings, one of which holds a piece with a space: three parts where two are expected."""
    it = salamandra()
    last = token_count(it.tokenizer)
    it.tokenizer["model"]["vocab"] |= {" ": last, "a ": last + 1}
    merges = [" ".join(pair) for pair in it.tokenizer["model"]["merges"]]
    it.tokenizer["model"]["merges"] = [*merges, "a  "]
    return it


@defect("tokenizer-broken")
def added_token_deleted_by_hand() -> Specimen:
    """The tokens after the gap would silently load under other ids than their rows have."""
    it = qwen()
    del it.tokenizer["added_tokens"][1]
    it.template = templates.ZEPHYR
    return it


@defect("truncation-baked-in", mended=True)
def truncation() -> Specimen:
    it = llama3()
    it.tokenizer["truncation"] = {"direction": "Right", "max_length": 12, "strategy": "LongestFirst", "stride": 0}
    return it


@defect("truncation-baked-in", mended=True)
def padding() -> Specimen:
    it = olmo()
    it.tokenizer["padding"] = {
        "strategy": {"Fixed": 32},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": it.id("<|padding|>"),
        "pad_type_id": 0,
        "pad_token": "<|padding|>",
    }
    return it


@defect("files-disagree", mended=True)
def two_templates() -> Specimen:
    it = qwen()
    it.tokenizer_config["chat_template"] = templates.ZEPHYR
    return it


@defect("files-disagree", mended=True)
def stale_special_tokens_map() -> Specimen:
    it = qwen()
    it.files["special_tokens_map.json"] = json.dumps({"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"})
    return it


@defect("files-disagree", mended=True)
def stale_added_tokens_decoder() -> Specimen:
    """tokenizer_config.json numbers the added tokens as another revision of the tokenizer did."""
    it = qwen()
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    start, end = it.id("<|im_start|>"), it.id("<|im_end|>")
    wrong = {str(start): {"content": "<|im_end|>"} | flags, str(end): {"content": "<|im_start|>"} | flags}
    it.tokenizer_config["added_tokens_decoder"] = wrong
    return it


@defect("no-template", mended=True)
def base_with_chat_tokens() -> Specimen:
    it = qwen()
    it.template = None
    return it


@defect("no-template", mended=True)
def base_without_chat_tokens() -> Specimen:
    it = olmo()
    it.template = None
    return it


@defect("no-default-template")
def named_templates_in_config() -> Specimen:
    it = qwen()
    it.template = None
    named = {"tool_use": templates.CHATML_TOOLS, "rag": templates.CHATML}
    it.tokenizer_config["chat_template"] = [{"name": name, "template": text} for name, text in named.items()]
    return it


@defect("no-default-template")
def named_templates_in_a_folder() -> Specimen:
    it = qwen()
    it.template = None
    it.files["chat_templates/tool_use.jinja"] = templates.CHATML_TOOLS
    it.files["chat_templates/rag.jinja"] = templates.CHATML
    return it


@defect("template-broken")
def template_without_endfor() -> Specimen:
    it = qwen()
    it.replace("{%- endfor -%}", "")
    return it


@defect("template-broken")
def template_of_another_framework() -> Specimen:
    """It loops over what only the author's own tool passes."""
    it = qwen()
    it.replace("in messages", "in conversation.turns")
    return it


@defect("template-not-as-trained")
def template_changed_after_training() -> Specimen:
    it = qwen()
    trained = templates.CHATML_TOOLS.encode()
    kept = {"chat_template.jinja": {"sha256": sha256(trained).hexdigest(), "bytes": len(trained)}}
    record = {"stage": "sft", "kind": "sft", "version": 1, "fingerprint": "0" * 64, "identity": {}, "format": 1}
    it.files["stage.json"] = json.dumps(record | {"files": kept})
    return it


# sizes


@defect("id-out-of-range", mended=True)
def pad_of_minus_one() -> Specimen:
    it = llama3()
    it.say(pad_token_id=-1)
    return it


@defect("id-out-of-range", mended=True)
def stop_of_another_model() -> Specimen:
    it = llama3()
    assert it.generation is not None
    it.generation["eos_token_id"].append(128009)
    return it


@defect("rows-fewer-than-tokens", mended=True, weights=True)
def tokens_added_without_rows() -> Specimen:
    it = llama3()
    for number in range(40):
        add_token(it.tokenizer, f"<|place_{number}|>")
    return it


@defect("rows-fewer-than-tokens", mended=True, weights=True)
def tokens_added_without_rows_tied() -> Specimen:
    it = qwen()
    for number in range(40):
        add_token(it.tokenizer, f"<|place_{number}|>")
    return it


@defect("tied-weights-differ", mended=True)
def untied_by_training() -> Specimen:
    it = qwen()
    it.tensors[HEAD] = it.tensors[EMBEDDING] * 1.5 + 0.001
    return it


@defect("max-length-unset", mended=True)
def length_of_1e30() -> Specimen:
    it = mistral()
    it.tokenizer_config["model_max_length"] = 1000000000000000019884624838656
    return it


@defect("max-length-unset", mended=True)
def length_of_512() -> Specimen:
    it = mistral()
    it.tokenizer_config["model_max_length"] = 512
    return it
