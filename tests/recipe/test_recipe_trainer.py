"""Trainer settings: the fields read from sources, the three lists, the checks, what is resolved."""

from __future__ import annotations

import dataclasses
import inspect
import re
import time

import pytest

from posttrain.artifact import canonical
from posttrain.recipe import trainer_fields
from posttrain.recipe.trainer_fields import loss_types, read_fields, scheduler_settings
from posttrain.recipe.trainer_lists import (
    BATCH_SIZE,
    EXECUTION,
    IDENTITY,
    OWN_DEFAULTS,
    OWNED,
    check_trainer,
    identity_of,
    resolve_trainer,
    settable_fields,
)

KINDS = ("pretrain", "sft", "dpo")


@pytest.fixture(scope="module")
def imported():
    """The config classes themselves: the one test module that imports trl."""
    from transformers import TrainingArguments
    from trl import DPOConfig, SFTConfig

    return {"pretrain": TrainingArguments, "sft": SFTConfig, "dpo": DPOConfig}


@pytest.mark.parametrize("kind", KINDS)
def test_the_sources_say_what_the_imported_class_says(imported, kind):
    read = read_fields(kind)
    fields = {field.name: field for field in dataclasses.fields(imported[kind]) if field.init}
    assert list(read) == list(fields)
    for name, field in fields.items():
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if read[name].literal:
            assert (read[name].default, type(read[name].default)) == (default, type(default)), name
        else:
            assert name == "optim"
        choices = field.metadata.get("choices")
        if choices is not None and name not in ("log_level", "log_level_replica"):
            assert read[name].choices == tuple(choices), name
        assert read[name].help == field.metadata.get("help", "")
        assert _words(read[name].annotation) == _words(_annotation(imported[kind], name)), name


def _annotation(config: type, name: str) -> str:
    annotation = next(
        inspect.get_annotations(base)[name] for base in config.__mro__ if name in inspect.get_annotations(base)
    )
    return annotation.__name__ if annotation in (int, float, str, bool) else str(annotation)


def _words(annotation: str) -> set[str]:
    """`Union[str, None]` and `str | None` are the same words; modules are left out."""
    without_modules = re.sub(r"[\w.]+\.", "", annotation.replace("NoneType", "None"))
    return set(re.findall(r"\w+", without_modules)) - {"Union", "Optional"}


def test_enum_choices_are_those_of_the_enums(imported):
    from transformers.trainer_utils import IntervalStrategy, SaveStrategy, SchedulerType
    from transformers.training_args import OptimizerNames

    fields = read_fields("sft")
    for name, enum in (
        ("lr_scheduler_type", SchedulerType),
        ("optim", OptimizerNames),
        ("save_strategy", SaveStrategy),
        ("logging_strategy", IntervalStrategy),
    ):
        assert fields[name].choices == tuple(member.value for member in enum)


def test_log_levels_are_those_of_transformers(imported):
    from transformers.training_args import trainer_log_levels

    from posttrain.recipe.trainer_checks import allowed_values

    allowed = allowed_values("sft", read_fields("sft")["log_level"])
    assert allowed is not None
    assert set(allowed) == set(trainer_log_levels)


@pytest.mark.parametrize("kind", KINDS)
def test_the_configs_take_what_is_resolved(imported, kind, tmp_path, recwarn):
    config = imported[kind](
        output_dir=str(tmp_path), use_cpu=True, bf16=False, **_without_batch(resolve_trainer(kind, {}))
    )
    assert config.activation_checkpointing is config.gradient_checkpointing is False
    assert not [warning for warning in recwarn if "deprecated" in str(warning.message)]


def _without_batch(resolved):
    return {name: value for name, value in resolved.items() if name != BATCH_SIZE}


def test_every_installed_field_is_in_exactly_one_list():
    installed = {name for kind in KINDS for name in read_fields(kind)}
    lists = {"owned": set(OWNED), "execution": set(EXECUTION), "identity": set(IDENTITY)}
    for name in installed:
        assert sum(name in fields for fields in lists.values()) == 1, (
            f"{name}: put it into one list of trainer_lists.py"
        )
    for label, fields in lists.items():
        assert fields <= installed, f"{label} names what is not installed: {fields - installed}"
    assert all(OWNED.values())


