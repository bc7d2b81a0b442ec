"""`dpo`: preference optimisation of a full model or an adapter, against the policy it starts from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from posttrain.certify.reference import loss_at_zero, step_zero_problems
from posttrain.chat.render import render_pair
from posttrain.chat.system import fold_system
from posttrain.data.rows import PairRow
from posttrain.errors import ChatError, Interrupted, StageError
from posttrain.models.attention import check_isolation
from posttrain.models.lineage import lineage_of
from posttrain.models.load import DTYPE_NAMES
from posttrain.pretraining.rows import IGNORE
from posttrain.recipe.schema import Data, Dpo
from posttrain.stages.context import Context, Summary
from posttrain.stages.conversation import Chat, open_chat, settle
from posttrain.stages.outputs import model_files, write_ledger, write_probes
from posttrain.stages.parents import resolve_method
from posttrain.stages.prepare import Prepared, Refused, Schedule, Tokenised, prepare, schedule_rows
from posttrain.stages.run_loop import run_loop, stage_arguments, training_metrics
from posttrain.stages.setup import Machine, assert_trainable, model_folder, set_up
from posttrain.stages.sft import prove_saved, save_policy
from posttrain.stages.trainable import Policy, load_trainable
from posttrain.training.dpo import SpineDpoTrainer, build_dpo_trainer, dpo_step
from posttrain.training.limits import Limits, piece_limits
from posttrain.training.pairs import Pair, pad_pairs
from posttrain.training.reference import reference_key, reference_logps


def run(config: Dpo, context: Context) -> Summary:
    """Trains on preference pairs; aborts before the first step when policy and reference are not the same."""
    machine = set_up(context)
    given = context.inputs["model"]
    parents = lineage_of(model_folder(given), given.ref)
    method = resolve_method(config.method, parents, context.stage)
    chat = open_chat(parents, config.chat_template, context)
    prepared = prepare(config.data, context, "pair", lambda rows: tokenise(rows, chat, config.data), prompt_of)
    schedule = schedule_rows(prepared, context.trainer, context.seed)
    write_ledger(context.folder, prepared.ledger)
    context.events("phase", text="loading the model")
    policy = load_trainable(parents, method, machine, context, [], chat.tokenizer.get_vocab())
    settle(chat, policy.model, context)
    trained, total = assert_trainable(policy.model, context.stage)
    check_isolation(policy.model, len(chat.tokenizer))
    limits = piece_limits(machine.device, context.runtime.micro_batch_tokens, context.runtime.micro_batch_size)
    trainer = build_dpo_trainer(
        policy.model, chat.tokenizer, stage_arguments(context, machine, schedule.steps), limits.row_tokens
    )
    references = _references(trainer, prepared, chat, policy, limits, machine, context)
    losses, pad = list(trainer.loss_types), chat.tokenizer.pad_token_id

    def make_step(step: int) -> Any:
        pairs, known = _with_references(schedule, prepared, references, step)
        return dpo_step(pairs, known, pad, limits.tokens, limits.documents, losses)

    proof = _prove_step_zero(trainer, schedule, prepared, references, make_step, pad, context)
    result = run_loop(
        trainer,
        context,
        prepared,
        schedule,
        make_step,
        config.snapshots,
        lambda folder: save_policy(policy, chat, machine, folder),
    )
    context.events("phase", text="saving")
    save_policy(policy, chat, machine, context.folder)
    last_ids = {int(pair.chosen[-1]) for rows in prepared.rows for pair in rows}
    prove_saved(policy, chat, context.folder, last_ids)
    write_probes(context.folder, prepared, _chosen)
    return Summary(
        headline=f"{policy.kind}: {result.steps} steps, loss {result.first_loss:.3f} -> {result.last_loss:.3f}",
        files=model_files(context.folder),
        metrics=training_metrics(result, trained, total, {"step_zero": proof, "chat": chat.as_dict()}),
        lineage=policy.lineage_after(context),
        ledger=prepared.ledger.as_dict(),
    )


def tokenise(rows: list[PairRow], chat: Chat, data: Data) -> Iterator[Tokenised[Pair] | Refused]:
    """Renders pairs; an answer that goes beyond `max_length` is cut at its end, or the pair is refused.

    Raises:
        ChatError: naming file and row of a pair that the template cannot take.
    """
    for row in rows:
        try:
            prompt = fold_system(row.prompt) if data.system == "fold" else row.prompt
            parts = render_pair(chat.tokenizer, chat.template, prompt, row.chosen, row.rejected, row.tools)
        except ChatError as error:
            raise ChatError(str(row.origin), f"{error.where}: {error.found}", error.todo) from None
        yield _fit_pair(parts, data.max_length, data.long_rows == "truncate")


def prompt_of(pair: Pair) -> bytes:
    """Pairs of one prompt are held out together."""
    return pair.prompt.tobytes()


def _chosen(pair: Pair) -> tuple[np.ndarray, np.ndarray]:
    """(ids, labels) of a pair's prompt and its better answer, which has the loss."""
    labels = np.concatenate([np.full_like(pair.prompt, IGNORE), pair.chosen])
    return np.concatenate([pair.prompt, pair.chosen]), labels


