"""The private methods of TRL and transformers that the spine overrides or calls: says which one moved."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from peft.utils.other import AuxiliaryTrainingWrapper, TrainableTokensWrapper
from transformers import PreTrainedModel, Trainer, core_model_loading
from trl import DPOTrainer, SFTTrainer
from trl.trainer import dpo_trainer, sft_trainer, utils

from posttrain.pretraining.loop import Spine
from posttrain.training.dpo import SpineDpoTrainer

SIGNATURES = [
    (Trainer, "get_train_dataloader", "(self)"),
    (Trainer, "get_batch_samples", "(self, epoch_iterator, num_batches, device)"),
    (Trainer, "training_step", "(self, model, inputs, num_items_in_batch)"),
    (Trainer, "compute_loss_context_manager", "(self)"),
    (Trainer, "floating_point_ops", "(self, inputs)"),
    (Trainer, "_prepare_inputs", "(self, inputs)"),
    (Trainer, "_get_grad_norm", "(self, model, grad_norm)"),
    (Trainer, "_save_checkpoint", "(self, model, trial)"),
    (Trainer, "_load_from_checkpoint", "(self, resume_from_checkpoint, model)"),
    (Trainer, "_save_optimizer_and_scheduler", "(self, output_dir)"),
    (Trainer, "_load_optimizer_and_scheduler", "(self, checkpoint)"),
    (Trainer, "_save_scaler", "(self, output_dir)"),
    (Trainer, "_save_rng_state", "(self, output_dir)"),
    (Trainer, "_load_rng_state", "(self, checkpoint)"),
    (Trainer, "save_model", "(self, output_dir, _internal_call)"),
    (SFTTrainer, "compute_loss", "(self, model, inputs, return_outputs, num_items_in_batch)"),
    (SFTTrainer, "training_step", "(self, args, kwargs)"),
    (DPOTrainer, "compute_loss", "(self, model, inputs, return_outputs, num_items_in_batch)"),
    (DPOTrainer, "_compute_loss", "(self, model, inputs, return_outputs)"),
    (DPOTrainer, "compute_ref_log_probs", "(self, model, inputs)"),
    (DPOTrainer, "_prepare_dataset", "(self, dataset, processing_class, args, dataset_name)"),
    (DPOTrainer, "training_step", "(self, args, kwargs)"),
    (AuxiliaryTrainingWrapper, "adapter_state_dict", "(self, adapter_name)"),
    (AuxiliaryTrainingWrapper, "adapter_state_dict_load_map", "(self, adapter_name)"),
    (TrainableTokensWrapper, "adapter_state_dict", "(self, adapter_name, state_dict)"),
    (PreTrainedModel, "get_output_embeddings", "(self)"),
    (core_model_loading, "revert_weight_conversion", "(model, state_dict)"),
    (utils, "disable_dropout_in_model", "(model)"),
]

USED = [
    # (owner, what our overrides rely on, in its own words)
    (SFTTrainer.compute_loss, "fused_lm_head=True", "the loss is taken from the fused head"),
    (SFTTrainer.compute_loss, "self.current_gradient_accumulation_steps", "a router's loss is averaged by us"),
    (SFTTrainer.training_step, "self.maybe_activation_offload_context", "offloading is entered by us"),
    (SFTTrainer.__init__, "add_fused_lm_head(", "the constructor gives the model its fused head"),
    (DPOTrainer.__init__, "add_fused_lm_head(", "the constructor gives the model its fused head"),
    (DPOTrainer.training_step, "self.maybe_activation_offload_context", "offloading is entered by us"),
    (DPOTrainer._compute_loss, "self.precompute_ref_logps", "references are read from the batch"),
    (DPOTrainer._compute_loss, 'inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]', "by these names"),
    (DPOTrainer._compute_loss, 'inputs["completion_mask"]', "loss is on what this mask says"),
    (DPOTrainer._compute_loss, "model(**model_kwargs, labels=labels, fused_lm_head=True)", "one call of the model"),
    (DPOTrainer.compute_ref_log_probs, "labels=labels, fused_lm_head=True).log_probs", "one call of the model"),
    (DPOTrainer.log, "self._metrics[mode]", "figures before step 1 are cleared from here"),
    (Trainer.train, "self._load_from_checkpoint(", "a resumed run loads through our override"),
]


@pytest.mark.parametrize(
    ("owner", "name", "signature"), SIGNATURES, ids=lambda value: str(getattr(value, "__name__", value))
)
def test_signature_is_the_one_we_were_written_for(owner: Any, name: str, signature: str) -> None:
    found = inspect.signature(inspect.getattr_static(owner, name))
    names = f"({', '.join(found.parameters)})"
    assert names == signature, f"{owner.__name__}.{name} moved: it takes {names}, we were written for {signature}"


@pytest.mark.parametrize(("owner", "words", "why"), USED)
def test_what_we_rely_on_is_still_there(owner: Any, words: str, why: str) -> None:
    text = inspect.getsource(owner)
    assert words in text, f"{owner.__qualname__} moved: {words!r} is gone ({why})"


def test_every_override_of_the_spine_overrides_something() -> None:
    own = {"piece_loss", "take_window", "view", "policy_logps", "loss_before_training"}
    own |= {"_run_pieces", "_unsynced", "_own_figures", "_join_figures"}
    for cls, hosts in ((Spine, (Trainer,)), (SpineDpoTrainer, (DPOTrainer,))):
        for name, member in vars(cls).items():
            if inspect.isfunction(member) and name not in own:
                assert any(hasattr(host, name) for host in hosts), f"{cls.__name__}.{name} overrides nothing now"


def test_both_trainers_take_the_fused_head_from_one_place() -> None:
    assert sft_trainer.add_fused_lm_head is dpo_trainer.add_fused_lm_head
