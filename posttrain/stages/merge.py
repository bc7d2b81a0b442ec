"""`merge`: a lineage of base and adapters becomes one standalone model, from files, with a certificate."""

from __future__ import annotations

import json
import re
from typing import Any

from posttrain.artifact import write_atomically
from posttrain.certify.certificate import Certificate, Limits, certify_merge, default_limits
from posttrain.chat.contract import probe_ids, verify_saved
from posttrain.chat.templates import read_folder_template
from posttrain.chat.tokenizer import load_tokenizer
from posttrain.errors import ChatError, RecipeError
from posttrain.merging.config import copy_side_files
from posttrain.merging.merge import merge_into
from posttrain.merging.quantization import QuantSpec
from posttrain.models.files import verify_adapter_files, verify_adapter_fits, verify_model_files
from posttrain.models.lineage import Lineage, Link, lineage_of
from posttrain.models.load import DTYPE_NAMES, load_policy
from posttrain.recipe.schema import Merge
from posttrain.stages.context import Context, Summary
from posttrain.stages.outputs import model_files, read_probe_rows
from posttrain.stages.setup import Machine, model_folder, set_up

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def run(config: Merge, context: Context) -> Summary:
    """Merges in fp32 with one rounding, then compares the files with the adapter in use."""
    given = context.inputs["model"]
    lineage = lineage_of(model_folder(given), given.ref)
    if not lineage.adapters:
        raise RecipeError(
            f"stages.{context.stage}.model", f"{given.ref} is a whole model, there is nothing to merge", "leave it out"
        )
    machine = set_up(context)
    verify_model_files(lineage.base.folder)
    for link in lineage.adapters:
        verify_adapter_files(link.folder)
        verify_adapter_fits(link.folder, lineage.base.folder)
    base_mode = config.base or ("dequantized" if lineage.quantization else "original")
    dtype = config.dtype or DTYPE_NAMES[context.precision]
    context.events("phase", text="merging")
    report = merge_into(
        context.folder,
        lineage.base.folder,
        [link.folder for link in lineage.adapters],
        dtype,
        base_mode,  # type: ignore[arg-type]
        _quant_spec(lineage),
        shard_bytes(config.max_shard_size, f"stages.{context.stage}.max_shard_size"),
    )
    _carry_chat(lineage, context)
    write_atomically(context.folder / "merge_report.json", json.dumps(report.as_dict(), indent=2))
    context.events("phase", text="certifying")
    certificate = _certify(config, context, machine, lineage, base_mode, dtype)
    write_atomically(context.folder / "certificate.json", json.dumps(certificate.as_dict(), indent=2))
    measured = certificate.logits
    for line in report.advice():
        context.events("note", text=line)
    return Summary(
        headline=f"{len(lineage.adapters)} adapter(s) into the {base_mode} base, {dtype}: "
        f"relative error {measured['relative_error']:.1e}, top-1 agreement {measured['top1_agreement']:.4f}",
        files=model_files(context.folder),
        metrics={
            "adapters": len(lineage.adapters),
            "base_mode": base_mode,
            "dtype": dtype,
            "certificate": {key: measured[key] for key in sorted(measured)},
            "parameters": report.parameters,
            "total_bytes": report.total_bytes,
            "advice": report.advice(),
            "merged_from": lineage.as_dict(context.run_dir),
        },
        lineage=Lineage(Link(context.run_dir / context.stage, f"@{context.stage}", context.fingerprint)).as_dict(
            context.run_dir
        ),
        failed=[f"certificate: {failure}" for failure in certificate.failures],
    )


def shard_bytes(text: str, where: str) -> int:
    """Reads `5GB`, `500 MB`, `2GiB` as bytes; RecipeError where it cannot."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    if not match or match[2].upper() not in _UNITS or float(match[1]) <= 0:
        raise RecipeError(where, repr(text), "write a size such as 5GB or 500MB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def _quant_spec(lineage: Lineage) -> QuantSpec | None:
    quantization = lineage.quantization
    if quantization is None:
        return None
    return QuantSpec(
        quant_type=quantization.quant_type,
        double_quant=quantization.double_quant,
        blocksize=quantization.blocksize,
        source_dtype=quantization.source_dtype,
    )


def _carry_chat(lineage: Lineage, context: Context) -> None:
    """Copies tokenizer, template and generation config of the newest adapter, and proves them from disk."""
    newest = lineage.adapters[-1].folder
    copy_side_files(newest, context.folder)
    template = read_folder_template(newest)
    if template is None:
        raise ChatError(str(newest), "has no chat template", "train the adapter again")
    verify_saved(context.folder, template.digest, None, probe_ids(load_tokenizer(newest), template))


def _certify(
    config: Merge, context: Context, machine: Machine, lineage: Lineage, base_mode: str, dtype: str
) -> Certificate:
    """Compares the merged files with the adapter in use, both computing as training did."""
    policy = load_policy(lineage, machine.dtype, machine.device, machine.attn_implementation)
    coarser = dtype if dtype != "float32" else DTYPE_NAMES[context.precision]
    asked: dict[str, Any] = config.certificate.model_dump()
    limits = default_limits(coarser, lineage.quantization is not None, base_mode).over(Limits(**asked))
    return certify_merge(
        context.folder, policy, read_probe_rows(lineage.adapters[-1].folder), limits, dtype=machine.dtype
    )