def _fit_pair(parts: tuple[list[int], list[int], list[int]], limit: int, cut: bool) -> Tokenised[Pair] | Refused:
    prompt, chosen, rejected = (np.asarray(part, dtype=np.int32) for part in parts)
    tokens = len(prompt) + len(chosen) + len(rejected)
    room = limit - len(prompt)
    if room < 1:
        return Refused("the prompt fills max_length", tokens)
    if max(len(chosen), len(rejected)) > room and not cut:
        return Refused("longer than max_length", tokens)
    pair = Pair(prompt, chosen[:room], rejected[:room])
    if np.array_equal(pair.chosen, pair.rejected):
        same = np.array_equal(chosen, rejected)
        return Refused("both answers are the same tokens" if same else "both answers are the same once cut", tokens)
    return Tokenised(pair, pair.supervised, len(prompt), tokens - len(prompt) - pair.supervised)


def _references(
    trainer: SpineDpoTrainer,
    prepared: Prepared[Pair],
    chat: Chat,
    policy: Policy,
    limits: Limits,
    machine: Machine,
    context: Context,
) -> list[torch.Tensor]:
    """Reference log-probs of every pair, per source [n, 2], from the cache of the run or computed now."""
    pairs = [pair for rows in prepared.rows for pair in rows]
    described = {
        "model": context.identity["model"],
        "method": policy.kind,
        "quantization": str(policy.quantization),
        "precision": context.precision,
        "attention": machine.attn_implementation,
        "device": machine.device,
        "ld_alpha": context.trainer.get("ld_alpha"),
    }
    cache = context.run_dir / ".cache" / "reference" / f"{reference_key(described, pairs)}.npy"
    table = reference_logps(
        trainer, pairs, chat.tokenizer.pad_token_id, limits, cache, context.events, context.should_stop
    )
    if table.isnan().any():
        raise Interrupted("reference log-probs", "stopped as asked; what is done is kept", "rerun the same command")
    return list(table.split([len(rows) for rows in prepared.rows]))


def _with_references(
    schedule: Schedule[Pair], prepared: Prepared[Pair], references: list[torch.Tensor], step: int
) -> tuple[list[Pair], torch.Tensor]:
    items = schedule.order.of_step(step).tolist()
    return schedule.rows_of(step), torch.stack([references[source][row] for source, row in items])


def _prove_step_zero(
    trainer: SpineDpoTrainer,
    schedule: Schedule[Pair],
    prepared: Prepared[Pair],
    references: list[torch.Tensor],
    make_step: Any,
    pad: int,
    context: Context,
) -> dict[str, float]:
    """Scores the first step by the very path that trains and compares it with the reference (contract 9).

    Runs before any checkpoint is loaded, so a resumed run proves it again.

    Raises:
        StageError: they differ, or the loss is not its type's value at ratio 0.
    """
    pairs, known = _with_references(schedule, prepared, references, 0)
    live = trainer.policy_logps(pad_pairs(pairs, pad))
    counts = torch.tensor([[len(pair.chosen), len(pair.rejected)] for pair in pairs])
    policy, reference, tokens = (table.flatten().tolist() for table in (live, known, counts))
    problems = step_zero_problems(policy, reference, tokens, DTYPE_NAMES[context.precision])[:3]
    loss = trainer.loss_before_training(make_step(0))
    fields = context.trainer
    expected = loss_at_zero(
        list(trainer.loss_types),
        list(trainer.loss_weights),
        beta=fields["beta"],
        label_smoothing=fields.get("label_smoothing") or 0.0,
        use_weighting=bool(fields.get("use_weighting")),
        aux_loss=trainer.aux_loss_enabled,
    )
    worst = ((live - known).abs() / counts).max().item()
    if expected is not None and abs(loss - expected) > (1e-4 if context.precision == "fp32" else 2e-2):
        problems.append(f"the loss is {loss:.6f} where ratio 0 means {expected:.6f}")
    if problems:
        raise StageError(
            f"stages.{context.stage}, step 0", "policy and reference differ: " + "; ".join(problems), "report this"
        )
    return {"largest_difference_per_token": worst, "loss": loss}
