"""`posttrain merge`: what a command line means, done by the same hands as the `merge` stage."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import torch

from posttrain.artifact import Artifact
from posttrain.certify.certificate import Certificate
from posttrain.certify.comparison import Comparison
from posttrain.certify.handoff import Base, Output, Report, combine_certified, common_base, merge_certified
from posttrain.certify.probes import save_probes
from posttrain.errors import CheckpointError, UserError
from posttrain.merging.atomic import build_folder
from posttrain.merging.checkpoint import open_checkpoint
from posttrain.merging.extract import extract
from posttrain.merging.methods import Method, check_method
from posttrain.merging.writer import check_space
from posttrain.models.files import read_json, verify_adapter_files, verify_adapter_fits, verify_weight_files
from posttrain.models.hub import HubId, StageRef, fetch_model, parse_reference, resolve
from posttrain.models.lineage import Lineage, Link, lineage_of
from posttrain.report.certificate import certificate_page, sweep_table
from posttrain.stages.given_rows import read_given_rows
from posttrain.stages.merge import probes_of, shard_bytes

Say = Callable[[str], None]
DTYPES = ("bfloat16", "float16", "float32")
METHODS = ("scale", "linear", "slerp", "task_arithmetic", "ties", "dare_linear", "dare_ties")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_ADAPTER = "adapter_config.json"


@dataclass(frozen=True)
class Request:
    """One command line."""

    models: tuple[str, ...]
    out: Path
    base: str | None = None
    base_model: str | None = None
    dtype: str | None = None
    max_shard_size: str = "5GB"
    method: str | None = None
    weights: tuple[float, ...] = ()
    density: float | None = None
    t: float | None = None
    scales: tuple[float, ...] = ()
    seed: int = 42
    rows: Path | None = None
    certificate: bool = True
    extract: int | None = None


@dataclass(frozen=True)
class Done:
    """What to tell at the end."""

    lines: tuple[str, ...]
    failed: bool = False
    """A certificate did not hold: the files stand, the exit code is 1."""


def run_merge(request: Request, say: Say) -> Done:
    """Merges, combines, sweeps or extracts into a new folder that exists only when it is complete.

    Raises:
        UserError: settings that do not fit one another or the models; see the messages.
    """
    _check_words(request)
    base = _locate(request.base_model) if request.base_model is not None else None
    lineages = [_lineage(text, base) for text in request.models]
    if request.extract is not None:
        return _extract(request, lineages, base, request.extract)
    method = _method(request)
    if method is None or method.kind == "scale":
        lineages = [_chain(lineages, whole_models=method is not None)]
    if method is not None:
        check_method(method, len(lineages), base is not None or common_base(lineages) is not None)
    output = Output(
        request.dtype or _stored_dtype(lineages[0].base.folder),
        request.base,  # type: ignore[arg-type]  # checked above
        shard_bytes(request.max_shard_size, "--max-shard-size"),
    )
    comparison = _comparison(request, lineages)
    folders = [link.folder for lineage in lineages for link in (lineage.base, *lineage.adapters)]
    folders += [base] if base is not None else []
    if len(request.scales) > 1:
        return _sweep(request, lineages[0], base, output, comparison, say)
    made: list[tuple[Report, Certificate]] = []

    def write(folder: Path) -> None:
        if method is None:
            made.append(merge_certified(folder, lineages[0], output, comparison, say))
        else:
            made.append(combine_certified(folder, base, lineages, method, output, comparison, say))
        _finish(folder, made[-1][1], comparison)

    build_folder(request.out, folders, write)
    report, certificate = made[0]
    return Done(tuple(_told(request.out, report, certificate)), bool(certificate.failures))


def _check_words(request: Request) -> None:
    """Refuses options that mean nothing, or nothing together."""
    for name, word, known in (
        ("--base", request.base, get_args(Base)),
        ("--dtype", request.dtype, DTYPES),
        ("--method", request.method, METHODS),
    ):
        if word is not None and word not in known:
            raise UserError(name, repr(word), f"take one of {', '.join(known)}")
    if request.out.exists():
        raise UserError(str(request.out), "exists already", "choose another folder, or move it aside")
    if not all(map(math.isfinite, (*request.scales, *request.weights))):
        raise UserError("--scale, --weight", "not a number", "give numbers")
    if len({f"{scale:g}" for scale in request.scales}) < len(request.scales):
        raise UserError("--scale", "one of them twice", "give each once, with at most six digits")
    combines = request.method not in (None, "scale")
    if request.scales and combines:
        raise UserError("--scale", f"together with --method {request.method}", "give --weight for each model")
    if request.method == "scale" and not request.scales:
        raise UserError("--method scale", "without a scale", "give --scale, e.g. 0.5")
    if request.extract is not None and (request.scales or request.method or request.base):
        raise UserError("--extract", "together with --scale, --method or --base", "extract, then merge")
    for name, given in (("--weight", request.weights), ("--density", request.density), ("--t", request.t)):
        if not combines and given not in (None, ()):
            raise UserError(name, "without a --method that uses it", f"give --method: {', '.join(METHODS[1:])}")
    if (request.scales or combines) and request.base == "auto":
        raise UserError("--base auto", "for a combination, which nothing is in use of", "name the base")


def _method(request: Request) -> Method | None:
    """The engine's words for the options; None for a plain chain."""
    kind = "scale" if request.scales else request.method
    if kind is None:
        return None
    if kind == "scale":
        return Method("scale", request.scales[:1])
    default = 1.0 / len(request.models) if kind == "linear" else 1.0
    weights = request.weights or (default,) * len(request.models)
    return Method(
        kind,
        () if kind == "slerp" and not request.weights else weights,
        density=request.density,
        t=request.t,
        seed=request.seed if kind.startswith("dare") else None,
    )


