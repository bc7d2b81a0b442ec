"""A self-contained model folder that plain transformers loads, with its card and checksums."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from itertools import dropwhile
from pathlib import Path
from typing import Any

from posttrain.artifact import publish_folder, sha256, write_atomically
from posttrain.chat.contract import EndOfTurn, end_of_turn
from posttrain.chat.render import render_prompt
from posttrain.chat.templates import load_template
from posttrain.chat.tokenizer import load_tokenizer
from posttrain.errors import ChatError, CheckpointError, UserError
from posttrain.models.files import verify_model_files
from posttrain.recipe import schema
from posttrain.report.card import Card, model_card
from posttrain.report.history import history
from posttrain.stages.context import Context, ModelInput, Summary
from posttrain.stages.parents import model_folder
from posttrain.stages.publish_snapshots import carry_order, push_snapshots, snapshot_files, snapshot_steps
from posttrain.stages.run_loop import SNAPSHOTS

SUMS = "SHA256SUMS"
_NEEDED = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
_WANTED = (
    *_NEEDED,
    "*.safetensors",
    "*.safetensors.index.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_templates/*.jinja",
    "LICENSE*",
    "NOTICE*",
    "certificate.json",
    "certificate.md",
)
_PROBE = [{"role": "user", "content": "What is the Basque Country?"}]


def run(config: schema.Publish, context: Context) -> Summary:
    """Gathers, checks, describes and sums up a standalone model; copies it to `to` and pushes it to `hub`.

    Raises:
        CheckpointError: the input is an adapter, lacks files, or plain transformers does not load it.
        ChatError: it would not stop at its end of turn, or renders prompts differently from our path.
        UserError: `to` holds something else.
    """
    context.clock.enter("saving")
    given = context.inputs["model"]
    source = model_folder(given)
    target = Path(config.to) if config.to else None
    _refuse_foreign(target)
    context.events("phase", text="gathering files")
    chats = given.artifact is None or given.artifact.record.kind != "pretrain"
    files = gather(source, context.folder, chats)
    files += _carry_recipe(context.run_dir, context.folder)
    steps: list[int] = []
    if config.snapshots:
        steps = snapshot_steps(source, f"stages.{context.stage}.snapshots")
        for path in snapshot_files(source, steps):
            files.append(str(_link(path, context.folder / path.relative_to(source)).relative_to(context.folder)))
        files += carry_order(source, context.folder)
    context.events("phase", text="loading it with plain transformers")
    context.clock.enter("proofs")
    stop = verify(context.folder, chats)
    context.clock.enter("saving")

    card = _card(config, context, given, stop if chats else None, steps)
    write_atomically(context.folder / "README.md", model_card(card))
    files.append("README.md")
    write_sums(context.folder, files)
    files.append(SUMS)
    if target is not None:
        context.events("phase", text=f"copying to {target}")
        copy_to(context.folder, files, target)
    if config.hub:
        context.events("phase", text=f"pushing to {config.hub}")
        push(context.folder, files, config.hub, config.private, steps)
    size = sum((context.folder / name).stat().st_size for name in files)
    places = [str(place) for place in (config.to, config.hub) if place]
    line = f"{card.name}: {len(files)} files, {size / 1e6:.1f} MB, loads with plain transformers"
    return Summary(
        f"{line} → {', '.join(places)}" if places else line,
        sorted(files),
        metrics={"files": len(files), "bytes": size, "end_of_turn": stop.text},
        lineage=given.artifact.record.lineage if given.artifact else None,
    )


def gather(source: Path, folder: Path, chats: bool = True) -> list[str]:
    """Links (or copies) a model's files into a folder; returns their names, relative to it.

    Args:
        chats: whether it must have a chat template.

    Raises:
        CheckpointError: an adapter, or a model without weights, tokenizer, template or generation config.
    """
    if (source / "adapter_config.json").is_file():
        raise CheckpointError(str(source), "is an adapter, not a standalone model", "publish a `merge` stage of it")
    found = sorted({path for pattern in _WANTED for path in source.glob(pattern) if path.is_file()})
    needed = [name for name in _NEEDED if chats or name != "chat_template.jinja"]
    missing = [name for name in needed if source / name not in found]
    if not any(path.suffix == ".safetensors" for path in found):
        missing.append("*.safetensors")
    if missing:
        raise CheckpointError(str(source), f"lacks {', '.join(missing)}", "publish a model that a stage left")
    return [str(_link(path, folder / path.relative_to(source)).relative_to(folder)) for path in found]


def _link(path: Path, target: Path) -> Path:
    """Hard link, or copy where the file system has none; an earlier attempt's file is replaced."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(path.resolve(), target)  # resolved: the hub cache holds links
    except OSError:
        shutil.copyfile(path, target)
    return target


def _carry_recipe(run_dir: Path, folder: Path) -> list[str]:
    """Copies the run's recipe as it ran, but for its head: the comment there names folders of this machine."""
    recipe = run_dir / "recipe.yaml"
    if not recipe.is_file():
        return []
    lines = recipe.read_text(encoding="utf-8").splitlines(keepends=True)
    write_atomically(folder / recipe.name, "".join(dropwhile(lambda line: line.startswith("#"), lines)))
    return [recipe.name]