def test_reading_takes_well_under_100_ms():
    best = 1.0
    for _ in range(3):
        for cached in (
            trainer_fields.read_fields,
            trainer_fields._class_fields,
            trainer_fields._source,
            trainer_fields._enum_values,
        ):
            cached.cache_clear()
        start = time.process_time()
        for kind in KINDS:
            read_fields(kind)
        best = min(best, time.process_time() - start)
    assert best < 0.06  # about 0.02 on a quiet machine


def test_loss_types_are_those_the_trainers_handle():
    assert loss_types("sft") == ("nll", "dft")
    assert len(loss_types("dpo")) == 15
    assert {"sigmoid", "ipo", "exo_pair", "sft", "sigmoid_norm"} <= set(loss_types("dpo"))
    for name in loss_types("dpo"):
        smoothing = {"label_smoothing": 0.1} if name == "exo_pair" else {}
        assert check_trainer("dpo", {"loss_type": [name]} | smoothing) == []
        assert check_trainer("dpo", {"loss_type": name} | smoothing) == []


def test_every_scheduler_has_known_settings():
    for name in read_fields("sft")["lr_scheduler_type"].choices or ():
        scheduler_settings(name)
    assert scheduler_settings("cosine") == (frozenset({"num_cycles"}), frozenset())
    allowed, required = scheduler_settings("warmup_stable_decay") or (frozenset(), frozenset())
    assert required == {"num_decay_steps"} < allowed


VALID = [
    ("sft", {"learning_rate": 2e-4, "lr_scheduler_type": "cosine", "warmup_steps": 0.1, "num_train_epochs": 1}),
    ("sft", {"learning_rate": 0, "max_steps": 5, "loss_type": "dft", "neftune_noise_alpha": None}),
    ("sft", {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}}),
    ("sft", {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 10}}),
    ("sft", {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}),
    ("sft", {"logging_steps": 0.5, "save_total_limit": None}),
    ("dpo", {"loss_type": ["sigmoid", "sft"], "loss_weights": [1, 0.2], "beta": 0.01, "global_batch_size": 128}),
    ("dpo", {"loss_type": "robust", "label_smoothing": 0.1, "ld_alpha": 1.0}),
    ("dpo", {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3, "optim": "paged_adamw_8bit"}),
    ("pretrain", {"adam_beta2": 0.95, "weight_decay": 0.1, "max_grad_norm": 1.0, "optim": "adafactor"}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "given"), VALID)
def test_right_settings_are_right(kind, given):
    assert check_trainer(kind, given) == []


