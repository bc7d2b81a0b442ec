"""What a stage gets is what it asked for, or it stops."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from posttrain.errors import StageError
from posttrain.recipe.accelerate import find_accelerate_config
from posttrain.stages.context import Context, ModelInput
from posttrain.stages.parents import model_folder
from posttrain.stages.setup import Machine, assert_spread, set_up
from tests.stages.stage_tiny import make_context


def context(tmp_path: Path, **runtime: object) -> Context:
    return make_context(tmp_path, "sft", "sft", runtime=runtime)


def test_device_attention_dtype_and_threads_are_those_of_the_recipe(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    try:
        assert set_up(context(tmp_path, threads=1)) == Machine("cpu", "sdpa", torch.float32)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(threads)
    assert set_up(context(tmp_path, attn_implementation="eager")).attn_implementation == "eager"


def test_a_gpu_that_is_not_there_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(StageError, match=r"runtime.device is cuda, and torch sees no GPU"):
        set_up(context(tmp_path, device="cuda"))
    assert set_up(context(tmp_path, device="auto")).device == "cpu"


def test_a_number_of_processes_that_did_not_start_stops_the_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StageError, match="1 processes started, the recipe asks for 4"):
        set_up(context(tmp_path, num_processes=4, num_machines=2))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(StageError, match="2 processes started, the recipe asks for 1"):
        set_up(context(tmp_path))


@pytest.mark.parametrize(
    ("config", "processes", "made"),
    [("fsdp2", 1, "asks for fsdp over 1 processes; Accelerate made NO over 1"), (None, 1, None), ("ddp", 1, None)],
)
def test_a_model_that_is_spread_otherwise_than_asked_stops_the_stage(
    tmp_path: Path, config: str | None, processes: int, made: str | None
) -> None:
    path = None if config is None else str(find_accelerate_config(config, tmp_path))
    trainer = SimpleNamespace(accelerator=Accelerator(cpu=True))
    told = context(tmp_path, num_processes=processes, accelerate_config=path)
    if made is None:
        assert_spread(trainer, told)
        return
    with pytest.raises(StageError, match=made):
        assert_spread(trainer, told)


def test_a_folder_is_taken_as_it_is_and_an_id_at_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str, bool]] = []
    monkeypatch.setattr("posttrain.stages.parents.fetch_model", lambda *given: asked.append(given) or tmp_path)
    assert model_folder(ModelInput("./here", tmp_path / "here")) == tmp_path / "here"
    assert model_folder(ModelInput("owner/name@v1", None, "abc")) == tmp_path
    assert model_folder(ModelInput("owner/name@v1", None, "abc"), weights=False) == tmp_path
    assert asked == [("owner/name", "abc", True), ("owner/name", "abc", False)]


def test_an_attention_backend_that_is_not_there_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    for backend in ("flash_attention_2", "flash_attention_3", "flex_attention"):
        with pytest.raises(StageError, match=f"{backend} runs on a GPU only") as raised:
            set_up(context(tmp_path, attn_implementation=backend))
        assert raised.value.todo == "set it to auto, sdpa or eager"
