"""The contract: end of turn found by rendering, everything made to agree, the saved folder proved."""

from __future__ import annotations

import json

import pytest
from chat_tiny import SPECIAL, bundled, make_tokenizer
from transformers import GenerationConfig, LlamaConfig

from posttrain.chat.contract import (
    EndOfTurn,
    agree,
    control_tokens,
    end_of_turn,
    probe_ids,
    required_tokens_missing,
    verify_saved,
)
from posttrain.chat.templates import ChatTemplate, own_template
from posttrain.chat.tokenizer import load_any_tokenizer
from posttrain.errors import ChatError

PHI = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% else %}{{ eos_token }}{% endif %}"
)


def configs(tokenizer, **fields):
    """A config and a generation config as a base model has them."""
    fields = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id} | fields
    return LlamaConfig(**fields), GenerationConfig(eos_token_id=fields["eos_token_id"])


def saved(tokenizer, template, folder):
    """Makes a folder agree and saves its JSON files; returns the probe."""
    config, generation = configs(tokenizer)
    agree(tokenizer, template, config, generation)
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": generation.eos_token_id}))
    return probe_ids(tokenizer, template)


def test_end_of_turn_is_found_by_rendering(rich_tokenizer):
    ids = dict(zip(SPECIAL, range(len(SPECIAL)), strict=True))
    assert end_of_turn(rich_tokenizer, bundled("chatml")) == EndOfTurn("<|im_end|>", ids["<|im_end|>"])
    assert end_of_turn(rich_tokenizer, bundled("tulu")) == EndOfTurn("</s>", ids["</s>"])
    assert end_of_turn(rich_tokenizer, ChatTemplate("phi", PHI)).text == "<|im_end|>"


def test_end_of_turn_must_be_one_token_and_close_every_answer(tokenizer):
    with pytest.raises(ChatError, match=r"<\|eot_id\|>"):
        end_of_turn(tokenizer, bundled("llama3"))
    words = ChatTemplate("own", "{% for m in messages %}{{ m.role + m.content + '###' }}{% endfor %}")
    with pytest.raises(ChatError, match="'###user'"):
        end_of_turn(tokenizer, words)
    glm = ChatTemplate("glm", "{% for m in messages %}{{ '<|im_start|>' + m.role + m.content }}{% endfor %}")
    with pytest.raises(ChatError, match="only when something follows"):
        end_of_turn(tokenizer, glm)
    assert required_tokens_missing(tokenizer, bundled("llama3"))[0] == "bos_token"
    assert required_tokens_missing(tokenizer, bundled("chatml")) == []


def test_tokens_the_template_writes(rich_tokenizer):
    ids = dict(zip(SPECIAL, range(len(SPECIAL)), strict=True))
    assert control_tokens(rich_tokenizer, bundled("chatml")) == [
        (text, ids[text]) for text in ("<|im_start|>", "<|im_end|>")
    ]
    assert [text for text, _ in control_tokens(rich_tokenizer, bundled("plain"))] == ["<s>", "</s>"]


@pytest.mark.contract(number=7)
def test_agree_sets_everything_and_says_so_once(tokenizer):
    config, generation = configs(tokenizer)
    template = bundled("chatml")
    said = agree(tokenizer, template, config, generation)
    end, old, pad = (tokenizer.convert_tokens_to_ids(text) for text in ("<|im_end|>", "</s>", "<|pad|>"))
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.chat_template == template.inference
    assert (config.eos_token_id, generation.eos_token_id) == (end, [end, old])
    assert (tokenizer.pad_token_id, config.pad_token_id, generation.pad_token_id) == (pad, pad, pad)
    assert any("</s>" in line and "<|im_end|>" in line for line in said)
    assert agree(tokenizer, template, config, generation) == []


def test_agree_keeps_an_eos_that_the_template_writes_itself(tokenizer):
    config, generation = configs(tokenizer)
    agree(tokenizer, ChatTemplate("phi", PHI), config, generation)
    assert tokenizer.eos_token == "</s>"
    assert generation.eos_token_id == tokenizer.convert_tokens_to_ids(["<|im_end|>", "</s>"])


def test_agree_notes_a_bos_that_conversations_lack(rich_tokenizer):
    config, generation = configs(rich_tokenizer)
    assert any("begins with '<s>'" in line for line in agree(rich_tokenizer, bundled("chatml"), config, generation))
    assert config.bos_token_id == rich_tokenizer.bos_token_id
    config, generation = configs(rich_tokenizer)
    assert not any("note" in line for line in agree(rich_tokenizer, bundled("llama3"), config, generation))


