"""`merge`: adapters, or several models, become one standalone model, from files, with a certificate."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from posttrain.artifact import write_atomically
from posttrain.certify.certificate import Certificate, Limits
from posttrain.certify.comparison import Comparison
from posttrain.certify.handoff import Output, Report, combine_certified, merge_certified
from posttrain.certify.probes import FILE, Probes, join_probes, read_probes, save_probes
from posttrain.errors import RecipeError
from posttrain.merging.methods import Method
from posttrain.models.files import verify_adapter_files, verify_adapter_fits, verify_weight_files
from posttrain.models.lineage import Lineage, Link, lineage_of
from posttrain.models.load import DTYPE_NAMES
from posttrain.recipe.schema import Merge
from posttrain.report.certificate import certificate_page
from posttrain.stages.context import Context, Summary
from posttrain.stages.outputs import model_files
from posttrain.stages.parents import model_folder
from posttrain.stages.setup import Machine, set_up

_MERGING = ("merging", "combining", "writing the base")  # how the lines begin that do not tell of the certificate
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def run(config: Merge, context: Context) -> Summary:
    """Merges in fp32 with one rounding, then compares the files with the adapters in use."""
    context.clock.enter("proofs")
    names = ["model"] if config.model is not None else [f"models.{name}" for name in config.models]
    lineages = [_lineage(name, context) for name in names]
    machine = set_up(context)
    output = Output(
        config.dtype or DTYPE_NAMES[context.precision],
        config.base,
        shard_bytes(config.max_shard_size, f"stages.{context.stage}.max_shard_size"),
    )
    probes = probes_of(lineages)
    comparison = _comparison(config, machine, probes)
    method = method_of(config, context.seed)

    def say(text: str) -> None:
        context.events("phase", text=text)
        context.clock.enter("merging" if text.startswith(_MERGING) else "certificate")
        print(text, flush=True)

    report: Report
    if method is None:
        if not lineages[0].adapters:
            found = f"{context.inputs['model'].ref} is a whole model, there is nothing to merge"
            raise RecipeError(f"stages.{context.stage}.model", found, "leave it out")
        report, certificate = merge_certified(context.folder, lineages[0], output, comparison, say)
    else:
        base = _lineage("base_model", context).base.folder if config.base_model is not None else None
        report, certificate = combine_certified(context.folder, base, lineages, method, output, comparison, say)
    write_atomically(context.folder / "merge_report.json", json.dumps(report.as_dict(), indent=2))
    certificate.save(context.folder, certificate_page(certificate.as_dict()))
    if probes is not None:
        save_probes(context.folder, probes)  # so that what is made of this model can be compared as well
    for line in report.advice():
        context.events("note", text=line)
    return _summary(report, certificate, lineages, context)


def _lineage(label: str, context: Context) -> Lineage:
    """What an input stands on, its files proved whole."""
    given = context.inputs[label]
    lineage = lineage_of(model_folder(given), given.ref)
    verify_weight_files(lineage.base.folder)
    for link in lineage.adapters:
        verify_adapter_files(link.folder)
        verify_adapter_fits(link.folder, lineage.base.folder)
    return lineage


def probes_of(lineages: list[Lineage]) -> Probes | None:
    """The rows that the models brought along, those of the newest part of each; None where one brought none."""
    files = [(lineage.adapters or (lineage.base,))[-1].folder / FILE for lineage in lineages]
    return join_probes([read_probes(file) for file in files]) if all(map(Path.is_file, files)) else None


def method_of(config: Merge, seed: int) -> Method | None:
    """The engine's words for how models are combined; None for the plain chain of one lineage."""
    if config.model is not None:
        return None if config.scale is None else Method("scale", (config.scale,))
    assert config.method is not None  # the schema demands it
    count = len(config.models)
    weights = [config.weights.get(name, 1.0 / count if config.method == "linear" else 1.0) for name in config.models]
    return Method(
        config.method,
        () if config.method == "slerp" else tuple(weights),
        density=config.density,
        t=config.t,
        seed=seed if config.method.startswith("dare") else None,
        normalize=config.normalize,
    )


def _comparison(config: Merge, machine: Machine, probes: Probes | None) -> Comparison | None:
    if probes is None:
        return None
    asked: dict[str, Any] = config.certificate.model_dump(exclude={"mode"})
    return Comparison(probes, machine.device, machine.attn_implementation, config.certificate.mode, Limits(**asked))


def _summary(report: Report, certificate: Certificate, lineages: list[Lineage], context: Context) -> Summary:
    measured = certificate.logits
    found = (
        f"relative error {measured['relative_error']:.1e}, top-1 agreement {measured['top1_agreement']:.4f}"
        if measured
        else "no logits compared with limits"
    )
    kind = certificate.method["kind"]
    what = f"{len(lineages[0].adapters)} adapter(s)" if kind == "chain" else f"{kind} of {len(lineages)} model(s)"
    own = Link(context.run_dir / context.stage, f"@{context.stage}", context.fingerprint)
    return Summary(
        headline=f"{what} into the {certificate.base['mode']} base, {report.dtype}: {found}",
        files=model_files(context.folder),
        digests=certificate.files,
        metrics={
            "adapters": sum(len(lineage.adapters) for lineage in lineages),
            "base": certificate.base,
            "dtype": report.dtype,
            "method": certificate.method,
            "certificate": {key: measured[key] for key in sorted(measured)} if measured else None,
            "rows": certificate.rows,
            "compared": certificate.compared,
            "verdict": certificate.verdict,
            "parameters": report.parameters,
            "total_bytes": report.total_bytes,
            "advice": report.advice(),
            "merged_from": [lineage.as_dict(context.run_dir) for lineage in lineages],
        },
        lineage=Lineage(own).as_dict(context.run_dir),
        failed=[f"certificate: {failure}" for failure in certificate.failures],
    )


def shard_bytes(text: str, where: str) -> int:
    """Reads `5GB`, `500 MB`, `2GiB` as bytes; RecipeError where it cannot."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    if not match or match[2].upper() not in _UNITS or float(match[1]) <= 0:
        raise RecipeError(where, repr(text), "write a size such as 5GB or 500MB")
    return int(float(match[1]) * _UNITS[match[2].upper()])
