"""A small tokenizer as Llama 2 and Mistral have: pieces with ▁, bytes as a fallback, a space before the text."""

from __future__ import annotations

import json

from chat_tiny import TEXTS
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def make_spm_tokenizer(special: list[str], **names: str) -> PreTrainedTokenizerFast:
    """Trains it; the bytes are pieces, not added tokens. Adds `bos_token` to plain text when it is given."""
    pieces = Tokenizer(models.BPE())
    pieces.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    lines = [line for text in TEXTS for line in text.splitlines()]  # as SentencePiece: no piece holds a newline
    pieces.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=300, show_progress=False))
    learnt = json.loads(pieces.to_str())["model"]
    tokens = dict.fromkeys(["<unk>", *BYTES, *learnt["vocab"]])
    backend = Tokenizer(
        models.BPE(
            vocab={token: number for number, token in enumerate(tokens)},
            merges=[tuple(merge) for merge in learnt["merges"]],
            byte_fallback=True,
            unk_token="<unk>",
            fuse_unk=True,
        )
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", *special])
    if "bos_token" in names:
        bos = names["bos_token"]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", **names)
