"""Reading a recipe: overrides, environment, secrets, bundled names, all problems at once, and how fast."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from posttrain.errors import RecipeErrors, UserError
from posttrain.recipe import bundled
from posttrain.recipe.bundled import find_bundled, list_bundled
from posttrain.recipe.load import find_recipe, load_recipe
from posttrain.recipe.yaml12 import dump


def problems_of(path: Path, overrides: list[str] | None = None, env: dict[str, str] | None = None) -> list[str]:
    with pytest.raises(RecipeErrors) as caught:
        load_recipe(path, overrides, env or {})
    return [str(problem) for problem in caught.value.problems]


def test_a_valid_recipe(valid):
    loaded = load_recipe(valid, env={})
    assert loaded.recipe.stages["base"].trainer["learning_rate"] == 5e-3
    assert loaded.recipe.stages["sft"].method.kind == "qlora"
    assert (loaded.path, loaded.folder) == (valid.resolve(), valid.resolve().parent)
    assert loaded.source_text == valid.read_text()
    assert loaded.lines[("stages", "dpo", "trainer", "beta")] == 33
    assert (
        loaded.where("stages", "base", "data", "sources", 1, "path") == f"{valid}:13  stages.base.data.sources[1].path"
    )
    assert loaded.where("stages", "dpo", "data", "max_length") == f"{valid}:29  stages.dpo.data.max_length"


@pytest.mark.parametrize("text", ["", "# nothing\n", "- a\n", "just text\n"])
def test_files_without_a_mapping(tmp_path, text):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    (problem,) = problems_of(path)
    assert problem.startswith(f"{path}:1: the ")
    assert "start with name:" in problem


def test_not_utf8(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_bytes("name: a\ndescription: año\n".encode("latin-1"))
    (problem,) = problems_of(path)
    assert problem.startswith(f"{path}:2: not UTF-8")


def test_every_problem_at_once_in_the_order_of_lines(valid):
    text = valid.read_text()
    for old, new in (
        ("seed: 42", "seed: x\nseed: 1"),
        ("vocab_size: 4000", "vocab_size: 4"),
        ("beta: 0.1", "betta: 0.1"),
        ('model: "@dpo"', 'model: "@dop"'),
        ("chat_template: chatml", 'chat_template: "${NO}"'),
    ):
        text = text.replace(old, new)
    valid.write_text(text)
    found = problems_of(valid, ["stages.sft.data.max_length=ten", "nonsense"])
    places = [problem.removeprefix(f"{valid}:").split(":")[0].split(" ")[0] for problem in found]
    assert places == ["2", "3", "10", "22", "34", "35", "--set", "--set"]


class TestOverrides:
    @pytest.mark.parametrize(
        ("override", "path", "value"),
        [
            ("seed=7", ("seed",), 7),
            ("description=5e-6 is small", ("description",), "5e-6 is small"),
            ("stages.dpo.trainer.beta=0.2", ("stages", "dpo", "trainer", "beta"), 0.2),
            ("stages.dpo.trainer.loss_type=[ipo, sft]", ("stages", "dpo", "trainer", "loss_type"), ["ipo", "sft"]),
            ("stages.dpo.trainer.learning_rate=5e-6", ("stages", "dpo", "trainer", "learning_rate"), 5e-6),
            ("stages.base.data.sources[0].weight=3", ("stages", "base", "data", "sources", 0, "weight"), 3),
            ("stages.base.data.sources.1.rows=9", ("stages", "base", "data", "sources", 1, "rows"), 9),
            ("stages.aligned.model=@sft", ("stages", "aligned", "model"), "@sft"),
            ("stages.aligned.model='@sft'", ("stages", "aligned", "model"), "@sft"),
            ("stages.sft.method=lora", ("stages", "sft", "method", "lora", "r"), 16),
            ("stages.sft.method={lora: {r: 4}}", ("stages", "sft", "method", "lora", "r"), 4),
            ("stages.sft.chat_template=", ("stages", "sft", "chat_template"), None),
            ("stages.sft.chat_template=${T}", ("stages", "sft", "chat_template"), "zephyr"),
            ("stages.extra={kind: merge, model: '@sft'}", ("stages", "extra", "model"), "@sft"),
            ("stages.sft.runtime.threads=2", ("stages", "sft", "runtime", "threads"), 2),
        ],
    )
    def test_values(self, valid, override, path, value):
        node = load_recipe(valid, [override], {"T": "zephyr"}).redacted()
        for part in path:
            node = node[part]
        assert node == value

    def test_the_last_one_counts(self, valid):
        assert load_recipe(valid, ["seed=1", "seed=2"], {}).recipe.seed == 2

    @pytest.mark.parametrize(
        ("override", "found"),
        [
            ("seed", "--set seed: has no value"),
            ("=1", "--set : is not a key"),
            ("stages..dpo=1", "--set stages..dpo: is not a key"),
            ("seed=x", "--set seed: the text 'x', not a whole number"),
            ("stages.dpoo.trainer.beta=1", "--set stages.dpoo.trainer.beta: the recipe has no stage `dpoo`"),
            ("stages.dpo.trainer.betta=1", "--set stages.dpo.trainer.betta: unknown setting"),
            (
                "stages.base.data.sources[2].rows=1",
                "--set stages.base.data.sources[2].rows: `2` is no item of a list of 2",
            ),
            ("precision.x=1", "--set precision.x: `precision` is the text 'bf16', which has no keys"),
            ("seed=[1", "--set seed:2:1: did not find expected"),
            ("seed={a: 1, a: 2}", "--set seed:1:8: `a` stands twice"),
            ("stages.sft.method={lora: {rr: 4}}", "--set stages.sft.method  stages.sft.method.lora.rr: unknown key"),
            ("stages.dpo.model=@sftt", "--set stages.dpo.model: there is no stage `sftt`"),
        ],
    )
    def test_mistakes_are_located_at_the_option(self, valid, override, found):
        (problem,) = problems_of(valid, [override])
        assert problem.startswith(found)


class TestEnvironment:
    def test_variables_and_their_escape(self, valid):
        text = valid.read_text().replace("path: ./more.jsonl", 'path: "${DIR}/${FILE}.jsonl"')
        valid.write_text(text.replace("seed: 42", 'seed: 42\ndescription: "$${DIR} costs $5"'))
        recipe = load_recipe(valid, env={"DIR": "/d", "FILE": "f"}).recipe
        assert recipe.stages["base"].data.sources[1].path == "/d/f.jsonl"
        assert recipe.description == "${DIR} costs $5"

    def test_a_value_is_text_and_is_not_replaced_again(self, valid):
        loaded = load_recipe(valid, ["description=${A}"], {"A": "${B} 5"})
        assert loaded.recipe.description == "${B} 5"

    def test_secrets_are_used_and_never_shown(self, valid):
        overrides = ["stages.release.hub=me/${MY_TOKEN}", "stages.base.data.sources[0].columns={api_key: '${K}'}"]
        loaded = load_recipe(valid, overrides, {"MY_TOKEN": "hunter2", "K": "hunter3"})
        assert loaded.recipe.stages["release"].hub == "me/hunter2"
        assert loaded.recipe.stages["base"].data.sources[0].columns == {"api_key": "hunter3"}
        shown = loaded.redacted()
        assert shown["stages"]["release"]["hub"] == "me/${MY_TOKEN}"
        assert "hunter" not in str(shown)

    def test_secrets_are_not_in_errors(self, valid):
        overrides = [
            "stages.dpo.trainer.hub_token=${T}",
            "stages.release.hub=${MY_TOKEN}",
            "stages.dpo.model=@${A_KEY}",
        ]
        overrides.append("seed=${SEED_SECRET}")
        found = problems_of(valid, overrides, dict.fromkeys(("T", "MY_TOKEN", "A_KEY", "SEED_SECRET"), "hunter2" * 20))
        assert len(found) == 4
        assert "hunter" not in str(found)

    def test_the_process_environment_is_the_default(self, valid, monkeypatch):
        monkeypatch.setenv("POSTTRAIN_TEST_NAME", "abc")
        assert load_recipe(valid, ["name=${POSTTRAIN_TEST_NAME}"]).recipe.name == "abc"


def test_the_redacted_recipe_reads_back_as_the_same(valid, tmp_path):
    loaded = load_recipe(valid, ["description=$${X} 5e-6", "stages.aligned.max_shard_size='1000'"], {})
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump(loaded.redacted()))
    assert load_recipe(copy, env={}).recipe == loaded.recipe


class TestBundled:
    @pytest.fixture
    def package(self, tmp_path, monkeypatch):
        """A package folder with the bundled files beside it (as in a checkout)."""
        (tmp_path / "posttrain").mkdir()
        for name in ("recipes/quickstart.yaml", "recipes/accelerate/ddp.yaml", "chat_templates/chatml.jinja"):
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("")
        monkeypatch.setattr(bundled, "_PACKAGE", tmp_path / "posttrain")
        return tmp_path / "posttrain"

    def test_beside_the_package(self, package):
        assert find_bundled("recipes", "quickstart") == package.parent / "recipes/quickstart.yaml"
        assert find_bundled("recipes/accelerate", "ddp") == package.parent / "recipes/accelerate/ddp.yaml"
        assert find_bundled("chat_templates", "chatml") == package.parent / "chat_templates/chatml.jinja"
        assert list_bundled("recipes") == ["quickstart"]

    def test_inside_the_package_comes_first(self, package):
        (package / "recipes").mkdir()
        (package / "recipes/other.yaml").write_text("")
        assert list_bundled("recipes") == ["other"]

    def test_a_miss_names_the_nearest(self, package):
        with pytest.raises(UserError, match=r"did you mean quickstart\?"):
            find_recipe("quikstart")
        with pytest.raises(UserError, match="there are: chatml"):
            find_bundled("chat_templates", "zzz")

    def test_names_do_not_leave_the_folder(self, package):
        with pytest.raises(UserError):
            find_bundled("recipes", "accelerate/ddp")

    @pytest.mark.parametrize("name", ["quickstart.yaml", "sub/quickstart"])
    def test_a_path_is_not_looked_up(self, package, name):
        with pytest.raises(UserError, match="no such file"):
            find_recipe(name)


CHILD = """
import sys, time
start = time.process_time()
from posttrain.recipe.load import load_recipe
load_recipe(sys.argv[1], [], {})
print(time.process_time() - start)
heavy = {"torch", "transformers", "datasets", "trl", "peft", "accelerate", "numpy", "pyarrow", "safetensors"}
print(sorted(heavy & set(sys.modules)))
"""


def test_loading_is_light_and_fast(valid):
    runs = [
        subprocess.run([sys.executable, "-c", CHILD, valid], capture_output=True, text=True, check=True).stdout.split(
            "\n"
        )
        for _ in range(3)
    ]
    assert {run[1] for run in runs} == {"[]"}
    assert min(float(run[0]) for run in runs) < 0.6  # CPU seconds; about 0.25 on a quiet machine


def test_auto_pieces_are_the_same_as_none_given():
    from posttrain.recipe.schema import Runtime

    assert Runtime.model_validate({"micro_batch_tokens": "auto", "micro_batch_size": "auto"}) == Runtime()
    assert Runtime.model_validate({"micro_batch_size": 3}).micro_batch_size == 3
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        Runtime.model_validate({"micro_batch_tokens": 0})
    schema = Runtime.model_json_schema()["properties"]["micro_batch_tokens"]
    assert {"const": "auto"} in schema["anyOf"]
