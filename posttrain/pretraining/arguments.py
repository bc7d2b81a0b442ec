"""Maps resolved trainer fields to the arguments of TRL's trainers, in one place for all stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

OURS = {"global_batch_size"}


def trainer_arguments(
    fields: dict[str, Any], *, folder: Path, steps: int, seed: int, precision: str, device: str, report_to: list[str]
) -> dict[str, Any]:
    """Returns keyword arguments for `SFTConfig` or `DPOConfig`.

    What we own is fixed here: one batch of the trainer is one whole optimizer step (`posttrain.pretraining.loop`
    cuts it), data is ours, nothing is removed or reordered behind our back.

    Args:
        fields: resolved trainer fields of the recipe (identity and execution), by TRL's names.
        steps: optimizer steps of the whole run.
        precision: `bf16` and `fp16` switch autocast on; trainable weights stay fp32.
        device: `cpu` or `cuda`.
    """
    kept = {key: value for key, value in fields.items() if key not in OURS and value is not None}
    kept |= {
        "output_dir": str(folder),
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "max_steps": steps,
        "seed": seed,
        "data_seed": seed,
        "bf16": precision == "bf16",
        "fp16": precision == "fp16",
        "use_cpu": device == "cpu",
        "report_to": report_to or "none",
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "max_length": None,
        "logging_nan_inf_filter": False,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": False,
        "eval_strategy": "no",
        "average_tokens_across_devices": False,  # the loop's losses add up over processes as they are
        "ddp_find_unused_parameters": False,  # step 1 proves that every trained parameter gets a gradient
    }
    kept.pop("num_train_epochs", None)  # `max_steps` is derived from it, exactly, by the data order
    return kept
