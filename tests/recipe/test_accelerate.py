"""Accelerate configs: found by path or bare name, and read as far as the house must know them."""

from __future__ import annotations

from pathlib import Path

import pytest

from posttrain.errors import RecipeError, UserError
from posttrain.recipe.accelerate import find_accelerate_config, read_spread
from posttrain.recipe.bundled import bundled_folder, find_bundled, list_bundled

LOCAL = "compute_environment: LOCAL_MACHINE\n"


def written(folder: Path, text: str, name: str = "mine.yaml") -> Path:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


class TestFind:
    def test_a_bare_name_is_a_bundled_one(self, tmp_path: Path) -> None:
        assert find_accelerate_config("ddp", tmp_path) == bundled_folder("recipes/accelerate") / "ddp.yaml"

    @pytest.mark.parametrize("name", ["launch/mine.yaml", "./launch/mine.yaml", "launch/../launch/mine.yaml"])
    def test_a_path_starts_at_the_recipes_folder(self, name: str, tmp_path: Path) -> None:
        path = written(tmp_path, LOCAL, "launch/mine.yaml")
        assert find_accelerate_config(name, tmp_path) == path
        assert find_accelerate_config(str(path), Path("/elsewhere")) == path

    def test_a_file_of_the_recipes_folder_comes_before_a_bundled_one(self, tmp_path: Path) -> None:
        path = written(tmp_path, LOCAL, "ddp")
        assert find_accelerate_config("ddp", tmp_path) == path

    def test_a_home_folder_is_spelled_out(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        path = written(tmp_path, LOCAL)
        assert find_accelerate_config("~/mine.yaml", Path("/")) == path

    @pytest.mark.parametrize("name", ["mine.yaml", "launch/mine", "ddp.yaml"])
    def test_a_path_that_is_not_there_names_the_bundled_ones(self, name: str, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="no file") as refused:
            find_accelerate_config(name, tmp_path)
        assert str(tmp_path / name) in refused.value.found
        assert "ddp, " in refused.value.todo

    def test_a_bare_name_that_is_none_gets_the_nearest(self, tmp_path: Path) -> None:
        with pytest.raises(UserError) as refused:
            find_accelerate_config("fdsp2", tmp_path)
        assert "fsdp2" in refused.value.todo


class TestRead:
    @pytest.mark.parametrize("name", list_bundled("recipes/accelerate"))
    def test_bundled_ones_are_what_they_are_called(self, name: str) -> None:
        kind = "ddp" if name == "ddp" else "fsdp" if name.startswith("fsdp") else "deepspeed"
        assert read_spread(find_bundled("recipes/accelerate", name)) == kind

    @pytest.mark.parametrize(
        ("text", "spread"),
        [
            ("distributed_type: 'NO'\n", "ddp"),
            ("distributed_type: MULTI_CPU\n", "ddp"),
            ("distributed_type: MULTI_GPU\n", "ddp"),
            (LOCAL + "distributed_type: FSDP\nfsdp_config: {fsdp_version: 2}\n", "fsdp"),
            (LOCAL + "distributed_type: FSDP\nfsdp_config: {fsdp_version: '2'}\n", "fsdp"),
            (LOCAL + "distributed_type: DEEPSPEED\ndeepspeed_config: {zero_stage: 3}\n", "deepspeed"),
        ],
    )
    def test_how_it_spreads(self, text: str, spread: str, tmp_path: Path) -> None:
        assert read_spread(written(tmp_path, text)) == spread

    @pytest.mark.parametrize(
        ("text", "says"),
        [
            ("", "distributed_type is None"),
            ("- MULTI_GPU\n", "distributed_type is None"),
            ("distributed_type: TPU\n", "distributed_type is 'TPU'"),
            ("distributed_type: MEGATRON_LM\n", "distributed_type is 'MEGATRON_LM'"),
            ("distributed_type: [FSDP]\n", "distributed_type is ['FSDP']"),
            ("compute_environment: AMAZON_SAGEMAKER\ndistributed_type: MULTI_GPU\n", "AMAZON_SAGEMAKER"),
            ("distributed_type: FSDP\nfsdp_config: {fsdp_version: 1}\n", "not of FSDP2"),
            ("distributed_type: FSDP\nfsdp_config: {fsdp_sharding_strategy: FULL_SHARD}\n", "not of FSDP2"),
            ("distributed_type: FSDP\n", "not of FSDP2"),
            ("distributed_type: FSDP\nfsdp_config: [2]\n", "not of FSDP2"),
        ],
    )
    def test_what_no_stage_can_do_is_refused(self, text: str, says: str, tmp_path: Path) -> None:
        path = written(tmp_path, text)
        with pytest.raises(RecipeError) as refused:
            read_spread(path)
        assert refused.value.where == str(path)
        assert says in refused.value.found

    @pytest.mark.parametrize("text", ["distributed_type: [MULTI_GPU\n", "a: 1\na: 2\n", "\tdistributed_type: NO\n"])
    def test_what_is_no_yaml_has_its_line(self, text: str, tmp_path: Path) -> None:
        path = written(tmp_path, text)
        with pytest.raises(UserError) as refused:
            read_spread(path)
        assert refused.value.where.startswith(f"{path}:")