def _locate(text: str) -> Path:
    """The folder of a path or hub id, spelled as in a recipe; a bare name that lies here is a path."""
    if Path(text).expanduser().is_dir():
        return Path(text).expanduser()
    found = parse_reference(text)
    if isinstance(found, HubId):
        return fetch_model(found.id, resolve(found))
    if isinstance(found, StageRef):
        raise UserError(text, "refers to a stage of a recipe", "give the folder: runs/NAME/STAGE")
    raise UserError(text, "no such folder", "give a folder, or owner/name@revision")


def _lineage(text: str, base: Path | None) -> Lineage:
    """What a model stands on: by its record, or (an adapter of another house) by its own word or the user's."""
    folder = _locate(text).resolve()
    artifact = Artifact.read(folder)
    foreign = (folder / _ADAPTER).is_file() and (artifact is None or not artifact.record.lineage)
    lineage = _foreign(folder, text, base) if foreign else lineage_of(folder, text)
    if base is not None and lineage.adapters and lineage.base.folder.resolve() != base.resolve():
        found = f"{base}, but {text} was trained on {lineage.base.label} ({lineage.base.folder})"
        raise UserError("--base-model", found, "leave it out: the adapter's record names its base")
    verify_weight_files(lineage.base.folder)
    for link in lineage.adapters:
        verify_adapter_files(link.folder)
        verify_adapter_fits(link.folder, lineage.base.folder)
    return lineage


def _foreign(folder: Path, text: str, base: Path | None) -> Lineage:
    """An adapter without a record: its base is what the user says, or a hub id that it pins to a commit.

    Raises:
        CheckpointError: nothing proves which base it was trained on.
    """
    config = read_json(folder / _ADAPTER)
    name, commit = config.get("base_model_name_or_path"), config.get("revision")
    if base is not None:
        return Lineage(Link(base, str(base), _fingerprint(base)), (Link(folder, text, None),))
    if isinstance(commit, str) and _COMMIT.fullmatch(commit) and isinstance(name, str) and not Path(name).exists():
        hub = parse_reference(f"{name}@{commit}")
        if isinstance(hub, HubId):
            return Lineage(Link(fetch_model(name, commit), str(hub), None), (Link(folder, text, None),))
    raise CheckpointError(
        str(folder / _ADAPTER),
        f"names its base {name!r}, and nothing proves which weights those were",
        "give the folder of the base that it was trained on: --base-model DIR",
    )


def _fingerprint(folder: Path) -> str | None:
    artifact = Artifact.read(folder)
    return artifact.record.fingerprint if artifact else None


def _chain(lineages: list[Lineage], whole_models: bool) -> Lineage:
    """One lineage of several on one base, their adapters in the given order, each once."""
    first = lineages[0]
    for lineage in lineages:
        if not lineage.adapters and not (whole_models and len(lineages) == 1):
            todo = "give an adapter, or combine models with --method"
            raise UserError(lineage.base.label, "is a whole model, there is nothing to merge", todo)
        if lineage.base.folder.resolve() != first.base.folder.resolve():
            found = f"stands on {lineage.base.folder}, {first.adapters[-1].label} on {first.base.folder}"
            raise UserError(lineage.adapters[-1].label, found, "a chain has one base; combine models with --method")
        if lineage.quantization != first.quantization:
            found = "and the one before it were trained on one base quantised in two ways"
            raise UserError(lineage.adapters[-1].label, found, "combine them with --method and --base original")
    links = {link.folder.resolve(): link for lineage in lineages for link in lineage.adapters}
    return replace(first, adapters=tuple(links.values()))


