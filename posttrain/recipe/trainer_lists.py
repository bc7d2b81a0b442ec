"""Which trainer settings a recipe may give, and which of them make a result what it is.

Every field of the installed `TrainingArguments`, `SFTConfig` and `DPOConfig` stands in exactly one of
three lists; a test says which one does not. A field in none counts as identity.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from posttrain.recipe.describe import nearest_word
from posttrain.recipe.trainer_checks import Finding, allowed_values, check_combinations, check_value
from posttrain.recipe.trainer_fields import TrainerField, TrainerKind, read_fields

_BATCH = "set trainer.global_batch_size, and runtime.micro_batch_tokens to cut a step into pieces"
_PRECISION = "set the recipe's `precision`"
_NO_EVAL = "nothing is evaluated inside training: add a stage of kind evaluate"
_PUBLISH = "add a stage of kind publish"
_SEED = "set the recipe's or the stage's `seed`"
_LAUNCH = "set runtime.accelerate_config and runtime.num_processes"
_DATA = "rows are prepared by the stage: see its `data` block"
_LENGTH = "set data.max_length"
_PACKING = "set data.packing"
_TEMPLATE = "set chat_template: template and tokenizer agree on their tokens"
_MASK = "loss is on assistant turns and their end-of-turn token, always"
_LIGER = "not offered: it fails on a CPU and breaks every later trainer of the process"
_REFERENCE = "the reference is the policy the stage starts from, fixed, with cached log-probs"
_RESUME = "a rerun resumes from the last complete checkpoint by itself"
_LOADER = "rows are tokenised before training; a step is cut from memory by the stage itself"
_ORDER = "data order follows from seed and data alone"
_CLI = "it is for Hugging Face's own scripts: remove it"

OWNED: dict[str, str] = {
    # what posttrain decides, with what to do instead
    "output_dir": "a stage writes into the run folder: see `posttrain run --help`",
    "per_device_train_batch_size": _BATCH,
    "gradient_accumulation_steps": _BATCH,
    "auto_find_batch_size": _BATCH,
    "average_tokens_across_devices": "the loss is normalised over all devices, always",
    "bf16": _PRECISION,
    "fp16": _PRECISION,
    "bf16_full_eval": _PRECISION,
    "fp16_full_eval": _PRECISION,
    "use_cpu": "set runtime.device: cpu",
    "use_cache": "always off in training: a cache leaks between packed documents",
    "use_liger_kernel": _LIGER,
    "liger_kernel_config": _LIGER,
    "logging_nan_inf_filter": "a loss that is not finite stops the run, and is not filtered from the log",
    "include_num_input_tokens_seen": "metrics.jsonl counts tokens at every step",
    "report_to": "set runtime.report_to",
    "run_name": "a run is named after its recipe and stage",
    "eval_strategy": _NO_EVAL,
    "eval_steps": _NO_EVAL,
    "eval_delay": _NO_EVAL,
    "per_device_eval_batch_size": _NO_EVAL,
    "prediction_loss_only": _NO_EVAL,
    "eval_on_start": _NO_EVAL,
    "eval_do_concat_batches": _NO_EVAL,
    "eval_use_gather_object": _NO_EVAL,
    "eval_accumulation_steps": _NO_EVAL,
    "include_for_metrics": _NO_EVAL,
    "batch_eval_metrics": _NO_EVAL,
    "load_best_model_at_end": _NO_EVAL,
    "metric_for_best_model": _NO_EVAL,
    "greater_is_better": _NO_EVAL,
    "eval_packing": _NO_EVAL,
    "save_only_model": "use `snapshots` for models that are kept: a checkpoint must be resumable",
    "enable_jit_checkpoint": "SIGTERM and Ctrl-C save a checkpoint already",
    "restore_callback_states_from_checkpoint": _RESUME,
    "resume_from_checkpoint": _RESUME,
    "ignore_data_skip": _RESUME,
    "push_to_hub": _PUBLISH,
    "hub_token": _PUBLISH,
    "hub_private_repo": _PUBLISH,
    "hub_model_id": _PUBLISH,
    "hub_strategy": _PUBLISH,
    "hub_always_push": _PUBLISH,
    "hub_revision": _PUBLISH,
    "seed": _SEED,
    "data_seed": _SEED,
    "accelerator_config": _LAUNCH,
    "parallelism_config": _LAUNCH,
    "fsdp": _LAUNCH,
    "fsdp_config": _LAUNCH,
    "deepspeed": _LAUNCH,
    "local_rank": _LAUNCH,
    "dataloader_drop_last": _ORDER,
    "dataloader_num_workers": _LOADER,
    "dataloader_pin_memory": _LOADER,
    "dataloader_persistent_workers": _LOADER,
    "dataloader_prefetch_factor": _LOADER,
    "disable_tqdm": "progress is shown by `posttrain run`; --quiet switches it off",
    "dataloader_in_order": _ORDER,
    "train_sampling_strategy": _ORDER,
    "length_column_name": _ORDER,
    "shuffle_dataset": _ORDER,
    "remove_unused_columns": _DATA,
    "label_names": _DATA,
    "do_train": _CLI,
    "do_eval": _CLI,
    "do_predict": _CLI,
    # SFTConfig and DPOConfig
    "model_init_kwargs": "set `model`, `precision`, `method` and runtime.attn_implementation",
    "trust_remote_code": "code that comes with a model is never run",
    "chat_template_path": _TEMPLATE,
    "eos_token": _TEMPLATE,
    "pad_token": _TEMPLATE,
    "dataset_text_field": _DATA,
    "dataset_kwargs": _DATA,
    "dataset_num_proc": "set runtime.dataset_num_proc",
    "max_length": _LENGTH,
    "truncation_mode": "set data.long_rows",
    "packing": _PACKING,
    "packing_strategy": _PACKING,
    "padding_free": _PACKING,
    "pad_to_multiple_of": _PACKING,
    "completion_only_loss": _MASK,
    "assistant_only_loss": _MASK,
    "disable_dropout": "dropout is off in dpo: policy and reference must agree at step 0",
    "precompute_ref_log_probs": _REFERENCE,
    "precompute_ref_batch_size": _REFERENCE,
    "sync_ref_model": _REFERENCE,
    "ref_model_mixup_alpha": _REFERENCE,
    "ref_model_sync_steps": _REFERENCE,
}

_EXECUTION = """
    activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs
    activation_offloading torch_compile torch_compile_backend torch_compile_mode torch_empty_cache_steps
    logging_strategy logging_steps logging_first_step log_on_each_node log_level log_level_replica
    project trackio_space_id trackio_bucket_id trackio_static_space_id
    save_strategy save_steps save_on_each_node save_total_limit full_determinism
    dataloader_multiprocessing_context
    ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout
    debug skip_memory_metrics
