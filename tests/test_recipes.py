"""Every YAML directly in recipes/ is read, checked and planned, without a network and without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from posttrain.chat.templates import load_template
from posttrain.cli import app
from posttrain.models.hub import HubId, Unreachable, parse_reference
from posttrain.pipeline import inputs
from posttrain.pipeline.plan import Plan, plan
from posttrain.recipe.bundled import find_bundled, list_bundled
from posttrain.recipe.load import LoadedRecipe, load_recipe

ROOT = Path(__file__).resolve().parent.parent
NAMES = list_bundled("recipes")
COMMIT = "c" * 40
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture
def planned(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    """The plan of a fresh run of the recipe of that name; the hub answers every question with one commit."""
    monkeypatch.setattr(inputs, "resolve", lambda hub, kind="model": COMMIT)
    return plan(load_recipe(request.param, [], {}), tmp_path / "runs" / request.param)


def stage_of(recipe: LoadedRecipe, name: str):
    return recipe.recipe.stages[name]


def test_all_recipes_are_bundled() -> None:
    assert {path.stem for path in (ROOT / "recipes").glob("*.yaml")} == set(NAMES)
    assert {"quickstart", "zephyr-7b-qlora", "zephyr-7b-full", "smollm2-1.7b-qlora-16gb"} <= set(NAMES)
    assert {name for name, *_ in SOURCES} <= set(NAMES)


@pytest.mark.parametrize("planned", NAMES, indirect=True)
def test_a_fresh_run_does_every_stage(planned: Plan) -> None:
    assert {stage.action for stage in planned.stages} == {"run"}
    assert len({stage.fingerprint for stage in planned.stages}) == len(planned.stages)


@pytest.mark.parametrize("name", NAMES)
def test_check_passes_without_a_network_and_a_run_does_not(name: str, tmp_path: Path) -> None:
    where = [name, "--runs-dir", str(tmp_path), *([] if name == "quickstart" else ["--gpu", "h200"])]
    checked = CliRunner().invoke(app, ["check", *where], env={"HF_HOME": str(tmp_path / "empty")})
    assert checked.exit_code == 0, checked.output
    assert "estimate on" in checked.output
    assert ("no network" in checked.output) == (name != "quickstart")
    if name != "quickstart":
        with pytest.raises(Unreachable, match="no network"):
            plan(load_recipe(name, [], {}), tmp_path / name)


@pytest.mark.parametrize("name", NAMES)
def test_each_goes_the_whole_way(name: str) -> None:
    recipe = load_recipe(name, [], {}).recipe
    assert recipe.name == name, "the run folder is named after the recipe"
    assert recipe.description
    kinds = [stage.kind for stage in recipe.stages.values()]
    assert {"sft", "dpo", "evaluate", "publish"} <= set(kinds)
    report = next(stage for stage in recipe.stages.values() if stage.kind == "evaluate")
    base = [] if name == "alia-40b-qlora" else ["base"]  # 81 GB of weights beside which nothing fits
    assert list(report.models) == [*base, "instruct", "aligned"]


@pytest.mark.parametrize("name", NAMES)
def test_templates_are_bundled(name: str) -> None:
    for stage in load_recipe(name, [], {}).recipe.stages.values():
        if stage.kind in ("sft", "dpo", "evaluate") and stage.chat_template:
            load_template(stage.chat_template, ROOT / "recipes")


@pytest.mark.parametrize("name", NAMES)
def test_training_and_report_share_no_split(name: str) -> None:
    """What is evaluated was not trained on: no hub split (or local side) stands on both sides."""
    trained, asked = set(), set()
    for stage in load_recipe(name, [], {}).recipe.stages.values():
        if stage.kind in ("pretrain", "sft", "dpo"):
            trained |= {source_key(source) for source in stage.data.sources}
        elif stage.kind == "evaluate":
            asked |= {source_key(source) for suite in stage.suites for source in suite.data}
    assert not trained & asked


def source_key(source) -> tuple[str, str | None, str | None]:
    return source.path, source.split, source.select.side if source.select else None


@pytest.mark.parametrize("name", [name for name in NAMES if name != "quickstart"])
def test_the_header_says_what_it_takes(name: str) -> None:
    head = find_bundled("recipes", name).read_text(encoding="utf-8").split("\nname:")[0]
    for word in (f"posttrain run {name}", "estimates", "Licences:", "Values:", "Source:"):
        assert word in head
    remembered = "[mem]" in head or "[page]" in head
    assert remembered == ("verify both before you rely on them" in " ".join(head.replace("#", "").split()))


def test_zephyr_qlora_has_the_values_of_its_source() -> None:
    recipe = load_recipe("zephyr-7b-qlora", [], {})
    sft, dpo = stage_of(recipe, "sft"), stage_of(recipe, "dpo")
    assert parse_reference(sft.model) == HubId("mistralai/Mistral-7B-v0.1")
    assert (sft.data.max_length, dpo.data.max_length) == (2048, 1024)
    for stage, r, rate, batch in ((sft, 16, 2e-4, 64), (dpo, 128, 5e-6, 128)):
        adapter = stage.method.qlora
        assert (adapter.r, adapter.lora_alpha, adapter.lora_dropout) == (r, r, 0.05)
        assert adapter.target_modules == TARGETS
        assert stage.trainer["learning_rate"] == rate
        assert stage.trainer["global_batch_size"] == batch
        assert (stage.trainer["warmup_steps"], stage.trainer["num_train_epochs"]) == (0.1, 1)
    assert dpo.trainer["beta"] == 0.01


def test_zephyr_full_has_the_values_of_its_source() -> None:
    recipe = load_recipe("zephyr-7b-full", [], {})
    sft, dpo = stage_of(recipe, "sft"), stage_of(recipe, "dpo")
    assert (recipe.recipe.runtime.num_processes, recipe.recipe.runtime.accelerate_config) == (8, "fsdp2")
    assert (sft.trainer["learning_rate"], dpo.trainer["learning_rate"]) == (2e-5, 5e-7)
    assert (sft.trainer["global_batch_size"], dpo.trainer["global_batch_size"]) == (128, 128)
    assert sft.method.kind == "full"


SOURCES = [  # recipe, stage, rate, schedule, warmup, epochs, rows a step, tokens, and what is particular to it
    ("zephyr-7b-gemma-full", "sft", 2e-5, "cosine", 0.1, 3, 128, 2048, {}),
    ("zephyr-7b-gemma-full", "dpo", 5e-7, "cosine", 0.1, 2, 128, 1024, {"beta": 0.05}),
    ("notus-7b-full", "sft", 2e-5, "cosine", 0.1, 1, 128, 2048, {}),
    ("notus-7b-full", "dpo", 5e-7, "linear", 0.1, 3, 64, 1024, {"beta": 0.1, "optim": "rmsprop"}),
    ("ambersafe-7b-full", "sft", 2e-5, "cosine", 0.04, 3, 256, 2048, {"weight_decay": 0.0}),
    ("ambersafe-7b-full", "dpo", 5e-7, "linear", 150, 3, 32, 512, {"beta": 0.1, "max_grad_norm": 10.0}),
    ("tulu-3-8b-full", "sft", 5e-6, "linear", 0.03, 2, 128, 4096, {"weight_decay": 0.0}),
    ("tulu-3-8b-full", "dpo", 5e-7, "linear", 0.1, 1, 128, 2048, {"beta": 5.0, "loss_type": "sigmoid_norm"}),
    ("olmo-2-7b-full", "sft", 1e-5, "linear", 0.03, 2, 128, 4096, {"weight_decay": 0.0}),
    ("olmo-2-7b-full", "dpo", 5e-7, "linear", 0.1, 1, 128, 2048, {"beta": 5.0, "loss_type": "sigmoid_norm"}),
    ("olmoe-1b-7b-full", "sft", 2e-5, "linear", 0.03, 2, 128, 4096, {"router_aux_loss_coef": 0.0}),
    ("olmoe-1b-7b-full", "dpo", 5e-7, "linear", 0.1, 1, 128, 2048, {"beta": 5.0, "loss_type": "sigmoid_norm"}),
    ("salamandra-2b-full", "sft", 2e-5, "cosine", 0.03, 1, 64, 4096, {"weight_decay": 0.0}),
    ("alia-40b-qlora", "sft", 1e-4, "cosine", 0.03, 1, 64, 4096, {}),
    ("gemma-2b-qlora", "sft", 2e-4, "cosine", 0.03, 1, 128, 1024, {}),
]


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: f"{source[0]}-{source[1]}")
def test_each_has_the_values_of_its_source(source: tuple) -> None:
    name, stage, rate, schedule, warmup, epochs, rows, tokens, more = source
    found = stage_of(load_recipe(name, [], {}), stage)
    wanted = {"learning_rate": rate, "lr_scheduler_type": schedule, "warmup_steps": warmup}
    wanted |= {"num_train_epochs": epochs, "global_batch_size": rows, **more}
    assert {key: found.trainer.get(key) for key in wanted} == wanted
    assert found.data.max_length == tokens


def test_adapters_have_the_values_of_their_sources() -> None:
    alia = stage_of(load_recipe("alia-40b-qlora", [], {}), "sft").method.qlora  # Dettmers et al. 2023, 33B and 65B
    assert (alia.r, alia.lora_alpha, alia.lora_dropout, alia.target_modules) == (64, 16, 0.05, TARGETS)
    gemma = stage_of(load_recipe("gemma-2b-qlora", [], {}), "sft").method.qlora
    assert (gemma.lora_alpha, gemma.bnb_4bit_use_double_quant) == (2 * gemma.r, False)
    assert gemma.target_modules == TARGETS[:4]
    assert stage_of(load_recipe("salamandra-7b-lora", [], {}), "sft").method.lora.target_modules == TARGETS[:4]


def test_one_is_for_cards_without_bf16() -> None:
    assert load_recipe("qwen2.5-0.5b-lora-t4", [], {}).recipe.precision == "fp16"


def test_multilingual_recipes_train_and_ask_five_languages() -> None:
    recipe = load_recipe("salamandra-2b-full", [], {})
    languages = {"spanish", "catalan", "basque", "galician", "english"}
    assert languages <= {source.name for source in stage_of(recipe, "sft").data.sources}
    assert languages <= {suite.name for suite in stage_of(recipe, "report").suites}


@pytest.mark.parametrize("name", list_bundled("recipes/accelerate"))
def test_launch_configs_have_only_keys_that_accelerate_knows(name: str) -> None:
    from accelerate.commands.config.config_args import ClusterConfig

    path = find_bundled("recipes/accelerate", name)
    config = ClusterConfig.from_yaml_file(yaml_file=str(path))
    settings = yaml.safe_load(path.read_text(encoding="utf-8")).get("fsdp_config", {})
    assert config.mixed_precision == "bf16"
    assert all(key.startswith("fsdp_") for key in settings)


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith("-full") and "2b" not in name])
def test_accelerate_configs_of_recipes_exist(name: str) -> None:
    config = load_recipe(name, [], {}).recipe.runtime.accelerate_config
    assert find_bundled("recipes/accelerate", config).is_file()


def test_the_recipe_of_the_readme_is_valid(tmp_path: Path) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = readme[readme.index("    name: my-model") :].split("\n\n", 1)[0].splitlines()
    path = tmp_path / "my-model.yaml"
    path.write_text("\n".join(line.removeprefix("    ") for line in lines))
    assert list(load_recipe(path, [], {}).recipe.stages) == ["sft", "instruct", "dpo", "aligned"]


@pytest.mark.parametrize("page", ["README.md", "docs/recipes.md"])
def test_the_pages_list_every_recipe(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert [name for name in NAMES if f"| `{name}` |" not in text] == []


def test_the_table_of_memory_and_time_is_up_to_date() -> None:
    script = [sys.executable, str(ROOT / "scripts" / "recipe_table.py"), "--check"]
    done = subprocess.run(
        script, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr or "run scripts/recipe_table.py"
