"""The command line: thin, and nothing heavy is imported before a command needs it."""

from __future__ import annotations

import json
import os
import shlex
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from posttrain.errors import Interrupted, PosttrainError, UserError

if TYPE_CHECKING:
    from posttrain.estimate.devices import GpuModel
    from posttrain.pipeline.plan import Plan
    from posttrain.recipe.load import LoadedRecipe
    from posttrain.stages.samples import Samples

app = typer.Typer(
    name="posttrain",
    help="One recipe from a foundational checkpoint to an instruct and an aligned model, every hand-off proved.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="Bundled recipe's name, or a YAML file.")]
RunsDir = Annotated[Path, typer.Option("--runs-dir", help="Folder of all runs.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one setting, e.g. stages.dpo.trainer.beta=0.1."),
]
DEFAULT_RUNS = Path("runs")


class Executor(StrEnum):
    """Where the stages of a run are started."""

    local = "local"
    slurm = "slurm"


@app.command()
def run(
    recipe: RecipeArgument,
    runs_dir: RunsDir = DEFAULT_RUNS,
    overrides: Overrides = None,
    redo: Annotated[
        list[str] | None, typer.Option("--redo", metavar="STAGE", help="Run it again, and what depends on it.")
    ] = None,
    until: Annotated[str | None, typer.Option("--until", metavar="STAGE", help="Stop after this stage.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would run, and stop.")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Recompute the SHA-256 of inputs and outputs.")] = False,
    other_versions: Annotated[
        bool, typer.Option("--other-versions", help="Resume checkpoints that other library versions wrote.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False,
    executor: Annotated[
        Executor, typer.Option("--executor", help="Where stages run: here, or each as a job of a Slurm cluster.")
    ] = Executor.local,
    paths_from: Annotated[
        Path | None, typer.Option("--paths-from", metavar="DIR", hidden=True, help="Folder of a copied recipe's paths.")
    ] = None,
) -> None:
    """Run a recipe: finished stages are skipped, unfinished ones resumed.

    With --executor slurm everything is planned, checked and fetched now, and a job is submitted for each stage
    that must run, sized by runtime (num_machines, num_processes, threads) and runtime.slurm: see docs/slurm.md.
    """
    from posttrain import torchrun
    from posttrain.console import open_console
    from posttrain.pipeline.plan_table import plan_text
    from posttrain.pipeline.run import Request, run_recipe

    if torchrun.follows():
        raise typer.Exit(torchrun.follow())
    loaded = _load(recipe, overrides, paths_from)
    request = Request(tuple(redo or ()), until, verify, other_versions)
    if dry_run:
        planned = request.plan(loaded, runs_dir / loaded.recipe.name)
        typer.echo(plan_text(planned))
        planned.refuse()
        return
    if executor is Executor.slurm:
        from posttrain.slurm.submit import submit_recipe
        from posttrain.slurm.table import show_jobs

        jobs = submit_recipe(loaded, runs_dir, request, overrides or [], lambda text: typer.echo(text, err=True))
        show_jobs(jobs, sys.stdout, quiet)
        return
    console = open_console(quiet)
    try:
        run_recipe(loaded, runs_dir, request, console)
    except Interrupted as error:
        again = ["posttrain", "run", recipe, *(["--runs-dir", str(runs_dir)] if runs_dir != DEFAULT_RUNS else [])]
        again += [word for override in overrides or [] for word in ("--set", override)]
        job = "it goes on from its checkpoint when the job is requeued, or the run submitted again"
        raise Interrupted(error.where, error.found, job if paths_from else f"go on with: {shlex.join(again)}") from None
    finally:
        console.close()


@app.command()
def check(
    recipe: RecipeArgument,
    runs_dir: RunsDir = DEFAULT_RUNS,
    overrides: Overrides = None,
    show: Annotated[
        int | None,
        typer.Option("--show", metavar="N", min=1, help="Show the first N rows of training, token by token."),
    ] = None,
    stage_name: Annotated[
        str | None, typer.Option("--stage", metavar="STAGE", help="With --show: of this sft or dpo stage only.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="With --show: as an HTML page instead.")
    ] = None,
    gpu: Annotated[
        str | None, typer.Option("--gpu", metavar="NAME|SIZE", help="Estimate for this one: 24GB, h200, rtx4090…")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the estimate as JSON, and nothing else.")] = False,
) -> None:
    """Check a recipe without running it: its settings, its inputs, what a run would do and what it needs."""
    from posttrain.estimate.devices import find_device
    from posttrain.pipeline.plan import plan
    from posttrain.pipeline.plan_table import check_text
    from posttrain.pipeline.preflight import preflight
    from posttrain.stages.samples import Samples

    if show is None and (stage_name or html):
        raise UserError("--stage" if stage_name else "--html", "does not say how many rows", "add e.g. --show 3")
    if html is not None and not html.absolute().parent.is_dir():
        raise UserError(f"--html {html}", "its folder does not exist", "make the folder first")
    if as_json and show:
        raise UserError("--json", "prints the estimate alone", "leave out --show")
    device = find_device(gpu) if gpu is not None else None
    loaded = _load(recipe, overrides)
    planned = plan(loaded, runs_dir / loaded.recipe.name, leave_open=show is None)
    if not as_json:
        typer.echo(check_text(loaded, planned))
    planned.refuse()
    samples = Samples()
    preflight(loaded, planned, samples)
    if show:
        from posttrain.pipeline.show_rows import show_rows

        told = show_rows(planned, show, stage_name, html, lambda text: typer.echo(text, err=True))
        typer.echo(told, nl=False)
    _show_forecast(planned, device, samples, as_json)


@app.command()
def doctor(
    checkpoint: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="Folder, or hub id (owner/name@revision).")],
    template: Annotated[
        str | None, typer.Option("--template", metavar="NAME|FILE", help="Judge this chat template, not the folder's.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option("--data", metavar="FILE", help="Check these conversations or pairs against it.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--fix", metavar="OUT", help="Write a repaired copy into this new folder.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the diagnosis as JSON.")] = False,
) -> None:
    """Find what tokenizer, template, configs, weights and data of a checkpoint disagree about, and mend it."""
    from dataclasses import asdict

    from posttrain.doctor.checkpoint import find_checkpoint
    from posttrain.doctor.diagnose import diagnose
    from posttrain.doctor.show import spell, spell_repair

    folder = find_checkpoint(checkpoint)
    diagnosis = diagnose(folder, template, data)
    repair = None
    if out is not None:
        from posttrain.doctor.fix import fix

        repair = fix(folder, out, template, Path())
    if as_json:
        told = diagnosis.as_dict()
        if repair is not None:
            told |= {"fixed": str(out), "changes": list(repair.changes), "left": [asdict(one) for one in repair.left]}
        typer.echo(json.dumps(told, indent=2, ensure_ascii=False))
    else:
        lines = [*spell(diagnosis), *([] if repair is None else spell_repair(str(out), repair.changes, repair.left))]
        typer.echo("\n".join(lines))
    left = diagnosis.findings if repair is None else repair.left
    if any(finding.severity == "error" for finding in left):
        raise typer.Exit(1)


@app.command()
def merge(
    models: Annotated[list[str], typer.Argument(metavar="ADAPTER_OR_MODEL...", help="Folders, or hub ids.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="New folder for the merged model.")],
    base: Annotated[
        str | None, typer.Option("--base", help="Of 4-bit adapters: original, dequantized (default) or auto.")
    ] = None,
    base_model: Annotated[
        str | None, typer.Option("--base-model", metavar="DIR", help="Base of adapters without a record of ours.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="bfloat16, float16 or float32; default: the base's.")
    ] = None,
    max_shard_size: Annotated[str, typer.Option("--max-shard-size", help="Most bytes of a file.")] = "5GB",
    method: Annotated[
        str | None,
        typer.Option("--method", help="Combine: scale, linear, slerp, task_arithmetic, ties, dare_linear, dare_ties."),
    ] = None,
    weight: Annotated[list[float] | None, typer.Option("--weight", help="One for each model, in order.")] = None,
    density: Annotated[float | None, typer.Option("--density", help="ties, dare: share of a delta that stays.")] = None,
    t: Annotated[float | None, typer.Option("--t", help="slerp: from 0, the first model, to 1, the second.")] = None,
    scale: Annotated[
        str | None, typer.Option("--scale", metavar="A[,A...]", help="W + A * delta; several: a sweep with a table.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="dare: decides what is dropped.")] = 42,
    rows: Annotated[
        Path | None,
        typer.Option("--rows", metavar="FILE", help="Compare on these rows, not on those a stage kept."),
    ] = None,
    certificate: Annotated[bool, typer.Option("--certificate/--no-certificate", help="Compare logits.")] = True,
    extract: Annotated[
        int | None, typer.Option("--extract", metavar="RANK", min=1, help="The reverse: a model into an adapter.")
    ] = None,
) -> None:
    """Merge adapters into their base, or combine models, from files, and certify what was written."""
    scales = _numbers("--scale", scale) if scale is not None else ()
    from posttrain.stages.merge_command import Request, run_merge

    request = Request(
        models=tuple(models),
        out=out,
        base=base,
        base_model=base_model,
        dtype=dtype,
        max_shard_size=max_shard_size,
        method=method,
        weights=tuple(weight or ()),
        density=density,
        t=t,
        scales=scales,
        seed=seed,
        rows=rows,
        certificate=certificate,
        extract=extract,
    )
    done = run_merge(request, lambda text: typer.echo(text, err=True))
    typer.echo("\n".join(done.lines))
    if done.failed:
        raise typer.Exit(1)


@app.command()
def rehearse(
    recipe: RecipeArgument,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for the rehearsal; a temporary one if absent.")
    ] = None,
    overrides: Overrides = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False,
) -> None:
    """Run all stages of a recipe on the CPU with a tiny twin of its model and a few rows."""
    import shutil
    import tempfile

    from posttrain import rehearse as rehearsal
    from posttrain.console import open_console

    loaded = _load(recipe, overrides)
    folder = out or Path(tempfile.mkdtemp(prefix="posttrain-rehearsal-"))
    console = open_console(quiet)
    try:
        rehearsal.rehearse(loaded, folder, console)
    finally:
        console.close()
    if out is None:
        shutil.rmtree(folder)  # kept when something failed: its logs are there


@app.command("init")
def init_(
    model: Annotated[str | None, typer.Option("--model", help="Folder, or hub id (owner/name@revision).")] = None,
    data: Annotated[
        list[str] | None,
        typer.Option("--data", help="File, folder or owner/name[:split]; twice for both: conversations, then pairs."),
    ] = None,
    task: Annotated[str | None, typer.Option("--task", help="sft, dpo or both.")] = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="New YAML file.")] = None,
) -> None:
    """Write a commented recipe from four answers; asks for those that are missing."""
    given = {"--model": model, "--data": data, "--task": task, "--out": out}
    if (missing := [name for name, value in given.items() if not value]) and not sys.stdin.isatty():
        raise UserError(", ".join(missing), "not given, and nobody is there to ask", "see posttrain init --help")
    model = model or str(typer.prompt("model (folder, or owner/name of the hub)"))
    task = task or str(typer.prompt("task (sft, dpo or both)", default="both"))
    data = data or shlex.split(typer.prompt("data (for both: conversations, then pairs)"))
    out = out or Path(typer.prompt("write to", default="recipe.yaml"))
    from posttrain.draft import init_recipe

    typer.echo("\n".join([*(draft := init_recipe(model, data, task, out)).chosen, f"wrote {draft.path}"]))
    typer.echo(f"next: posttrain check {draft.path}, then posttrain rehearse {draft.path}")


@app.command()
def schema() -> None:
    """Print the JSON Schema of recipes, with which editors complete and check them."""
    from posttrain.recipe.json_schema import recipe_schema

    typer.echo(json.dumps(recipe_schema(), indent=2, ensure_ascii=False))


@app.command()
def runs(runs_dir: RunsDir = DEFAULT_RUNS) -> None:
    """List the runs, their stages and their sizes."""
    from posttrain.runs import list_runs, spell_bytes

    for found in list_runs(runs_dir):
        typer.echo(f"{found.folder.name}  {spell_bytes(found.bytes)}")
        for stage in found.stages:
            typer.echo(f"  {stage.name:<16} {stage.state:<10} {spell_bytes(stage.bytes):>9}  {stage.headline}".rstrip())


@app.command()
def prune(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="One run; all when absent.")] = None,
    runs_dir: RunsDir = DEFAULT_RUNS,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Remove what was moved aside, checkpoints of finished stages and leftovers, after asking."""
    from posttrain.runs import list_runs, removable, remove, spell_bytes

    folders = [found.folder for found in list_runs(runs_dir)]
    if name is not None and runs_dir / name not in folders:
        raise UserError(str(runs_dir / name), "no such run", "see `posttrain runs`")
    found = {folder: removable(folder) for folder in folders if name in (None, folder.name)}
    items = [item for several in found.values() for item in several]
    for item in items:
        typer.echo(f"{spell_bytes(item.bytes):>9}  {item.path}  ({item.why})")
    if not items:
        typer.echo("nothing to remove")
        return
    total = spell_bytes(sum(item.bytes for item in items))
    if not yes and not typer.confirm(f"remove these {len(items)}, {total} in all?"):
        raise typer.Exit(1)
    for folder, several in found.items():
        if several:
            remove(folder, several)
    typer.echo(f"removed {total}")


@app.command()
def version() -> None:
    """Print the version of posttrain and of the libraries it stands on."""
    from posttrain.stages.provenance import versions

    for library, installed in versions().items():
        typer.echo(f"{library} {installed}")


def _numbers(option: str, text: str) -> tuple[float, ...]:
    """Reads `0.25,0.5,1`."""
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"{option} {text}", "is no list of numbers", "write e.g. 0.25,0.5,1") from None
    if len(set(found)) != len(found) or not all(abs(number) < 1e6 for number in found):
        raise UserError(f"{option} {text}", "names one twice, or one that is no usable number", "write e.g. 0.25,0.5,1")
    return found


def _load(recipe: str, overrides: list[str] | None, folder: Path | None = None) -> LoadedRecipe:
    from posttrain.recipe.load import load_recipe

    return load_recipe(recipe, overrides or [], os.environ, folder)


def _show_forecast(planned: Plan, device: GpuModel | None, samples: Samples, as_json: bool) -> None:
    """Prints what a run needs; UserError where a stage will not fit the device that it is meant for."""
    from posttrain.pipeline.forecast import forecast, no_room
    from posttrain.pipeline.forecast_table import forecast_text

    found = forecast(planned, device, samples)
    typer.echo(json.dumps(found.as_dict(), indent=2) if as_json else f"\n{forecast_text(found)}")
    if found.too_large and found.device is not None and found.settled:
        raise UserError(found.device.name, no_room(found), "change the recipe, or name another device with --gpu")


def main() -> None:
    """Entry point: a mistake is one message on stderr and an exit code, never a traceback."""
    try:
        app()
    except PosttrainError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