"""
_IDENTITY = """
    num_train_epochs max_steps learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps
    optim optim_args optim_target_modules weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm
    label_smoothing_factor neftune_noise_alpha tf32 router_aux_loss_coef
    loss_type loss_weights ld_alpha f_divergence_type f_alpha_divergence_coef label_smoothing beta use_weighting
    discopop_tau
"""
EXECUTION: frozenset[str] = frozenset(_EXECUTION.split())
"""Where, how fast and how visibly a stage trains; never what comes out."""
IDENTITY: frozenset[str] = frozenset(_IDENTITY.split())
"""What changes the weights."""

BATCH_SIZE = "global_batch_size"
OWN_DEFAULTS: dict[str, Any] = {
    BATCH_SIZE: 8,
    "save_total_limit": 2,
    "logging_steps": 1,
    "optim": "adamw_torch_fused",
    "save_steps": 500,
    "gradient_checkpointing": False,
    "activation_checkpointing": False,
}
"""Defaults that differ from, or come on top of, the installed ones."""

ADAPTER_RATES: dict[str, float] = {"sft": 2e-4, "dpo": 5e-6}
"""Learning rates of adapters where the recipe gives none; full fine-tuning keeps TRL's (sft 2e-5, dpo 1e-6).

An adapter wants about ten times the rate of full fine-tuning. 2e-4 is QLoRA's for 7B and 13B models
(Dettmers et al. 2023, appendix B), 5e-6 what Zephyr's recipes take for DPO by adapter."""

