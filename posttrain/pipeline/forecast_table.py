"""A forecast as plain text: one table that fits 100 columns, and sentences below it."""

from __future__ import annotations

from posttrain.console import duration
from posttrain.pipeline.forecast import Forecast, StageForecast, no_room
from posttrain.pipeline.forecast_rows import Rows

GIB, GB = 1 << 30, 10**9
_HEAD = ("stage", "params", "trained", "memory", "piece", "largest", "steps", "tokens", "time", "disk")


def forecast_text(found: Forecast) -> str:
    """Spells a forecast for people."""
    device = found.device
    if device is None:
        about = "no GPU is here and the recipe asks for one; --gpu NAME or --gpu 24GB says whether it fits"
    else:
        about = f"on {device.name}, {device.memory / GIB:.1f} GiB"
    rows = [_HEAD, *(_row(stage) for stage in found.stages)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEAD))]
    lines = [
        "  ".join(
            cell.ljust(width) if not column else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    tight = [no_room(found)] if found.too_large and not found.settled else []
    return "\n".join([f"estimate {about}", *lines, *_sentences(found), *tight])


def _row(stage: StageForecast) -> tuple[str, ...]:
    rows, memory = stage.rows, stage.memory
    bound = _bound(rows)
    steps = "~" if bound == "~" else ""
    return (
        stage.stage,
        _count(stage.parameters),
        _count(stage.trainable),
        f"{memory.device / GIB:.1f} GiB" if memory is not None else "",
        _count(stage.piece.tokens) if stage.piece is not None else "",
        "none" if stage.fits is False else _count(stage.largest),
        f"{steps}{rows.steps:,}" if rows is not None and rows.steps is not None else "",
        f"{bound}{_count(rows.tokens)}" if rows is not None and rows.tokens is not None else "",
        f"{bound if stage.time_source != 'measured' else ''}{duration(stage.seconds)}" if stage.seconds else "",
        _size(stage.disk),
    )


def _bound(rows: Rows | None) -> str:
    """The mark of figures that are not counted."""
    if rows is None:
        return ""
    return (
        "<=" if rows.source == "upper bound" else "~" if rows.source in ("sample", "store") and not rows.exact else ""
    )


def _sentences(found: Forecast) -> list[str]:
    lines = []
    total = sum(stage.disk or 0 for stage in found.stages)
    lines.append(f"memory: weights to margin at the peak; piece, largest: tokens at once; disk in all: {_size(total)}")
    times = {stage.time_source for stage in found.stages if stage.seconds}
    if times:
        energy = sum(stage.watt_hours or 0 for stage in found.stages)
        spent = f", about {energy / 1000:.2f} kWh" if energy else ""
        lines.append(f"time: {' and '.join(sorted(times))} throughput{spent}; see docs/estimate.md for what is counted")
    for stage in found.stages:
        if stage.measured_bytes is not None and stage.memory is not None:
            seen, told = stage.measured_bytes / GIB, stage.memory.allocated / GIB
            lines.append(f"{stage.stage}: measured {seen:.2f} GiB when it ran, predicted {told:.2f}")
        if stage.piece is not None and stage.largest is not None and stage.piece.tokens > stage.largest:
            lines.append(f"{stage.stage}: pieces of {stage.piece.tokens} tokens do not fit, {stage.largest} do")
        lines += [f"{stage.stage}: {note}" for note in stage.notes]
        lines += [f"{stage.stage}: {said}" for said in (_of_rows(stage.rows) if stage.rows is not None else [])]
    return lines


def _of_rows(rows: Rows) -> list[str]:
    """How the rows of a stage are known, what is dropped of them, and what pairs share."""
    lines = {
        "unknown": ["rows and tokens are not known before its data are read"],
        "upper bound": ["tokens as if every row had max_length, which is the most"],
        "store": ["tokens as they lie in the run's store"],
        "sample": [f"tokens of a sample of {rows.sampled:,} rows" if rows.sampled is not None else ""],
    }.get(rows.source, [])
    if rows.source in ("sample", "store"):
        if rows.supervised is not None and rows.tokens:
            lines[0] += f", {rows.supervised / rows.tokens:.0%} of them with loss"
        lines[0] += f", the longest row seen {rows.longest:,}"
    if rows.dropped and rows.rows_in and rows.reasons:
        about = _bound(rows)
        why = "; ".join(f"{reason} ({about}{count:,})" for reason, count in rows.reasons.items() if count)
        lines.append(
            f"{about}{rows.dropped:,} of {about}{rows.rows_in:,} rows dropped ({rows.dropped_share:.1%}): {why}"
        )
    if rows.shared and rows.tokens:
        lines.append(f"without the prefixes that pairs share {_bound(rows)}{_count(rows.tokens - rows.shared)} tokens")
    return lines


def _count(number: int | None) -> str:
    if number is None:
        return ""
    for unit, size in (("B", 10**9), ("M", 10**6)):
        if number >= size:
            return f"{number / size:.2f} {unit}" if number < 100 * size else f"{number / size:.0f} {unit}"
    return f"{number:,}" if number < 10**5 else f"{number / 1000:.0f} k"


def _size(size: int | None) -> str:
    if not size:
        return ""
    return f"{size / GB:.1f} GB" if size >= GB / 10 else f"{max(size / 10**6, 0.1):.1f} MB"