def test_tokens_without_an_embedding_row_are_refused(tokenizer):
    config, generation = configs(tokenizer, vocab_size=4)
    with pytest.raises(ChatError, match=r"4 embedding rows.*<\|im_end\|> \(4\)"):
        agree(tokenizer, bundled("chatml"), config, generation)


@pytest.mark.parametrize(
    ("special", "names", "expected"),
    [
        (["</s>", "<|im_start|>", "<|im_end|>", "<|reserved_0|>"], {}, "<|reserved_0|>"),
        (["</s>", "<|im_start|>", "<|im_end|>", "<|reserved_0|>", "[PAD]"], {}, "[PAD]"),
        (["<unk>", "</s>", "<|im_start|>", "<|im_end|>"], {"unk_token": "<unk>"}, "<unk>"),
        (["</s>", "<|im_start|>", "<|im_end|>"], {}, "</s>"),
        (["</s>", "<|im_start|>", "<|im_end|>", "[PAD]"], {"pad_token": "<|im_end|>"}, "[PAD]"),
    ],
)
def test_pad_is_chosen_among_the_tokens_there_are(special, names, expected):
    tokenizer = make_tokenizer(special, eos_token="</s>", **names)
    size = len(tokenizer)
    agree(tokenizer, bundled("chatml"), *configs(tokenizer))
    assert (tokenizer.pad_token, len(tokenizer)) == (expected, size)


def test_pad_without_an_embedding_row_is_replaced():
    tokenizer = make_tokenizer(SPECIAL, eos_token="</s>", pad_token="<|pad|>")
    rows = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[NEWPAD]"})
    agree(tokenizer, bundled("chatml"), *configs(tokenizer, vocab_size=rows))
    assert tokenizer.pad_token == "<|pad|>"


def test_saved_folder_is_proved(tokenizer, tmp_path):
    template = bundled("chatml")
    probe = saved(tokenizer, template, tmp_path)
    end = end_of_turn(tokenizer, template).id
    verify_saved(tmp_path, template.digest, {end}, probe)
    verify_saved(tmp_path, template.digest, None, probe)
    with pytest.raises(ChatError, match="never trained"):
        verify_saved(tmp_path, template.digest, {end + 1}, probe)
    with pytest.raises(ChatError, match="other ids"):
        verify_saved(tmp_path, template.digest, {end}, [*probe, 0])
    with pytest.raises(ChatError, match="digest"):
        verify_saved(tmp_path, bundled("tulu").digest, {end}, probe)


@pytest.mark.contract(number=7)
@pytest.mark.parametrize("stops", [None, 1, [1]])
def test_saved_folder_that_does_not_stop_is_refused(tokenizer, tmp_path, stops):
    probe = saved(tokenizer, bundled("chatml"), tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
    with pytest.raises(ChatError, match="lacks the end of turn"):
        verify_saved(tmp_path, bundled("chatml").digest, None, probe)


@pytest.mark.parametrize("name", ["chat_template.jinja", "generation_config.json", "tokenizer.json"])
def test_saved_folder_with_a_file_missing_is_refused(tokenizer, tmp_path, name):
    probe = saved(tokenizer, bundled("chatml"), tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(ChatError, match=name.replace(".", r"\.")):
        verify_saved(tmp_path, bundled("chatml").digest, None, probe)


def test_saved_folder_is_read_alike_by_plain_transformers(tokenizer, tmp_path):
    probe = saved(tokenizer, bundled("chatml"), tmp_path)
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(tmp_path)
    chat = [{"role": "user", "content": "Zer da?"}]
    ours = loaded.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert probe_ids(loaded, own_template(loaded.chat_template, "saved")) == probe
    assert loaded.decode(ours) == "<|im_start|>user\nZer da?<|im_end|>\n<|im_start|>assistant\n"


def test_phi3_stops_at_its_end_of_turn(shared_dir):
    real = load_any_tokenizer(shared_dir / "tokenizers" / "phi-3-mini")
    config, generation = LlamaConfig(vocab_size=32064, eos_token_id=32000), GenerationConfig(eos_token_id=32000)
    agree(real, own_template(real.chat_template, "phi-3"), config, generation)
    assert generation.eos_token_id == [32007, 32000]
    assert real.eos_token == "<|endoftext|>"
