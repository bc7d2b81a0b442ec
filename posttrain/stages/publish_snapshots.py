"""Snapshots of training published with their data order, as Pythia and LLM360 do: one model per step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from posttrain.errors import CheckpointError, UserError
from posttrain.models.files import model_tensors, verify_model_files
from posttrain.pretraining import metrics, order
from posttrain.stages.run_loop import SNAPSHOTS


def snapshot_steps(source: Path, where: str) -> list[int]:
    """Steps of which a stage's folder holds a model, ascending.

    Raises:
        UserError: none, or adapters.
    """
    folders = [path for path in (source / SNAPSHOTS).glob("step-*") if path.is_dir()]
    if not folders:
        todo = "give the training stage `snapshots`, and publish that very stage"
        raise UserError(where, f"{source.name} left no snapshots", todo)
    if any((path / "adapter_config.json").is_file() for path in folders):
        raise UserError(where, f"the snapshots of {source.name} are adapters", "publish those of a full model")
    return sorted(int(path.name.removeprefix("step-")) for path in folders)


def snapshot_files(source: Path, steps: list[int]) -> list[Path]:
    """Files of all snapshots, proven to be whole and of the same tensors as the model that training ended with.

    Raises:
        CheckpointError: naming the folder.
    """
    files, expected = [], model_tensors(source)
    for step in steps:
        folder = source / SNAPSHOTS / f"step-{step}"
        verify_model_files(folder)
        if model_tensors(folder) != expected:
            raise CheckpointError(str(folder), "holds other tensors than the trained model", "train the stage again")
        files += sorted(path for path in folder.rglob("*") if path.is_file())
    return files


def carry_order(source: Path, folder: Path) -> list[str]:
    """Copies the data order, its files named without folders of this machine, and the log of the steps."""
    order.publish_order(source, folder)
    (folder / metrics.FILE).write_bytes((source / metrics.FILE).read_bytes())
    return [order.FILE, metrics.FILE]


def push_snapshots(folder: Path, steps: list[int], repository: str, api: Any) -> None:
    """Uploads each snapshot to a branch `step-N` of its own that holds nothing else."""
    for step in steps:
        branch = f"step-{step}"
        api.create_branch(repository, branch=branch, exist_ok=True)
        api.upload_folder(
            repo_id=repository,
            folder_path=folder / SNAPSHOTS / branch,
            revision=branch,
            delete_patterns=["*"],  # a branch begins as a copy of main
            commit_message=f"Publish step {step} with posttrain",
        )
