"""Log-probabilities against one unpadded forward pass per row."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from posttrain.chat.templates import load_template
from posttrain.data.rows import Origin, PairRow
from posttrain.evaluation.likelihood import PairScore, bits_per_byte, preference, token_logprobs
from tests.evaluation.tiny import make_model

ORIGIN = Origin("x.jsonl", 1)


@torch.inference_mode()
def reference(model: LlamaForCausalLM, ids: list[int]) -> np.ndarray:
    """log p of every token after the first, in float64."""
    logits = model(input_ids=torch.tensor([ids])).logits[0].double()
    return torch.log_softmax(logits[:-1], -1).gather(-1, torch.tensor(ids)[1:, None])[:, 0].numpy()


@pytest.fixture(scope="module")
def rows() -> list[tuple[list[int], list[int]]]:
    generator = torch.Generator().manual_seed(4)
    made = []
    for length, masked in ((5, 2), (31, 30), (12, 1), (12, 6), (2, 1), (20, 20), (1, 1)):
        ids = torch.randint(0, 258, (length,), generator=generator).tolist()
        made.append((ids, [-100] * masked + ids[masked:]))
    made[2][1][5] = -100  # a hole in the middle
    return made


@pytest.mark.parametrize("batch_tokens", [1, 40, 10_000])
def test_batches_equal_rows_alone(
    model: LlamaForCausalLM, rows: list[tuple[list[int], list[int]]], batch_tokens: int
) -> None:
    scores = token_logprobs(model, rows, batch_tokens)
    for (ids, labels), values in zip(rows, scores, strict=True):
        kept = [position - 1 for position, label in enumerate(labels) if label != -100]
        expected = reference(model, ids)[kept] if kept else np.empty(0)
        assert values.dtype == np.float32
        np.testing.assert_allclose(values, expected, atol=2e-5)


def test_many_positions_are_scored_in_parts(model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.randint(0, 258, (60,), generator=torch.Generator().manual_seed(9)).tolist()
    monkeypatch.setattr("posttrain.evaluation.likelihood._POSITIONS_AT_ONCE", 7)
    scores = token_logprobs(model, [(ids, [-100, *ids[1:]]), (ids[:9], [-100, *ids[1:9]])])
    np.testing.assert_allclose(scores[0], reference(model, ids), atol=2e-5)
    np.testing.assert_allclose(scores[1], reference(model, ids[:9]), atol=2e-5)


def test_rows_that_cannot_be_scored_are_refused(model: LlamaForCausalLM) -> None:
    with pytest.raises(ValueError, match="row 1"):
        token_logprobs(model, [([1, 2], [-100, 2]), ([1, 2], [1, 2])])
    with pytest.raises(ValueError, match="row 0"):
        token_logprobs(model, [([1, 2], [-100])])


def test_real_checkpoint_is_scored_as_it_generates(shared_dir: Path) -> None:
    """A trained model: the greedy continuation it is known for is what it finds likely, and uniform is not."""
    real = LlamaForCausalLM.from_pretrained(shared_dir / "data" / "stories260k", dtype=torch.float32).eval()
    ids = json.loads((shared_dir / "data" / "stories260k" / "greedy_ids_from_bos.json").read_text())[:200]
    shuffled = [ids[0], *reversed(ids[1:])]
    good, bad = token_logprobs(real, [(ids, [-100, *ids[1:]]), (shuffled, [-100, *shuffled[1:]])])
    assert good.mean() > -1.5
    assert bad.mean() < -5
    np.testing.assert_allclose(good, reference(real, ids), atol=1e-4)


def test_bits_per_byte_of_a_model_that_knows_nothing(tokenizer: PreTrainedTokenizerFast) -> None:
    flat = make_model(0)
    torch.nn.init.zeros_(flat.lm_head.weight)
    text = "Euskara! " * 4
    score = bits_per_byte(flat, tokenizer, [text, "é", ""], max_length=512)
    assert (score[0].text_bytes, score[0].tokens) == (36, 35)
    assert score[0].bits == pytest.approx(35 * math.log2(258), rel=1e-5)
    assert score[1].text_bytes == 2
    assert (score[2].bits, score[2].text_bytes, score[2].tokens) == (0, 0, 0)


def test_long_texts_are_windowed_without_losing_a_token(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    text = "abcdefghijklmnopqrstuvwxyz"
    whole = bits_per_byte(model, tokenizer, [text], max_length=26)[0]
    cut = bits_per_byte(model, tokenizer, [text], max_length=8)[0]
    ids = tokenizer(text)["input_ids"]
    windows = [reference(model, ids[start : start + 8]).sum() for start in (0, 7, 14, 21)]
    assert whole.tokens == cut.tokens == 25
    assert cut.bits == pytest.approx(-sum(windows) / math.log(2), rel=1e-5)
    assert whole.bits == pytest.approx(-reference(model, ids).sum() / math.log(2), rel=1e-5)


def pair(chosen: str, rejected: str) -> PairRow:
    def answer(text: str) -> list[dict[str, str]]:
        return [{"role": "assistant", "content": text}]

    return PairRow([{"role": "user", "content": "Hi"}], answer(chosen), answer(rejected), None, ORIGIN)


def test_pairs_are_scored_on_the_answer_and_its_end_of_turn(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    template = load_template("chatml", Path())
    pairs = [pair("yes", "no way"), pair("x" * 200, "y"), pair("same", "emas")]
    scores = preference(model, tokenizer, template, pairs, max_length=100, batch_tokens=64)
    assert scores[1] is None
    prompt = tokenizer("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
    for score, (chosen, rejected) in zip((scores[0], scores[2]), (("yes", "no way"), ("same", "emas")), strict=True):
        assert score is not None
        for text, total, tokens in (
            (chosen, score.chosen, score.chosen_tokens),
            (rejected, score.rejected, score.rejected_tokens),
        ):
            answer = tokenizer(text + "<|im_end|>")["input_ids"]
            assert tokens == len(answer) == len(text) + 1
            assert total == pytest.approx(reference(model, prompt + answer)[-len(answer) :].sum(), abs=1e-3)


def test_per_token_and_summed_preferences_may_part() -> None:
    score = PairScore(chosen=-10.0, rejected=-9.0, chosen_tokens=10, rejected_tokens=3)
    assert not score.prefers_chosen
    assert score.prefers_chosen_per_token
    assert not PairScore(-5.0, -5.0, 2, 2).prefers_chosen
