"""Trains a byte-level BPE tokenizer with reserved chat tokens."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from posttrain.errors import RecipeError

END = "<|endoftext|>"
PAD = "<|pad|>"
_SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def train_tokenizer(texts: Iterable[str], vocab_size: int, reserved_tokens: list[str], max_length: int, out: Path):
    """Trains a byte-level BPE tokenizer and saves it.

    Every Unicode text survives encode and decode. `<|endoftext|>` ends documents, `<|pad|>` pads; the
    reserved tokens come next in the vocabulary, and no text yields them unless it spells them.

    Args:
        texts: the training texts, read once.
        vocab_size: entries in all; fewer where the texts do not hold enough merges.
        max_length: written as `model_max_length`.
        out: folder for tokenizer.json and tokenizer_config.json.

    Returns:
        The `PreTrainedTokenizerFast`.

    Raises:
        RecipeError: the vocabulary has no room for bytes and special tokens.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = [END, PAD, *reserved_tokens]
    if vocab_size < 256 + len(special):
        needed = 256 + len(special)
        raise RecipeError("tokenizer.vocab_size", str(vocab_size), f"256 bytes and {len(special)} tokens need {needed}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, model_max_length=max_length, padding_side="right"
    )
    fast.save_pretrained(out)
    return fast
