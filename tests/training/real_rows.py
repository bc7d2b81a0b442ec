"""Real rows as tokens, by a small tokenizer trained on them: unequal lengths, and the corner cases."""

from __future__ import annotations

import functools
import gzip
import json
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE

from posttrain.pretraining.rows import IGNORE, Row, make_row
from posttrain.training.pairs import Pair
from tests.training.spine_tiny import END

MAX_LENGTH = 160
VOCABULARY = 256
"""Below the special tokens of `spine_tiny`."""


@functools.cache
def tokenizer_of(folder: Path) -> Tokenizer:
    """A byte-level BPE of 256 tokens, most of them single characters."""
    made = Tokenizer(BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, limit_alphabet=100, show_progress=False)
    texts = [text for row in _alpaca(folder)[:200] for text in (row["instruction"], row["output"])]
    made.train_from_iterator(texts, trainer)
    return made


def real_pairs(folder: Path, count: int) -> list[Pair]:
    """Pairs of hh-rlhf cut at `MAX_LENGTH` (one of exactly that), and four corner cases."""
    tokenizer, pairs = tokenizer_of(folder), []
    with gzip.open(folder / "data" / "hh-rlhf" / "harmless-base_test.jsonl.gz", "rt", encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            end = row["chosen"].rfind("\n\nAssistant:") + len("\n\nAssistant:")
            prompt, chosen, rejected = (
                np.array(tokenizer.encode(text).ids, dtype=np.int32)
                for text in (row["chosen"][:end], row["chosen"][end:], row["rejected"][end:])
            )
            room = MAX_LENGTH - len(prompt)
            if row["rejected"].startswith(row["chosen"][:end]) and room > 2 and len(chosen) and len(rejected):
                pairs.append(Pair(prompt, chosen[:room], rejected[:room]))
            if len(pairs) == count:
                break
    first = pairs[0]
    none = np.empty(0, dtype=np.int32)
    return [
        *pairs,
        Pair(none, first.chosen[:7], first.rejected[:9]),
        Pair(none, first.chosen[:1], first.rejected[3:9]),
        Pair(first.prompt[:6], first.chosen[:1], first.chosen[1:2]),
        Pair(first.prompt[:6], first.chosen[:4], first.chosen[:9]),  # one begins the other
    ]


def real_rows(folder: Path, count: int) -> list[Row]:
    """Rows of alpaca_en_demo cut at `MAX_LENGTH`; loss on the answer and the end of turn."""
    tokenizer, rows = tokenizer_of(folder), []
    for row in _alpaca(folder)[:count]:
        prompt, answer = tokenizer.encode(row["instruction"] + "\n").ids, [*tokenizer.encode(row["output"]).ids, END]
        labels = [IGNORE] * len(prompt) + answer
        rows.append(make_row((prompt + answer)[:MAX_LENGTH], labels[:MAX_LENGTH]))
    return rows


@functools.cache
def _alpaca(folder: Path) -> list[dict[str, str]]:
    path = folder / "data" / "llamafactory-demos" / "alpaca_en_demo.json"
    found: list[dict[str, str]] = json.loads(path.read_text(encoding="utf-8"))
    return found