_BATCH_FIELD = TrainerField(BATCH_SIZE, "int", 8, True, "Rows per optimizer step.", None)
_OTHER_NAMES = {  # names of older versions and of other tools -> what to do
    "warmup_ratio": "set warmup_steps: a number below 1 is a share of all steps",
    "lr": "did you mean learning_rate?",
    "epochs": "did you mean num_train_epochs?",
    "num_epochs": "did you mean num_train_epochs?",
    "batch_size": "did you mean global_batch_size?",
    "train_batch_size": "did you mean global_batch_size?",
    "lr_scheduler": "did you mean lr_scheduler_type?",
    "scheduler": "did you mean lr_scheduler_type?",
    "optimizer": "did you mean optim?",
    "max_seq_length": _LENGTH,
    "max_prompt_length": _LENGTH,
    "max_completion_length": _LENGTH,
    "evaluation_strategy": _NO_EVAL,
    "group_by_length": _ORDER,
    "no_cuda": OWNED["use_cpu"],
    "overwrite_output_dir": OWNED["output_dir"],
    "save_safetensors": "safetensors is what is always written: remove it",
    "reference_free": _REFERENCE,
    "rpo_alpha": "set loss_type: [sigmoid, sft] and loss_weights",
}


def settable_fields(kind: TrainerKind) -> dict[str, TrainerField]:
    """The settings that a `trainer:` block of a stage kind may give, `global_batch_size` first."""
    fields = {name: field for name, field in read_fields(kind).items() if name not in OWNED}
    return {BATCH_SIZE: _BATCH_FIELD} | fields


def check_trainer(kind: TrainerKind, given: Mapping[str, Any]) -> list[Finding]:
    """Every problem of a `trainer:` block as (key, found, todo).

    Combinations are looked at once every value is right by itself.
    """
    fields = settable_fields(kind)
    given = _one_form(kind, given)
    findings: list[Finding] = []
    for key, value in given.items():
        if key not in fields:
            findings.append(_unknown(kind, key, list(fields)))
        elif finding := check_value(fields[key], value, allowed_values(kind, fields[key])):
            findings.append(finding)
    return findings or list(check_combinations(kind, given))


def _unknown(kind: TrainerKind, key: str, known: list[str]) -> Finding:
    if key in OWNED and key in read_fields(kind):
        return key, "is not for a recipe to set", OWNED[key]
    found = f"unknown setting for a stage of kind {kind}"
    if key in _OTHER_NAMES:
        return key, found, _OTHER_NAMES[key]
    if near := nearest_word(key, known):
        return key, found, f"did you mean {near}?"
    if near := nearest_word(key, list(OWNED)):
        return key, found, f"the nearest, {near}, is not for a recipe to set: {OWNED[near]}"
    return key, found, "remove it; `posttrain schema` lists what can be set"


def resolve_trainer(kind: TrainerKind, given: Mapping[str, Any], adapter: bool = False) -> dict[str, Any]:
    """The settings a trainer gets: the recipe's over our defaults over the installed literal ones.

    Args:
        adapter: an adapter is trained and not the whole model; it has a learning rate of its own.

    A field whose installed default is not a literal (`optim`) is there only when given. `loss_type` is
    a list in dpo; the old and new names of gradient checkpointing agree.
    """
    resolved = {name: copy.copy(field.default) for name, field in settable_fields(kind).items() if field.literal}
    resolved |= OWN_DEFAULTS
    if adapter:
        resolved["learning_rate"] = ADAPTER_RATES[kind]
    resolved |= _one_form(kind, given)
    for suffix in ("", "_kwargs"):
        old, new = f"gradient_checkpointing{suffix}", f"activation_checkpointing{suffix}"
        chosen = given.get(new, given.get(old, resolved[new]))
        resolved[old] = resolved[new] = chosen
    return resolved


def _one_form(kind: TrainerKind, given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with one loss type of dpo as a list of one, as TRL itself takes it."""
    loss = given.get("loss_type")
    return {**given, "loss_type": [loss]} if kind == "dpo" and isinstance(loss, str) else dict(given)


def identity_of(kind: TrainerKind, resolved: Mapping[str, Any]) -> dict[str, Any]:
    """The part of resolved settings that gives the result its identity: all but the execution fields."""
    fields = settable_fields(kind)
    return {name: value for name, value in resolved.items() if name in fields and name not in EXECUTION}