def verify(folder: Path, chats: bool = True) -> EndOfTurn:
    """Loads a folder as a stranger would, and returns its end of turn; of a base model, what ends a document.

    Args:
        chats: whether it has a chat template to be proven; else the ids of a plain text are.

    Raises:
        CheckpointError: transformers does not load it, or finds missing or unexpected weights.
        ChatError: the end of turn is not a stop of `generation_config.json`, or the saved template makes
            other prompts than the path that trained.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    verify_model_files(folder)
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", use_safetensors=True, output_loading_info=True
        )
        plain = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(str(folder), f"plain transformers does not load it: {error}") from None
    wrong = {key: sorted(map(str, names)) for key, names in loading.items() if names and key != "error_msgs"}
    if wrong:
        raise CheckpointError(str(folder), f"weights do not match the config: {json.dumps(wrong)}")

    tokenizer = load_tokenizer(folder)
    template = load_template("chat_template.jinja", folder) if chats else None
    stop = end_of_turn(tokenizer, template) if template else EndOfTurn(str(tokenizer.eos_token), tokenizer.eos_token_id)
    stops = model.generation_config.eos_token_id
    if stop.id not in (stops if isinstance(stops, list) else [stops]):
        raise ChatError(
            f"{folder}/generation_config.json",
            f"eos_token_id {stops} lacks the end of turn {stop.text!r} ({stop.id}): the model would not stop",
            "publish a model that an sft or merge stage left",
        )
    if template is None:
        theirs, ours = (made(_PROBE[0]["content"])["input_ids"] for made in (plain, tokenizer))
    else:
        theirs = plain.apply_chat_template(_PROBE, add_generation_prompt=True, return_dict=False)
        ours = render_prompt(tokenizer, template, _PROBE)
    if list(theirs) != list(ours):
        raise ChatError(str(folder), f"transformers renders {theirs}, training rendered {ours}", "report this as a bug")
    return stop


def _card(
    config: schema.Publish, context: Context, given: ModelInput, stop: EndOfTurn | None, steps: list[int]
) -> Card:
    records = history(given.artifact) if given.artifact else []
    report = context.inputs.get("report")
    if report is not None and (report.folder is None or not (report.folder / "report.json").is_file()):
        raise UserError(f"stages.{context.stage}.report", f"{report.ref} left no report.json", "name an evaluate stage")
    return Card(
        name=config.hub or f"{context.run_dir.name}-{given.ref.removeprefix('@').rsplit('/', 1)[-1]}",
        records=records,
        base=_base(given, records),
        license=config.license,
        report=json.loads((report.folder / "report.json").read_text(encoding="utf-8"))
        if report is not None and report.folder is not None
        else None,
        end_of_turn=stop.text if stop else None,
        repository=config.hub,
        chats=stop is not None,
        snapshots=steps,
    )


def _base(given: ModelInput, records: list[Any]) -> str | None:
    """Hub id that the oldest record (or the published model itself) started from."""
    if given.artifact is None:
        return given.ref.split("@")[0] if given.folder is None else None
    return next((model["hub"] for record in records if "hub" in (model := record.identity.get("model", {}))), None)


def write_sums(folder: Path, files: Iterable[str]) -> None:
    """Writes SHA256SUMS in the form that `sha256sum -c` reads."""
    write_atomically(folder / SUMS, "".join(f"{sha256(folder / name)}  {name}\n" for name in sorted(files)))


def _refuse_foreign(target: Path | None) -> None:
    """Fails early where `to` exists and was not published by us."""
    if target is not None and target.exists() and not (target / SUMS).is_file():
        raise UserError(str(target), f"exists and has no {SUMS}: not a published model", "name another folder in `to`")


def copy_to(folder: Path, files: list[str], target: Path) -> None:
    """Copies files to a folder that appears under its name only when complete.

    Raises:
        UserError: the folder exists and holds other files than these.
    """
    _refuse_foreign(target)
    if target.exists():
        if _same(folder, files, target):
            return
        raise UserError(str(target), "holds another model", "move it away, or name another folder in `to`")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        for name in files:
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, partial / name)  # no link: the copy is the user's to change
        publish_folder(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _same(folder: Path, files: list[str], target: Path) -> bool:
    return all((target / name).is_file() and sha256(target / name) == sha256(folder / name) for name in files)


def push(
    folder: Path, files: list[str], repository: str, private: bool, steps: Iterable[int] = (), api: Any = None
) -> None:
    """Uploads exactly these files to a hub repository, made if it does not exist; snapshots to branches of their own.

    The token is found by huggingface_hub itself (`hf auth login`, HF_TOKEN); it is never read or recorded here.

    Raises:
        UserError: no token, no right to write there, or no network.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError, LocalTokenNotFoundError

    api, on_main = api or HfApi(), [name for name in files if not name.startswith(f"{SNAPSHOTS}/")]
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repository, folder_path=folder, allow_patterns=on_main, commit_message="Publish with posttrain"
        )
        push_snapshots(folder, list(steps), repository, api)
    except (HTTPError, LocalTokenNotFoundError) as error:
        found = f"cannot be written: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        raise UserError(f"hub: {repository}", found, "check the network and `hf auth login`, then run again") from None
