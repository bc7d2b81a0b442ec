"""Loads the model a stage works on: base, quantisation, frozen adapters, and one new adapter on top."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from posttrain.errors import CheckpointError, StageError
from posttrain.merging.adapter import EMBEDDINGS
from posttrain.models.files import tensor_header, verify_adapter_files, verify_adapter_fits, verify_weight_files
from posttrain.models.lineage import Lineage, Quantization

_WRAPPED = r".*\.(original_module|modules_to_save|token_adapter)(\..*)?"
"""Layers inside a parent's wrappers, an output head say: `all-linear` would take them for layers of their own."""
TRAINED = "default"
"""Name of the adapter in training: peft saves it at the root of the folder."""
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DTYPE_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


@dataclass(frozen=True)
class Adapter:
    """Settings of a new LoRA adapter, spelled as in peft."""

    r: int
    lora_alpha: float
    lora_dropout: float
    target_modules: str | list[str]
    use_rslora: bool = False
    use_dora: bool = False
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    modules_to_save: list[str] | None = None


def load_base(
    folder: Path, dtype: torch.dtype, device: str, attn_implementation: str, quantization: Quantization | None = None
) -> PreTrainedModel:
    """Loads a standalone model from safetensors, never running code from its folder.

    Args:
        dtype: of the weights in memory; under quantisation, of the weights before it and of the compute.

    Raises:
        CheckpointError: files missing or damaged.
    """
    verify_weight_files(folder)
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    config._attn_implementation = attn_implementation  # a folder's own word for it could name a kernel to fetch
    options: dict[str, Any] = {
        "config": config,
        "dtype": dtype,
        "attn_implementation": attn_implementation,
        "local_files_only": True,
        "trust_remote_code": False,
        "use_safetensors": True,
    }
    if quantization:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quantization.quant_type,
            bnb_4bit_use_double_quant=quantization.double_quant,
            bnb_4bit_compute_dtype=dtype,
        )
        options["device_map"] = {"": torch.cuda.current_device() if device == "cuda" else device}
    model, loaded = AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, ignore_mismatched_sizes=True, **options
    )
    _check_loaded(folder, loaded)
    if quantization:
        _keep_unpacked(model)
    return model if quantization else model.to(device)


def _check_loaded(folder: Path, loaded: dict[str, Any]) -> None:
    """Refuses what transformers would fill with random weights after a warning."""
    wrong = [
        f"{name} is {list(found)}, the config asks for {list(wanted)}"
        for name, found, wanted in loaded["mismatched_keys"]
    ]
    lacking = [f"{name} is missing from its weights" for name in sorted(loaded["missing_keys"])]
    if problems := [*sorted(wrong), *lacking]:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise CheckpointError(str(folder), problems[0] + more, "copy, download or train the checkpoint again")


def _keep_unpacked(model: PreTrainedModel) -> None:
    """Stops bitsandbytes from repacking 4-bit weights at the first eval forward on a CPU.

    The packed form is unpacked wrongly by the next `state_dict()` (bitsandbytes 0.50.2, CPUs with
    AVX512-BF16): logits are off by up to 0.5, and an evaluation would change the bytes of training.
    """
    from bitsandbytes.nn import Linear4bit

    found = [module for module in model.modules() if isinstance(module, Linear4bit)]
    if not found:
        raise StageError("qlora", "no layer of the model was quantised", "check the architecture, or use method lora")
    for module in found:
        module.support_avx512bf16_for_cpu = False


def quantised_modules(model: torch.nn.Module) -> tuple[str, ...]:
    """Names of the modules held in 4 bits, as they are without adapters around them."""
    from bitsandbytes.nn import Linear4bit

    found = (name for name, module in model.named_modules() if isinstance(module, Linear4bit))
    return tuple(re.sub(r"^base_model\.model\.|\.(base_layer|original_module)$", "", name) for name in found)


def load_policy(
    lineage: Lineage, dtype: torch.dtype, device: str, attn_implementation: str
) -> PreTrainedModel | PeftModel:
    """Loads a model as its lineage says: the base (quantised as in training) with all adapters active and frozen.

    Raises:
        CheckpointError: damaged files, or an adapter made for another base.
    """
    model = load_base(lineage.base.folder, dtype, device, attn_implementation, lineage.quantization)
    return put_adapters(model, lineage)


def put_adapters(model: PreTrainedModel, lineage: Lineage) -> PreTrainedModel | PeftModel:
    """Puts all adapters of a lineage on its base, active and frozen, and returns the whole in eval mode.

    Where an adapter brings a longer embedding, the base's vocabulary grows first: peft only fills what is there.
    """
    rows = max((_embedding_rows(link.folder) for link in lineage.adapters), default=0)
    if rows > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(rows, mean_resizing=False)
    for number, link in enumerate(lineage.adapters):
        model = _put_frozen(model, link.folder, f"parent{number}", lineage.base.folder)
    if lineage.adapters:
        _activate(model, [f"parent{number}" for number in range(len(lineage.adapters))], trained=None)
    return model.eval()


def _embedding_rows(folder: Path) -> int:
    """Rows of the whole embedding in an adapter's file; 0 where it has none."""
    tensors = tensor_header(folder / "adapter_model.safetensors")
    whole = [f"{name}.{part}weight" for name in EMBEDDINGS for part in ("", "base_layer.", "token_adapter.base_layer.")]
    return max((entry["shape"][0] for name, entry in tensors.items() if name.endswith(tuple(whole))), default=0)


