"""The zoo's second house: special tokens, and how texts begin and end."""

from __future__ import annotations

import zoo_templates as templates
from zoo import EMBEDDING, HEAD, Specimen, defect, gemma, llama2, llama3, mistral, olmo, qwen, salamandra
from zoo_tokenizers import surround

# special tokens


@defect("pad-missing", mended=True)
def no_pad_but_a_spare_token() -> Specimen:
    it = llama3()
    del it.tokenizer_config["pad_token"]
    _unsay(it, "pad_token_id")
    return it


@defect("pad-missing", mended=True)
def no_pad_but_unk() -> Specimen:
    it = llama2()
    del it.tokenizer_config["pad_token"]
    _unsay(it, "pad_token_id")
    return it


@defect("pad-is-eos", mended=True)
def pad_is_end_of_turn() -> Specimen:
    it = llama3()
    it.tokenizer_config["pad_token"] = "<|eot_id|>"
    it.say(pad_token_id=it.id("<|eot_id|>"))
    return it


@defect("pad-is-eos", mended=True)
def pad_closes_every_turn() -> Specimen:
    it = olmo()
    it.tokenizer_config["pad_token"] = "<|endoftext|>"
    it.say(pad_token_id=it.id("<|endoftext|>"))
    return it


@defect("eos-missing", mended=True)
def no_eos_in_tokenizer() -> Specimen:
    it = qwen()
    del it.tokenizer_config["eos_token"]
    return it


@defect("end-of-turn-not-eos", mended=True)
def salamandra_stops_at_eos_only() -> Specimen:
    it = salamandra()
    it.tokenizer_config["eos_token"] = "</s>"
    it.say(eos_token_id=it.id("</s>"))
    return it


@defect("end-of-turn-not-eos", mended=True)
def generation_config_of_the_base() -> Specimen:
    it = gemma()
    assert it.generation is not None
    it.generation["eos_token_id"] = it.id("</s>")
    return it


@defect("end-of-turn-not-eos", mended=True)
def no_generation_config_and_config_of_the_base() -> Specimen:
    it = llama3()
    it.generation = None
    it.say(eos_token_id=it.id("<|end_of_text|>"))
    return it


@defect("end-of-turn-not-one-token", mended=True)
def turns_end_in_words() -> Specimen:
    it = olmo()
    it.replace("'<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n'", _HUMAN)
    it.replace("'<|assistant|>\\n'", "'### Assistant: '")
    return it


_HUMAN = "'### ' + message['role'].title() + ': ' + message['content'] + '\\n\\n'"


@defect("template-tokens-missing", mended=True, weights=True)
def chatml_without_its_tokens() -> Specimen:
    it = olmo()
    it.template = templates.CHATML
    return it


@defect("template-tokens-missing", mended=True, template="chatml", weights=True)
def chatml_chosen_for_a_base_with_spare_tokens() -> Specimen:
    """The tokens that nothing uses may become the template's."""
    it = olmo("<|extra_id_0|>", "<|extra_id_1|>")
    it.template = None
    return it


@defect("token-row-untrained", mended=True, weights=True)
def rows_of_zeros() -> Specimen:
    it = llama3()
    for name in ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"):
        it.tensors[EMBEDDING][it.id(name)] = 0
        it.tensors[HEAD][it.id(name)] = 0
    return it


@defect("token-row-untrained", mended=True, weights=True)
def rows_all_the_same() -> Specimen:
    """As rows are after `resize_token_embeddings`: copies of the mean."""
    it = qwen()
    mean = it.tensors[EMBEDDING].mean(axis=0)
    for name in ("<|im_start|>", "<|im_end|>"):
        it.tensors[EMBEDDING][it.id(name)] = mean
    return it


@defect("token-row-untrained", mended=True, weights=True)
def tiny_row() -> Specimen:
    it = salamandra()
    for matrix in (EMBEDDING, HEAD):
        it.tensors[matrix][it.id("<|im_end|>")] *= 1e-3
    return it


@defect("token-flags-eat-text")
def role_tokens_eat_newlines() -> Specimen:
    it = qwen()
    for entry in it.tokenizer["added_tokens"]:
        entry["rstrip"] = entry["content"] == "<|im_end|>"
    return it


@defect("unk-is-pad", mended=True, then="tokenizer-changes-text")
def unk_is_pad() -> Specimen:
    """With another pad token the texts are still what they are: full of unknowns."""
    it = salamandra()
    it.tokenizer["model"]["byte_fallback"] = False
    it.tokenizer_config["pad_token"] = "<unk>"
    it.say(pad_token_id=it.id("<unk>"))
    return it


@defect("tokenizer-changes-text")
def lower_case() -> Specimen:
    it = qwen()
    it.tokenizer["normalizer"] = {"type": "Lowercase"}
    return it


@defect("tokenizer-changes-text")
def compatibility_forms() -> Specimen:
    it = mistral()
    it.tokenizer["normalizer"] = {"type": "NFKC"}
    return it


@defect("tokenizer-changes-text")
def no_byte_fallback() -> Specimen:
    it = salamandra()
    it.tokenizer["model"]["byte_fallback"] = False
    return it


@defect("prefix-space")
def legacy_prefix_space() -> Specimen:
    it = mistral()
    steps = [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
    it.tokenizer |= {"normalizer": {"type": "Sequence", "normalizers": steps}, "pre_tokenizer": None}
    return it


# beginning and end of text


@defect("bos-doubled", mended=True)
def bos_written_twice() -> Specimen:
    it = llama3()
    it.replace("'<|start_header_id|>' +", "(bos_token if loop.first else '') + '<|start_header_id|>' +")
    return it


@defect("bos-not-in-template")
def salamandra_without_bos() -> Specimen:
    """A chat model that was trained so: it is not for the doctor to change."""
    it = salamandra()
    it.template = templates.CHATML
    return it


@defect("bos-not-in-template", mended=True, template="chatml")
def salamandra_base_with_chatml() -> Specimen:
    """A base model: its pretraining, which began every text with BOS, is all that it knows."""
    it = salamandra()
    it.template = None
    return it


@defect("bos-missing", mended=True)
def gemma_without_bos() -> Specimen:
    it = gemma()
    it.tokenizer["post_processor"] = None
    it.replace("{{- bos_token -}}", "")
    return it


@defect("bos-missing", mended=True)
def gemma_with_bos_in_plain_text_only() -> Specimen:
    it = gemma()
    it.replace("{{- bos_token -}}", "")
    return it


@defect("bos-missing", mended=True)
def llama_without_bos() -> Specimen:
    it = llama3()
    it.tokenizer["post_processor"] = None
    it.replace("{{- bos_token -}}", "")
    return it


@defect("bos-flag-lies", mended=True)
def flag_says_no_bos() -> Specimen:
    it = llama3()
    it.tokenizer_config["add_bos_token"] = False
    return it


@defect("bos-flag-lies", mended=True)
def flag_says_bos() -> Specimen:
    it = salamandra()
    it.tokenizer["post_processor"] = None
    it.tokenizer_config["add_bos_token"] = True
    return it


@defect("eos-appended", mended=True)
def eos_after_every_text() -> Specimen:
    it = olmo()
    surround(it.tokenizer, after=["<|endoftext|>"])
    return it


@defect("eos-appended", mended=True)
def eos_after_every_text_with_bos() -> Specimen:
    it = mistral()
    surround(it.tokenizer, before=["<s>"], after=["</s>"])
    return it


def _unsay(it: Specimen, key: str) -> None:
    for settings in (it.config, it.generation):
        if settings is not None:
            settings.pop(key, None)
