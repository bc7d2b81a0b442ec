"""Greedy answers against a loop written out by hand."""

from __future__ import annotations

import pytest
import torch
from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from posttrain.evaluation.batches import by_length
from posttrain.evaluation.generate import generate_answers

END = 257


@torch.inference_mode()
def greedy(model: LlamaForCausalLM, prompt: list[int], limit: int, end: int | None) -> tuple[list[int], bool]:
    """Argmax over the last logits of the whole sequence, nothing cached, nothing padded."""
    ids = list(prompt)
    for _ in range(limit):
        token = int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        if token == end:
            return ids[len(prompt) :], True
        ids.append(token)
    return ids[len(prompt) :], False


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 256, (length,), generator=generator).tolist() for length in (3, 9, 4, 17, 1, 9)]


@pytest.mark.parametrize("batch_tokens", [1, 60, 10_000])
def test_batches_answer_as_a_plain_loop_does(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[list[int]], batch_tokens: int
) -> None:
    expected = [greedy(model, prompt, 12, END) for prompt in prompts]
    answers = generate_answers(model, tokenizer, prompts, 12, [END], batch_tokens)
    assert [(answer.ids, answer.stopped) for answer in answers] == expected
    assert [answer.text for answer in answers] == [tokenizer.decode(ids) for ids, _ in expected]


def test_end_of_turn_stops_and_is_not_shown(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[list[int]]
) -> None:
    free, _ = greedy(model, prompts[1], 12, None)
    end = free[5]
    short = free[: free.index(end)]
    answer = generate_answers(model, tokenizer, prompts, 12, [end])[1]
    assert (answer.ids, answer.stopped) == (short, True)


def test_end_on_the_last_step_still_stops(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    free, _ = greedy(model, [5, 6, 7], 12, None)
    end = free[0]
    assert generate_answers(model, tokenizer, [[5, 6, 7]], 1, [end])[0].stopped
    assert not generate_answers(model, tokenizer, [[5, 6, 7]], 3, [])[0].stopped


def test_the_models_own_generation_config_has_no_say(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[list[int]]
) -> None:
    plain = generate_answers(model, tokenizer, prompts, 12, [END])
    before = model.generation_config
    loud = GenerationConfig(
        do_sample=True,
        temperature=5.0,
        repetition_penalty=9.0,
        no_repeat_ngram_size=1,
        forced_eos_token_id=END,
        suppress_tokens=[answer.ids[0] for answer in plain if answer.ids],
        min_new_tokens=12,
        eos_token_id=[1, 2, 3, END],
    )
    model.generation_config = loud
    try:
        assert generate_answers(model, tokenizer, prompts, 12, [END]) == plain
        assert model.generation_config is loud
    finally:
        model.generation_config = before


def test_other_special_tokens_stay_in_the_text(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = torch.tensor([[5, 256, 65, 1, END, END]])
    monkeypatch.setattr(model, "generate", lambda **_: made)
    answer = generate_answers(model, tokenizer, [[5]], 5, [END])[0]
    assert answer.ids == [256, 65, 1]
    assert answer.text.startswith("<|im_start|>")
    assert "<|im_end|>" not in answer.text


def test_batches_hold_every_row_once_within_the_limit() -> None:
    lengths = [3, 50, 7, 7, 2, 9, 120, 1]
    batches = by_length(lengths, 28)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    assert all(len(batch) * max(lengths[row] for row in batch) <= 28 or len(batch) == 1 for batch in batches)
    assert batches[0] == [6]
    assert by_length([], 8) == []