WRONG = [
    ("dpo", {"f_divergence_type": "js_divergence", "loss_type": ["nca_pair"]}, "f_divergence_type"),
    ("dpo", {"f_divergence_type": "js"}, "f_divergence_type"),
    ("dpo", {"use_weighting": True, "loss_type": ["aot"]}, "use_weighting"),
    ("dpo", {"loss_type": ["robust"], "label_smoothing": 0.5}, "label_smoothing"),
    ("dpo", {"loss_type": []}, "loss_type"),
    ("dpo", {"loss_type": [["sigmoid"]]}, "loss_type"),
    ("dpo", {"f_alpha_divergence_coef": 0.3}, "f_alpha_divergence_coef"),
    ("dpo", {"discopop_tau": 0.1}, "discopop_tau"),
    ("dpo", {"ld_alpha": 1.1}, "ld_alpha"),
    ("dpo", {"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
    ("sft", {"label_smoothing_factor": 0.1, "loss_type": "dft"}, "label_smoothing_factor"),
    ("sft", {"loss_type": "chunked_nll"}, "loss_type"),
    ("sft", {"beta": 0.1}, "beta"),
    ("pretrain", {"loss_type": "nll"}, "loss_type"),
    ("sft", {"lr_scheduler_type": "constant", "warmup_steps": 10}, "warmup_steps"),
    ("sft", {"lr_scheduler_type": "reduce_lr_on_plateau"}, "lr_scheduler_type"),
    ("sft", {"lr_scheduler_type": "warmup_stable_decay"}, "lr_scheduler_type"),
    ("sft", {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1, "min_lr_rate": 1}},
     "lr_scheduler_type"),
    ("sft", {"lr_scheduler_kwargs": "{}"}, "lr_scheduler_kwargs"),
    ("sft", {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": float("nan")}}, "lr_scheduler_kwargs"),
    ("sft", {"optim": "adamw"}, "optim"),
    ("sft", {"optim": "galore_adamw_layerwise"}, "optim"),
    ("sft", {"optim_target_modules": "all-linear"}, "optim_target_modules"),
    ("sft", {"optim_args": "momentum"}, "optim_args"),
    ("sft", {"dataloader_prefetch_factor": 2}, "dataloader_prefetch_factor"),
    ("sft", {"dataloader_persistent_workers": True}, "dataloader_persistent_workers"),
    ("sft", {"gradient_checkpointing_kwargs": {"use_reentrant": False}}, "gradient_checkpointing_kwargs"),
    ("sft", {"gradient_checkpointing": True, "activation_checkpointing": False}, "gradient_checkpointing"),
    ("sft", {"num_train_epochs": 0}, "num_train_epochs"),
    ("sft", {"max_steps": -2}, "max_steps"),
    ("sft", {"save_steps": 0}, "save_steps"),
    ("sft", {"logging_steps": 2.5}, "logging_steps"),
    ("sft", {"learning_rate": True}, "learning_rate"),
    ("sft", {"max_steps": 1.5}, "max_steps"),
    ("sft", {"global_batch_size": "8"}, "global_batch_size"),
    ("sft", {"log_level": "loud"}, "log_level"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "given", "key"), WRONG)
def test_wrong_settings_give_one_finding_each(kind, given, key):
    findings = check_trainer(kind, given)
    assert [finding[0] for finding in findings] == [key]
    assert all(findings[0])


def test_owned_settings_are_refused_with_what_to_do():
    for kind in KINDS:
        for name in read_fields(kind):
            if name in OWNED:
                assert check_trainer(kind, {name: None}) == [(name, "is not for a recipe to set", OWNED[name])]


def test_resolved_is_recipe_over_ours_over_installed():
    resolved = resolve_trainer("dpo", {"beta": 0.2, "loss_type": "ipo", "logging_steps": 3})
    assert (resolved["beta"], resolved["loss_type"], resolved["logging_steps"]) == (0.2, ["ipo"], 3)
    assert (resolved["learning_rate"], resolved["save_total_limit"], resolved[BATCH_SIZE]) == (1e-6, 2, 8)
    assert resolve_trainer("sft", {})["learning_rate"] == 2e-5
    assert resolve_trainer("pretrain", {})["learning_rate"] == 5e-5
    assert resolve_trainer("sft", {}, adapter=True)["learning_rate"] == 2e-4
    assert resolve_trainer("dpo", {}, adapter=True)["learning_rate"] == 5e-6
    assert resolve_trainer("dpo", {"learning_rate": 3e-5}, adapter=True)["learning_rate"] == 3e-5
    assert not OWNED.keys() & resolved.keys()
    assert resolved["optim"] == "adamw_torch_fused"  # named, so that another torch does not change it unnoticed
    assert resolve_trainer("sft", {"optim": "sgd"})["optim"] == "sgd"


@pytest.mark.parametrize("given", [{"gradient_checkpointing": True}, {"activation_checkpointing": True}])
def test_both_names_of_checkpointing_agree(given):
    resolved = resolve_trainer("sft", given)
    assert resolved["gradient_checkpointing"] is resolved["activation_checkpointing"] is True


def test_resolving_does_not_share_defaults():
    resolve_trainer("dpo", {})["loss_type"].append("ipo")
    assert resolve_trainer("dpo", {})["loss_type"] == ["sigmoid"]


@pytest.mark.parametrize("kind", KINDS)
def test_identity_leaves_out_execution_and_is_stable(kind):
    plain = resolve_trainer(kind, {})
    identity = identity_of(kind, plain)
    assert identity.keys() == {BATCH_SIZE} | (IDENTITY & settable_fields(kind).keys())
    changed = {"logging_steps": 1, "save_steps": 7, "gradient_checkpointing": True, "save_total_limit": 5}
    assert canonical(identity_of(kind, resolve_trainer(kind, changed))) == canonical(identity)
    assert canonical(identity_of(kind, resolve_trainer(kind, {"weight_decay": 0.1}))) != canonical(identity)
    assert OWN_DEFAULTS.keys() - EXECUTION == {BATCH_SIZE, "optim"}
