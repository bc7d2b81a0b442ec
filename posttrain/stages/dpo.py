"""`dpo`: preference optimisation of a full model or an adapter, against the policy it starts from."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from posttrain.artifact import Artifact
from posttrain.certify.reference import loss_at_zero, step_zero_problems
from posttrain.errors import Interrupted, StageError
from posttrain.models.lineage import Lineage, lineage_of
from posttrain.models.load import DTYPE_NAMES
from posttrain.pretraining.loop import Step
from posttrain.pretraining.rows import IGNORE
from posttrain.pretraining.world import in_turn, wait
from posttrain.recipe.schema import Dpo
from posttrain.stages.context import Context, Summary
from posttrain.stages.conversation import Chat, open_chat, settle
from posttrain.stages.fitting import fit_dpo
from posttrain.stages.outputs import model_files, write_ledger, write_probes
from posttrain.stages.pair_rows import conversion
from posttrain.stages.parents import model_folder, resolve_method
from posttrain.stages.prepare import Prepared, prepare
from posttrain.stages.run_loop import run_loop, training_metrics
from posttrain.stages.schedule import Schedule, schedule_rows
from posttrain.stages.setup import Machine, assert_trainable, set_up
from posttrain.stages.sft import last_trained_ids, prove_saved, save_policy
from posttrain.stages.trainable import Policy, load_trainable
from posttrain.training.dpo import SpineDpoTrainer
from posttrain.training.limits import Limits
from posttrain.training.pairs import Pair, pad_pairs
from posttrain.training.reference import reference_key, reference_logps


def run(config: Dpo, context: Context) -> Summary:
    """Trains on preference pairs; aborts before the first step when policy and reference are not the same."""
    context.clock.enter("data")
    machine = set_up(context)
    given = context.inputs["model"]
    with in_turn("data", context.rank):
        parents = lineage_of(model_folder(given), given.ref)
        method = resolve_method(config.method, parents, context.stage)
        chat = open_chat(parents, config.chat_template, context)
        prepared = prepare(config.data, context, conversion(chat, config.data))
    schedule = schedule_rows(prepared, context.trainer, context.seed)
    if context.rank.first:
        write_ledger(context.folder, prepared.ledger)
    context.events("phase", text="loading the model")
    context.clock.enter("loading")
    policy = load_trainable(parents, method, machine, context, [], chat.tokenizer.get_vocab())
    settle(chat, policy.model, context)
    trained, total = assert_trainable(policy.model, context.stage)
    fitted, sharing, cut = fit_dpo(policy, chat.tokenizer, machine, context, prepared.every, schedule.steps)
    trainer, limits = fitted.trainer, fitted.trial.limits
    context.clock.enter("reference")
    references = _references(trainer, prepared, chat, policy, limits, machine, context)

    def make_step(step: int) -> Step:
        return cut(*_with_references(schedule, prepared, references, step))

    context.clock.enter("proofs")
    proof = _prove_step_zero(trainer, schedule, prepared, references, make_step, chat.tokenizer.pad_token_id, context)
    result = run_loop(
        trainer,
        machine,
        context,
        prepared,
        schedule,
        make_step,
        config.snapshots,
        lambda folder: save_policy(policy, chat, machine, folder, context.rank),
    )
    context.events("phase", text="saving")
    context.clock.enter("saving")
    digests = save_policy(policy, chat, machine, context.folder, context.rank)
    if context.rank.first:
        prove_saved(policy, chat, context.folder, last_trained_ids(prepared), digests)
        write_probes(context.folder, prepared, _chosen)
    wait()
    figures = {"step_zero": proof, "chat": chat.as_dict(), "pairs": sharing.as_dict()}
    return Summary(
        headline=f"{policy.kind}: {result.steps} steps, loss {result.first_loss:.3f} -> {result.last_loss:.3f}",
        files=model_files(context.folder),
        metrics=training_metrics(result, trained, total, figures | fitted.metrics()),
        lineage=policy.lineage_after(context),
        ledger=prepared.ledger.as_dict(),
    )


def _chosen(pair: Pair) -> tuple[np.ndarray, np.ndarray]:
    """(ids, labels) of a pair's prompt and its better answer, which has the loss."""
    labels = np.concatenate([np.full_like(pair.prompt, IGNORE), pair.chosen])
    return np.concatenate([pair.prompt, pair.chosen]), labels


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
    pairs = prepared.every
    described = {
        "model": context.identity["model"],
        "weights": _weights(policy.parents),
        "method": policy.kind,
        "quantization": str(policy.quantization),
        "precision": context.precision,
        "attention": trainer.model.config._attn_implementation,
        "layout": "shared_prefix" if trainer.shares else "packed",
        "device": machine.device,
        "ld_alpha": context.trainer.get("ld_alpha"),
    }
    cache = context.run_dir / ".cache" / "reference" / f"{reference_key(described, pairs)}.npy"
    table = reference_logps(
        trainer, pairs, chat.tokenizer.pad_token_id, limits, cache, context.events, context.should_stop, context.rank
    )
    if table.isnan().any():
        raise Interrupted("reference log-probs", "stopped as asked; what is done is kept", "rerun the same command")
    return list(table.split([len(rows) for rows in prepared.rows]))


def _weights(parents: Lineage) -> list[dict[str, str]]:
    """Digests of the weights under the policy: a stage that ran again may have left other bytes of one identity."""
    found = [Artifact.read(link.folder) for link in (parents.base, *parents.adapters)]
    return [
        {name: entry["sha256"] for name, entry in artifact.record.files.items() if name.endswith(".safetensors")}
        for artifact in found
        if artifact is not None
    ]


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
