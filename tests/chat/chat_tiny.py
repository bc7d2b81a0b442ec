"""Tokenizers that the tests of the chat contract share."""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from posttrain.chat.templates import ChatTemplate, load_template

TEXTS = [
    "What is the capital of Spain? Madrid.\n\nZer da Euskadi? Herri bat.\n\n",
    "¿Qué es Cataluña? Una comunidad autónoma. Que é Galicia?\n\n  indented\n",
    "assistant user system assistant user system\n\n\n\n",
] * 20
SPECIAL = ["<s>", "</s>", "<|pad|>", "<|im_start|>", "<|im_end|>"]
WORDS = r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


def make_tokenizer(
    special: list[str], plain_added: tuple[str, ...] = (), words: str | None = WORDS, **names: str
) -> PreTrainedTokenizerFast:
    """Trains a small byte-level BPE tokenizer; adds `bos_token` to plain text when it is given.

    Words are split as in recent families (newlines stick together), or as in GPT-2 with `words=None`.
    """
    backend = Tokenizer(models.BPE())
    split = [] if words is None else [pre_tokenizers.Split(Regex(words), "isolated")]
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words is None)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*split, last])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS, trainer)
    backend.add_tokens([AddedToken(text, normalized=True) for text in plain_added])
    if "bos_token" in names:
        bos = names["bos_token"]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def bundled(name: str) -> ChatTemplate:
    """A bundled template."""
    return load_template(name, Path())
