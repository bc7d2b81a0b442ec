"""Times our rendering and masking beside what TRL's SFTTrainer does for each row, in one process on one core.

    POSTTRAIN_SHARED=../shared python scripts/bench_rendering.py

Ours: `render_conversations` (ids, labels, spans, every check), as an sft stage calls it. TRL's:
`tokenizer.apply_chat_template(..., return_assistant_tokens_mask=True)` for each row, with TRL's training
template of the family. Both read the same conversations, all distinct: 10,000 from hh-rlhf, Alpaca and NTREX.
Times are processor seconds of one thread (ours would use all cores), medians of repeats in which the two
take turns.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from transformers import PreTrainedTokenizerFast

from posttrain.chat.jinja import Message
from posttrain.chat.render import MASKED, render_conversations
from posttrain.chat.templates import ChatTemplate, load_template
from posttrain.chat.tokenizer import load_any_tokenizer
from posttrain.data.read import SourceSpec, read_source
from posttrain.errors import ChatError

Conversation = list[Message]
Work = Callable[[list[Conversation]], list[tuple[list[int], list[int]]]]
"""Conversations -> ids and mask of each."""
TRANSLATIONS = [("src.eng", "ref.spa"), ("ref.cat", "ref.eus"), ("ref.glg", "ref.por"), ("ref.fra", "ref.spa-MX")]
"""Files of NTREX from which rows are made; no text stands in two of them."""
HEADERS = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


def read_conversations(shared: Path, count: int) -> list[Conversation]:
    """Returns so many distinct conversations of the real data, shuffled."""
    data = shared / "data"
    pairs = read_source(SourceSpec(data / "hh-rlhf/harmless-base_test.jsonl.gz"), "pair").rows
    found = [[*pair.prompt, *pair.chosen] for pair in pairs]
    alpaca = data / "llamafactory-demos/alpaca_en_demo.json"
    found += [row.messages for row in read_source(SourceSpec(alpaca), "chat").rows]
    for asked_in, said_in in TRANSLATIONS:
        sides = [(data / f"ntrex/newstest2019-{side}.txt").read_text(encoding="utf-8") for side in (asked_in, said_in)]
        for asked, said in zip(*map(str.splitlines, sides), strict=True):
            system = {"role": "system", "content": f"Translate into {said_in.removeprefix('ref.')}."}
            found.append([system, {"role": "user", "content": asked}, {"role": "assistant", "content": said}])
    distinct = list({json.dumps(messages, sort_keys=True): messages for messages in found}.values())
    random.Random(0).shuffle(distinct)
    print(f"{len(distinct):,} distinct conversations; {min(count, len(distinct)):,} are timed")
    return distinct[:count]


def llama3_like(qwen2: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Another vocabulary with Llama-3's 256 control tokens and its BOS."""
    qwen2.add_special_tokens(
        {
            "bos_token": HEADERS[0],
            "additional_special_tokens": [*HEADERS[1:], *(f"<|reserved_special_token_{n}|>" for n in range(251))],
        }
    )
    return qwen2


