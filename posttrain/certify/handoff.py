"""A merged folder and its certificate: what the `merge` stage and the command share."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from posttrain.artifact import describe_files
from posttrain.certify.certificate import (
    Certificate,
    Limits,
    default_limits,
    eaten_deltas,
    failures,
    grid_allowance,
    stray_numbers,
    verify_bytes,
    worst_first,
)
from posttrain.certify.comparison import Comparison
from posttrain.chat.contract import probe_ids, verify_saved
from posttrain.chat.templates import read_folder_template
from posttrain.chat.tokenizer import load_tokenizer
from posttrain.errors import UserError
from posttrain.merging.checkpoint import open_checkpoint
from posttrain.merging.combine import CombineReport, Input, combine_into
from posttrain.merging.config import SIDE_FILES, copy_side_files
from posttrain.merging.merge import BaseMode, merge_into
from posttrain.merging.methods import Method
from posttrain.merging.quantization import QuantSpec, is_quantised, torch_dtype
from posttrain.merging.report import MergeReport
from posttrain.merging.writer import check_space
from posttrain.models.lineage import Lineage, prove_base

Base = Literal["original", "dequantized", "auto"]
Report = MergeReport | CombineReport
Say = Callable[[str], None]
"""Takes one line for people: what is being done."""
MODES: tuple[BaseMode, ...] = ("dequantized", "original")
_WORK = ".base-"
"""Start of the names of folders inside the merged one that are gone when it is done."""
_TOKENIZER = ("tokenizer.json", "tokenizer.model", "spiece.model", "tekken.json", "vocab.json", "vocab.txt")


@dataclass(frozen=True)
class Output:
    """What the merged files shall be."""

    dtype: str
    base: Base | None = None
    """Base for adapters trained in 4 bits; None: the numbers that training saw."""
    max_shard_size: int = 5 * 10**9


def merge_certified(
    folder: Path, lineage: Lineage, output: Output, comparison: Comparison | None, say: Say
) -> tuple[MergeReport, Certificate]:
    """Merges a base and its chain of adapters into a folder that exists, and compares it with them in use.

    With `auto`, both bases are merged and measured, and the closer one by relative error of the logits stays.

    Args:
        folder: an atomic folder: it gets its final name when this is through.
        comparison: None makes a certificate of hashes and of what rounding left, without logits.

    Raises:
        UserError: `dequantized` for a base that was not quantised, or `auto` without rows to measure on.
        CheckpointError: whatever cannot be merged.
    """
    modes = _modes(output.base, lineage, comparison)
    check_space(folder, len(modes) * _size(lineage, output), shutil.disk_usage(folder).free)
    proved = _proved([lineage], comparison, say)
    reports = {mode: _merge(_place(folder, mode, modes), lineage, mode, output, say) for mode in modes}
    how = comparison.for_size(reports[modes[0]].parameters) if comparison else None
    measured: dict[BaseMode, dict[str, Any]] = {}
    if how:
        say("comparing the files with the adapters in use")
        reference = how.in_use(lineage)
        measured = {mode: how.measure(reference, how.merged(_place(folder, mode, modes))) for mode in modes}
        del reference  # its memory is wanted below
    chosen = min(modes, key=lambda mode: _distance(measured.get(mode)))
    errors = {mode: measured[mode]["relative_error"] for mode in modes} if len(modes) > 1 else None
    if errors:
        _keep(folder, _place(folder, chosen, modes))
        listed = ", ".join(f"{mode} {error:.2e}" for mode, error in errors.items())
        say(f"base: {chosen} is closer to the adapters in use (relative errors: {listed})")
    certificate = _certificate(
        folder,
        reports[chosen],
        how,
        _limits(output.dtype, lineage, chosen, how),
        {
            "method": {"kind": "chain"},
            "base": {"asked": output.base, "mode": chosen, "relative_error": errors, "proved_by": proved},
            "parts": [lineage.base.label, *(link.label for link in lineage.adapters)],
        },
        logits=measured.get(chosen),
        weighed=_weigh(folder, lineage, chosen, output, how, say) if how else None,
    )
    return reports[chosen], certificate


def _weigh(
    folder: Path, lineage: Lineage, mode: BaseMode, output: Output, how: Comparison, say: Say
) -> tuple[dict[str, Any], set[str], float]:
    """Compares the files number by number with the adapters in use on the base that they were merged into.

    Returns:
        The figures, the names of the tensors that training held in 4 bits, and the share of their numbers that
        may be off.
    """
    say("looking at the numbers in the files")
    spec = quant_spec(lineage) if mode == "dequantized" else None
    in_use = lineage if spec else replace(lineage, quantization=None)
    figures = how.weigh(how.in_use(in_use), how.merged(folder), torch_dtype(output.dtype))
    if spec is None:
        return figures, set(), 0.0
    on_grid = {name for name, info in open_checkpoint(lineage.base.folder).tensors.items() if is_quantised(info, spec)}
    return figures, on_grid, grid_allowance(spec.device, how.device)


def combine_certified(
    folder: Path,
    base: Path | None,
    inputs: list[Lineage],
    method: Method,
    output: Output,
    comparison: Comparison | None,
    say: Say,
) -> tuple[CombineReport, Certificate]:
    """Combines several models (or scales one's delta) in a folder that exists, and compares it with each of them.

    Nothing else computes what a combination should, so its figures have no limits: the verdict is about
    files, rounding, and whether transformers loads it.

    Args:
        base: the common base; None: that of the inputs' adapters where they share one.
    """
    common = base or common_base(inputs)
    proved = _proved(inputs, comparison, say)
    quantised = _dequantised_base(folder, common, inputs, output, say)
    say(f"combining by {method.kind}")
    given = [_input(lineage, common) for lineage in inputs]
    report = combine_into(folder, quantised or common, given, method, output.dtype, output.max_shard_size)
    if quantised:
        shutil.rmtree(quantised)
    _carry_chat(folder, inputs[-1])
    how = comparison.for_size(report.parameters) if comparison else None
    measured: dict[str, dict[str, Any]] = {}
    if how:
        candidate = how.merged(folder)
        for number, lineage in enumerate(inputs, start=1):
            name = (lineage.adapters or (lineage.base,))[-1].label
            say(f"comparing with {name}")
            measured[f"{number}: {name}"] = how.measure(how.in_use(lineage), candidate)
    certificate = _certificate(
        folder,
        report,
        how,
        how.limits if how else Limits(),
        {
            "method": asdict(method),
            "base": {
                "asked": output.base,
                "mode": "dequantized" if quantised else "original",
                "relative_error": None,
                "proved_by": proved,
            },
            "parts": [common.name if common else "no base", *(" + ".join(_labels(lineage)) for lineage in inputs)],
        },
        inputs=measured,
    )
    return report, certificate


def _proved(inputs: list[Lineage], comparison: Comparison | None, say: Say) -> list[str]:
    """By what the bases of adapters are known to be theirs; [] where no certificate of it was asked for."""
    if comparison is None:
        return []
    say("proving the base")
    return list(dict.fromkeys(prove_base(lineage) for lineage in inputs if lineage.adapters))


def _labels(lineage: Lineage) -> list[str]:
    return [link.label for link in lineage.adapters or (lineage.base,)]


def _modes(asked: Base | None, lineage: Lineage, comparison: Comparison | None) -> tuple[BaseMode, ...]:
    if lineage.quantization is None:
        if asked == "dequantized":
            raise UserError("base", "dequantized, but the adapters' base was not quantised", "take original")
        return ("original",)
    if asked == "auto":
        if comparison is None:
            raise UserError("base", "auto, and nothing to measure on", "give rows, or name the base")
        return MODES
    return ("dequantized",) if asked is None else (asked,)


def _place(folder: Path, mode: BaseMode, modes: tuple[BaseMode, ...]) -> Path:
    return folder if len(modes) == 1 else folder / f"{_WORK}{mode}"


def _merge(folder: Path, lineage: Lineage, mode: BaseMode, output: Output, say: Say) -> MergeReport:
    say(f"merging into the {mode} base" if lineage.quantization else "merging")
    if folder.name.startswith(_WORK):
        shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed
        folder.mkdir()
    adapters = [link.folder for link in lineage.adapters]
    spec = quant_spec(lineage)
    report = merge_into(folder, lineage.base.folder, adapters, output.dtype, mode, spec, output.max_shard_size)
    _carry_chat(folder, lineage)
    return report


def _keep(folder: Path, chosen: Path) -> None:
    """Moves one of the merges that were tried to its place, and removes the others."""
    for path in chosen.iterdir():
        path.replace(folder / path.name)
    for work in folder.glob(f"{_WORK}*"):
        shutil.rmtree(work)


def _distance(measured: dict[str, Any] | None) -> float:
    """Relative error; NaN is farther than everything."""
    error = measured["relative_error"] if measured else 0.0
    return float("inf") if error != error else error


def quant_spec(lineage: Lineage) -> QuantSpec | None:
    """How a lineage's base was quantised in training, in the engine's words."""
    quantization = lineage.quantization
    if quantization is None:
        return None
    return QuantSpec(
        quant_type=quantization.quant_type,
        double_quant=quantization.double_quant,
        blocksize=quantization.blocksize,
        source_dtype=quantization.source_dtype,
        modules=quantization.modules,
        device=quantization.device,
    )


def common_base(inputs: list[Lineage]) -> Path | None:
    """The base under the adapters of all inputs, or None where one has none or they differ."""
    found = {lineage.base.folder.resolve() if lineage.adapters else None for lineage in inputs}
    return found.pop() if len(found) == 1 else None


def _dequantised_base(
    folder: Path, common: Path | None, inputs: list[Lineage], output: Output, say: Say
) -> Path | None:
    """Writes the numbers that 4-bit training saw, as a base to combine adapters on; None to take it as stored."""
    specs = {quant_spec(lineage) for lineage in inputs}
    if output.base == "auto":
        raise UserError("base", "auto, for a combination, which nothing is in use of", "take original or dequantized")
    if output.base == "original" or (output.base is None and specs == {None}):
        return None
    spec = next(iter(specs)) if len(specs) == 1 else None
    if spec is None or common is None:
        raise UserError("base", "the inputs do not share one base in 4 bits", "set base: original")
    say("writing the base as 4-bit training saw it")
    work = folder / f"{_WORK}dequantized"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    merge_into(work, common, [], spec.source_dtype, "dequantized", spec)  # every number of it is one of that dtype
    return work


def _input(lineage: Lineage, common: Path | None) -> Input:
    adapters = tuple(link.folder for link in lineage.adapters)
    on_common = common is not None and lineage.base.folder.resolve() == common.resolve()
    return Input(None if on_common and adapters else lineage.base.folder, adapters)


def _carry_chat(folder: Path, lineage: Lineage) -> None:
    """Copies tokenizer, template and generation config of the newest part that has a tokenizer.

    Those of a stage of ours are proved from disk; another house's are taken as they are.
    """
    links = [link for link in (lineage.base, *lineage.adapters) if any((link.folder / n).is_file() for n in _TOKENIZER)]
    if not links:
        return
    copy_side_files(links[-1].folder, folder)
    template = read_folder_template(folder)
    if template is not None and links[-1].fingerprint is not None:
        verify_saved(folder, template.digest, None, probe_ids(load_tokenizer(links[-1].folder), template))


def _limits(dtype: str, lineage: Lineage, mode: BaseMode, how: Comparison | None) -> Limits:
    """The defaults, below what the user set."""
    return default_limits(dtype, lineage.quantization is not None, mode).over(how.limits) if how else Limits()


def _size(lineage: Lineage, output: Output) -> int:
    """Bytes of the merged weights, as far as the base's files tell."""
    width = torch_dtype(output.dtype).itemsize
    return width * sum(info.numel for info in open_checkpoint(lineage.base.folder).tensors.values())


def _certificate(
    folder: Path,
    report: Report,
    how: Comparison | None,
    limits: Limits,
    made: dict[str, Any],
    logits: dict[str, Any] | None = None,
    weighed: tuple[dict[str, Any], set[str], float] | None = None,
    inputs: dict[str, dict[str, Any]] | None = None,
) -> Certificate:
    """Adds hashes and verdict: files that are no longer what was written fail it as figures do.

    Args:
        made: `method`, `base` and `parts` of the certificate.
        weighed: as `_weigh`.
    """
    tensors = worst_first(report.tensors)
    carried = [name for name in SIDE_FILES if (folder / name).is_file()]
    carried += [str(path.relative_to(folder)) for path in (folder / "additional_chat_templates").glob("*.jinja")]
    written = {name: seen for name, seen in report.files.items() if name not in carried}
    problems = verify_bytes(folder, written)
    problems += failures(logits, limits) if logits else []
    problems += stray_numbers(weighed[0], limits, report.dtype, *weighed[1:]) if weighed else []
    files = {**describe_files(folder, carried), **written}
    return Certificate(
        merged=folder.name.removesuffix(".partial").removesuffix(".merging"),
        **made,
        dtype=report.dtype,
        rows={"source": how.probes.source, "rows": len(how.probes.rows)} if how else None,
        compared=how.as_dict() if how else None,
        logits=logits,
        weights=weighed[0] if weighed else None,
        inputs=inputs or {},
        limits=limits,
        tensors=tensors,
        advice=report.advice(),
        files=dict(sorted(files.items())),
        failures=problems + eaten_deltas(tensors, limits),
    )