def _put_frozen(model: Any, folder: Path, name: str, base: Path) -> PeftModel:
    verify_adapter_files(folder)
    verify_adapter_fits(folder, base)
    if isinstance(model, PeftModel):
        model.load_adapter(str(folder), adapter_name=name, is_trainable=False)
    else:
        model = PeftModel.from_pretrained(model, str(folder), adapter_name=name, is_trainable=False)
    _answer_for_own_adapters(model)
    for module in model.modules():
        if isinstance(module, LoraLayer) and name in module.lora_dropout:
            module.lora_dropout[name] = torch.nn.Identity()  # a frozen adapter is a function, in training too
    return model


def _answer_for_own_adapters(model: PeftModel) -> None:
    """Lets wrappers (trained token rows, saved modules) say nothing of adapters they do not hold.

    peft 0.21 asks every wrapper for every adapter, on loading and on saving, and fails with a KeyError
    where a second adapter trains no token rows.
    """
    for module in model.modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            for method in ("adapter_state_dict", "adapter_state_dict_load_map"):
                object.__setattr__(module, method, _only_own(module, getattr(module, method)))


def _has_wrappers(model: torch.nn.Module) -> bool:
    return any(isinstance(module, AuxiliaryTrainingWrapper) for module in model.modules())


def _only_own(module: AuxiliaryTrainingWrapper, answer: Callable[..., dict]) -> Callable[..., dict]:
    return lambda name, *rest: answer(name, *rest) if name in module._adapters else {}


def _activate(model: PeftModel, names: list[str], trained: str | None) -> None:
    """Makes several adapters act at once; only parameters of `trained` take gradients."""
    model.base_model.set_adapter(names)
    for name, param in model.named_parameters():
        param.requires_grad_(trained is not None and trained in name.split("."))


def add_adapter(model: PreTrainedModel | PeftModel, adapter: Adapter, token_rows: list[int]) -> PeftModel:
    """Puts a new trainable adapter on a model, above whatever adapters are there already.

    Its parameters are fp32 whatever the base is: bf16 would round away updates of usual size.

    Args:
        token_rows: vocabulary ids whose embedding rows (and untied head rows) are trained as well.
    """
    rows = _token_row_targets(model, token_rows) if token_rows else None
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=adapter.r,
        lora_alpha=adapter.lora_alpha,  # type: ignore[arg-type]  # peft takes fractions, its annotation says int
        lora_dropout=adapter.lora_dropout,
        target_modules=adapter.target_modules,
        use_rslora=adapter.use_rslora,
        use_dora=adapter.use_dora,
        rank_pattern=adapter.rank_pattern or {},
        alpha_pattern=adapter.alpha_pattern or {},
        modules_to_save=adapter.modules_to_save,
        trainable_token_indices=rows,
        exclude_modules=_WRAPPED if adapter.target_modules == "all-linear" and _has_wrappers(model) else None,
    )
    if isinstance(model, PeftModel):
        parents = list(model.peft_config)
        model.add_adapter(TRAINED, config)
        wrapped = model
        _activate(wrapped, [*parents, TRAINED], trained=TRAINED)
    else:
        wrapped = get_peft_model(model, config, adapter_name=TRAINED)
    for param in wrapped.parameters():
        if param.requires_grad:
            param.data = param.data.float()
    return wrapped


def continue_adapter(lineage: Lineage, dtype: torch.dtype, device: str, attn_implementation: str) -> PeftModel:
    """Loads a lineage with its last adapter trainable and the ones below frozen."""
    if not lineage.adapters:
        raise CheckpointError(lineage.base.label, "is not an adapter, there is nothing to continue", "use method lora")
    last = lineage.adapters[-1]
    model: Any = load_base(lineage.base.folder, dtype, device, attn_implementation, lineage.quantization)
    for number, link in enumerate(lineage.adapters[:-1]):
        model = _put_frozen(model, link.folder, f"parent{number}", lineage.base.folder)
    verify_adapter_files(last.folder)
    verify_adapter_fits(last.folder, lineage.base.folder)
    if isinstance(model, PeftModel):
        model.load_adapter(str(last.folder), adapter_name=TRAINED, is_trainable=True)
    else:
        model = PeftModel.from_pretrained(model, str(last.folder), adapter_name=TRAINED, is_trainable=True)
    parents = [f"parent{number}" for number in range(len(lineage.adapters) - 1)]
    _activate(model, [*parents, TRAINED], trained=TRAINED)
    for param in model.parameters():
        if param.requires_grad:
            param.data = param.data.float()
    return model


def _token_row_targets(model: Any, ids: list[int]) -> dict[str, list[int]]:
    """peft's `trainable_token_indices`: the embedding, and the head as well where it is not tied."""
    modules = {id(module): name.rpartition(".")[2] for name, module in model.named_modules()}
    targets = {modules[id(model.get_input_embeddings())]: list(ids)}
    if not model.config.get_text_config().tie_word_embeddings:
        targets[modules[id(model.get_output_embeddings())]] = list(ids)
    return targets


def untrained_rows(model: PreTrainedModel, ids: list[int]) -> list[int]:
    """Ids whose input embedding row looks as if no training ever touched it.

    A row is suspect when it is all (near) zero, much shorter than the median row, or the same as another
    of the rows asked for. Llama-3's base checkpoint has such rows for its header tokens.
    """
    weight_VH = model.get_input_embeddings().weight.detach()
    rows = weight_VH[ids].float()
    sample = weight_VH[:: max(1, len(weight_VH) // 4096)].float()
    median = sample.norm(dim=1).median()
    norms = rows.norm(dim=1)
    same = (torch.cdist(rows, rows) < 1e-6).sum(dim=1) > 1
    suspect = (norms < 0.2 * median) | same
    return [token for token, bad in zip(ids, suspect.tolist(), strict=True) if bad]