def trl_template(name: str) -> str:
    """The text of one of the installed TRL's templates (found without importing it)."""
    found = importlib.util.find_spec("trl")
    if found is None or found.origin is None:
        raise SystemExit("trl is not installed")
    return (Path(found.origin).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


def seconds(work: Work, conversations: list[Conversation]) -> float:
    """Processor seconds for all conversations."""
    begun = time.process_time()
    work(conversations)
    return time.process_time() - begun


def trl_way(tokenizer: PreTrainedTokenizerFast, template: str) -> Work:
    """What SFTTrainer does for each row with `assistant_only_loss`."""

    def render(messages: Conversation) -> tuple[list[int], list[int]]:
        found = tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        return found["input_ids"], found["assistant_masks"]

    return lambda conversations: [render(messages) for messages in conversations]


def our_way(tokenizer: PreTrainedTokenizerFast, template: ChatTemplate) -> Work:
    """What an sft stage does."""

    def render(conversations: list[Conversation]) -> list[tuple[list[int], list[int]]]:
        found = []
        for rows in render_conversations(tokenizer, template, ((messages, None) for messages in conversations)):
            if isinstance(rows, ChatError):
                raise rows
            found.append((rows[0].input_ids, rows[0].labels))
        return found

    return render


def compare(name: str, theirs: Work, ours: Work, rows: list[Conversation], repeats: int) -> None:
    """Prints both times per row, in how many rows both give the same ids, and how many tokens each trains."""
    pairs = list(zip(theirs(rows[:500]), ours(rows[:500]), strict=True))  # also warms both up
    same = sum(expected == found for (expected, _), (found, _) in pairs)
    marked = sum(sum(mask) for (_, mask), _ in pairs)
    trained = sum(label != MASKED for _, (_, labels) in pairs for label in labels)
    runs = [(seconds(theirs, rows), seconds(ours, rows)) for _ in range(repeats)]
    a, b = (statistics.median(column) / len(rows) * 1e6 for column in zip(*runs, strict=True))
    ratios = sorted(mine / other for other, mine in runs)
    print(
        f"{name:<28} TRL {a:6.0f} us/row   ours {b:6.0f} us/row   ours/TRL {b / a:.2f} "
        f"({ratios[0]:.2f} to {ratios[-1]:.2f})   same ids {same}/500   trained tokens {trained} (TRL {marked})"
    )


def show_growth(name: str, work: Work, rows: list[Conversation]) -> None:
    """Prints the time per row for more and more rows, and per turn for longer and longer conversations."""
    sizes = [size for size in (1000, 2000, 5000, 10000) if size <= len(rows)]
    per_row = [f"{size:,}: {seconds(work, rows[:size]) / size * 1e6:.0f}" for size in sizes]
    per_turn = []
    for turns in (2, 8, 32, 128):
        talks = [long_conversation(turns, number) for number in range(512 // turns)]
        spent = statistics.median(seconds(work, talks) for _ in range(3))
        per_turn.append(f"{turns}: {spent / 512 * 1e6:.0f}")
    print(f"{name:<28} us/row by rows {'  '.join(per_row)}   us/turn by turns {'  '.join(per_turn)}")


def long_conversation(turns: int, number: int) -> Conversation:
    """A conversation of so many turns, each of about 40 words that no other has."""
    draw = random.Random(f"{turns} {number}")
    said = [" ".join(f"{draw.choice('abcdefgh')}{draw.randrange(1000)}" for _ in range(40)) for _ in range(turns)]
    return [{"role": ("user", "assistant")[turn % 2], "content": text} for turn, text in enumerate(said)]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    shared = Path(os.environ.get("POSTTRAIN_SHARED", "../shared"))
    rows = read_conversations(shared, options.rows)
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.2f}; medians of {options.repeats}, processor time")
    qwen2 = load_any_tokenizer(shared / "tokenizers/qwen2")
    llama3 = llama3_like(load_any_tokenizer(shared / "tokenizers/qwen2"))
    bundled = {name: load_template(name, Path()) for name in ("qwen2.5", "llama3")}
    unmarked = ChatTemplate("qwen2.5 without marks", bundled["qwen2.5"].inference)
    theirs, ours = trl_way(qwen2, trl_template("qwen2_5_training")), our_way(qwen2, bundled["qwen2.5"])
    compare("qwen2.5 on Qwen2", theirs, ours, rows, options.repeats)
    other = trl_way(llama3, trl_template("llama3_training"))
    compare("llama3 on Llama-3's tokens", other, our_way(llama3, bundled["llama3"]), rows, options.repeats)
    show_growth("qwen2.5, TRL", theirs, rows)
    show_growth("qwen2.5, ours by marks", ours, rows)
    show_growth("qwen2.5, ours by offsets", our_way(qwen2, unmarked), rows)
    print(f"load {os.getloadavg()[0]:.2f} at the end")


if __name__ == "__main__":
    main()