def _stored_dtype(folder: Path) -> str:
    """The dtype that a model is stored in; bfloat16 where its config does not say."""
    config = open_checkpoint(folder).config
    word = config.get("dtype") or config.get("torch_dtype")
    return word if word in DTYPES else "bfloat16"


def _comparison(request: Request, lineages: list[Lineage]) -> Comparison | None:
    """On what the files are compared: the user's rows, or those that the models brought along."""
    if not request.certificate:
        return None
    newest = (lineages[-1].adapters or (lineages[-1].base,))[-1].folder
    if request.rows is not None:
        has_tokenizer = any((newest / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
        probes = read_given_rows(request.rows, newest if has_tokenizer else lineages[-1].base.folder)
    else:
        found = probes_of(lineages)
        if found is None:
            todo = "give --rows FILE (texts, conversations or pairs), or do without: --no-certificate"
            raise UserError(newest.name, "brought no rows to compare the merged files on", todo)
        probes = found
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Comparison(probes, device)


def _finish(folder: Path, certificate: Certificate, comparison: Comparison | None) -> None:
    certificate.save(folder, certificate_page(certificate.as_dict()))
    if comparison is not None:
        save_probes(folder, comparison.probes)


def _sweep(
    request: Request,
    lineage: Lineage,
    base: Path | None,
    output: Output,
    comparison: Comparison | None,
    say: Say,
) -> Done:
    """Writes W + a d for several a into folders below one, and tells what each costs and gains on the rows."""
    stored = open_checkpoint(lineage.base.folder).tensors.values()
    size = sum(info.numel for info in stored) * (4 if output.dtype == "float32" else 2)
    parent = next(folder for folder in (request.out.absolute(), *request.out.absolute().parents) if folder.exists())
    check_space(parent, size * len(request.scales), shutil.disk_usage(parent).free)
    made: dict[str, Certificate] = {}

    def write(folder: Path) -> None:
        for scale in request.scales:
            place = folder / f"scale-{scale:g}"
            place.mkdir()
            say(f"scale {scale:g}")
            method = Method("scale", (scale,))
            _, made[f"{scale:g}"] = combine_certified(place, base, [lineage], method, output, comparison, say)
            _finish(place, made[f"{scale:g}"], comparison)

    build_folder(request.out, [link.folder for link in (lineage.base, *lineage.adapters)], write)
    figures = {scale: certificate.as_dict() for scale, certificate in made.items()}
    failed = [f"scale {scale}: {line}" for scale, one in made.items() for line in one.failures]
    return Done((f"{request.out}: {len(made)} models", *sweep_table(figures), *failed), bool(failed))


def _extract(request: Request, lineages: list[Lineage], base: Path | None, rank: int) -> Done:
    """An adapter of a rank out of one whole model and its base."""
    if base is None or len(lineages) != 1 or lineages[0].adapters:
        raise UserError("--extract", "needs one whole model and --base-model", "give the model and the base it left")
    tuned = lineages[0].base.folder
    report = extract(base, tuned, request.out, rank, request.dtype or "float32", others="save")
    least = min(report.tensors, key=lambda one: one.energy)
    return Done(
        (
            f"{request.out}: an adapter of rank {rank}, {len(report.tensors)} weights",
            f"it holds {100 * report.energy:.2f} % of the difference (energy); "
            f"least of {least.name}: {100 * least.energy:.2f} %",
            *([f"stored whole: {', '.join(report.saved)}"] if report.saved else []),
        )
    )


def _told(out: Path, report: Report, certificate: Certificate) -> list[str]:
    """The summary: what was written, what was measured, the verdict."""
    kind = certificate.method["kind"]
    lines = [
        f"{out}: {' + '.join(certificate.parts)}{'' if kind == 'chain' else f', by {kind}'}",
        f"{report.parameters:,} parameters in {report.dtype}, {report.total_bytes / 1e9:.2f} GB, "
        f"{len(report.tensors)} tensors changed; base: {certificate.base['mode']}",
    ]
    if certificate.base["relative_error"]:
        errors = certificate.base["relative_error"].items()
        lines.append("relative error of the logits: " + ", ".join(f"{mode} {error:.2e}" for mode, error in errors))
    lines += [f"advice: {line}" for line in certificate.advice]
    lines += [f"does not hold: {line}" for line in certificate.failures]
    return [*lines, f"certificate: {certificate.verdict} ({_measured(certificate)})"]


def _measured(certificate: Certificate) -> str:
    found, rows = certificate.logits, certificate.rows
    if found is None or rows is None:
        return "hashes and rounding; no logits had limits"
    source = {"held_out": "held-out", "training": "training", "given": "given"}[rows["source"]]
    return (
        f"relative error {found['relative_error']:.2e}, KL {found['mean_kl']:.2e}, "
        f"top-1 agreement {found['top1_agreement']:.4f} on {rows['rows']} {source} rows"
    )
