"""The recipe as frozen, strict pydantic models: one class per stage kind.

Names are the ecosystem's own. `trainer:` blocks are plain dicts here; `trainer_fields` checks them
against the installed TRL and transformers sources. Fields that say only where and how a stage runs
live in `Runtime` and never enter a fingerprint.
"""
# ruff: noqa: RUF012  (pydantic copies defaults; ruff does not see that `Model` is one of its classes)

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema, field_validator, model_serializer, model_validator
from pydantic.functional_serializers import SerializerFunctionWrapHandler

from posttrain.recipe.schema_parts import Certificate, Json, Model, ModelInit, Select, Snapshots, TokenizerTraining

_NumberOrAuto = Annotated[
    Annotated[int, Field(ge=1)] | None,
    BeforeValidator(lambda value: None if value == "auto" else value),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 1}, {"const": "auto"}, {"type": "null"}]}),
]
"""`auto` and absent are the same: the stage chooses."""


class Runtime(Model):
    """Where and how a stage runs; nothing here may change its result."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes the GPU when there is one."""
    num_processes: int = Field(default=1, ge=1)
    """Processes of the stage, one per device."""
    num_machines: int = Field(default=1, ge=1)
    """Machines of the stage."""
    accelerate_config: str | None = None
    """Path or bare name (`recipes/accelerate/NAME.yaml`) of an Accelerate config."""
    micro_batch_tokens: _NumberOrAuto = None
    """Most tokens in one forward pass; cuts an optimizer step into pieces. `auto` (default): what the device fits."""
    micro_batch_size: _NumberOrAuto = None
    """Most rows (documents or pairs) in one forward pass. `auto` (default): as many as the tokens allow."""
    attn_implementation: Literal[
        "auto", "sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"
    ] = "auto"
    """Attention backend; `auto` takes the fastest that is installed and keeps packed documents apart."""
    share_prefix: Literal["auto", "on", "off"] = "auto"
    """dpo: run what both sequences of a pair begin with once. `auto`: where it is proven exact and saves enough."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads of torch in the stage."""
    dataset_num_proc: int | None = Field(default=None, ge=1)
    """Processes that tokenise rows. Default: one for each CPU there is, and none beside the stage's for few rows."""
    report_to: list[str] = []
    """Experiment trackers that transformers knows: tensorboard, wandb, mlflow, trackio…"""
    slurm: dict[str, str | int | bool] = {}
    """`--executor slurm`: long options of `sbatch` for the stage's job, e.g. `{partition: gpu, time: "24:00:00"}`."""


class Source(Model):
    """One data source of a mixture."""

    path: str
    """File, folder (`./data.jsonl`, relative to the recipe) or hub id (`owner/name`)."""
    name: str | None = None
    """Subset (configuration) of a hub dataset."""
    split: str | None = None
    """Split of a hub dataset; `train` where it has one."""
    revision: str | None = None
    """Commit or tag of a hub dataset; resolved and recorded when absent."""
    shape: Literal[
        "auto", "text", "messages", "prompt_completion", "alpaca", "sharegpt", "preference", "transcript_pair"
    ] = "auto"
    """Row shape; `auto` detects it and says which."""
    columns: dict[str, str] = {}
    """Our field name -> the column's name in the file."""
    text_format: str | None = None
    """`str.format` pattern over columns that makes one text of a row, e.g. `"{instruction}\\n{output}"`."""
    weight: float | None = Field(default=None, gt=0)
    """Times each row is seen per epoch: 0.5 halves a source, 2.0 doubles it. Default 1."""
    rows: int | None = Field(default=None, ge=1)
    """Exact number of rows per epoch instead of a weight."""
    select: Select | None = None
    """Only one side of a seeded split."""

    @model_validator(mode="after")
    def _one_measure(self) -> Source:
        if self.weight is not None and self.rows is not None:
            raise ValueError("give `weight` or `rows`, not both")
        return self


class Data(Model):
    """The rows of a training stage."""

    sources: list[Source] = Field(min_length=1)
    """Sources of the mixture."""
    max_length: int = Field(default=2048, ge=8)
    """Most tokens of a row (SFT: a conversation; DPO: prompt + answer; pretrain: a packed row)."""
    packing: Literal["bfd", "wrap"] | None = None
    """`bfd` packs whole documents, `wrap` cuts one long stream. Default: wrap in pretrain, bfd elsewhere."""
    long_rows: Literal["truncate", "drop"] = "truncate"
    """What happens to a row longer than `max_length`; both are counted in the ledger."""
    max_dropped: float = Field(default=0.02, ge=0, le=1)
    """Largest share of rows that may be dropped before the stage fails."""
    held_out: int | None = Field(default=None, ge=0)
    """Rows never trained on, for certificates (sft, dpo). Default: 16, at most 1 %; none of fewer than 100 rows."""
    history: Literal["refuse", "split"] | None = None
    """Conversations whose template rewrites earlier turns: `split` makes one row per answer. Default: refuse (sft)."""
    system: Literal["keep", "fold"] | None = None
    """`fold` puts system text before the user's next text, for templates that refuse it. Default: keep (sft, dpo)."""

    @field_validator("history", "system")
    @classmethod
    def _default_is_absent(cls, value: str | None) -> str | None:
        return None if value in ("refuse", "keep") else value  # spelled out or not, it is the same stage


class LoraSettings(Model):
    """LoRA's settings, spelled as in peft's `LoraConfig`."""

    r: int = Field(default=16, ge=1)
    lora_alpha: float = Field(default=16, gt=0)
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    target_modules: str | list[str] = "all-linear"
    bias: Literal["none"] = "none"
    """Biases are not trained: peft merges them wrongly under 4 bits."""
    use_rslora: bool = False
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}
    modules_to_save: list[str] | None = None
    trainable_tokens: Literal["auto", "none"] | list[str] = "auto"
    """Embedding rows to train beside the adapter: `auto` = control tokens of the template that were never trained."""


class QloraSettings(LoraSettings):
    """LoRA over a base in 4 bits."""

    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    bnb_4bit_use_double_quant: bool = True


class Full(Model):
    """Every weight is trained."""


class Method(Model):
    """How weights are trained: exactly one of full, lora, qlora, dora, continue."""

    full: Full | None = None
    lora: LoraSettings | None = None
    qlora: QloraSettings | None = None
    dora: LoraSettings | None = None
    continue_: bool | None = Field(default=None, alias="continue")
    """Train the parent's adapter further, against a frozen copy of it (dpo only)."""

    @model_validator(mode="before")
    @classmethod
    def _bare_word(cls, value: Json) -> Json:
        if isinstance(value, str):  # `method: qlora` means qlora with its defaults
            return {value: True} if value == "continue" else {value: {}}
        if isinstance(value, dict):
            return {key: {} if inner is None else inner for key, inner in value.items()}
        return value

    @model_validator(mode="after")
    def _exactly_one(self) -> Method:
        if len(self.given()) != 1:
            raise ValueError("give exactly one of: full, lora, qlora, dora, continue")
        return self

    @model_serializer(mode="wrap")
    def _only_given(self, dump: SerializerFunctionWrapHandler) -> dict[str, Json]:
        # A null would mean "given, with its defaults" to whoever reads the dump.
        return {name: value for name, value in dump(self).items() if value is not None}

    def given(self) -> list[str]:
        """Names of the methods that are set, as the recipe spells them."""
        names = [name for name in ("full", "lora", "qlora", "dora") if getattr(self, name) is not None]
        return names + (["continue"] if self.continue_ else [])

    @property
    def kind(self) -> str:
        """`full`, `lora`, `qlora`, `dora` or `continue`."""
        return self.given()[0]

    @property
    def adapter(self) -> LoraSettings | None:
        """The adapter's settings, or None for `full` and `continue`."""
        return self.lora or self.qlora or self.dora


class Stage(Model):
    """What every stage has."""

    runtime: Runtime | None = None
    """Replaces single fields of the recipe's `runtime` for this stage."""
    seed: int | None = None
    """Replaces the recipe's seed for this stage."""


class Pretrain(Stage):
    """Train a base model from scratch, or continue one."""

    kind: Literal["pretrain"]
    model: str | None = None
    """Checkpoint to continue; absent = from scratch with `init` and `tokenizer`."""
    init: ModelInit | None = None
    tokenizer: TokenizerTraining | str | None = None
    """A tokenizer to train, or the model (folder, hub id, `@stage`) whose own is taken; replaces that of `model`."""
    new_rows: Literal["mean"] | None = None
    """With `model` and `tokenizer`: what rows of tokens begin as that the model does not know. Default: mean."""
    data: Data
    trainer: dict[str, Json] = {}
    snapshots: Snapshots | None = None

    @model_validator(mode="before")
    @classmethod
    def _swap_is_spelled_out(cls, value: Json) -> Json:
        if isinstance(value, dict) and value.get("model") is not None and value.get("tokenizer") is not None:
            return {**value, "new_rows": value.get("new_rows") or "mean"}  # absent or not, it is the same stage
        return value

    @model_validator(mode="after")
    def _scratch_or_continue(self) -> Pretrain:
        if self.new_rows is not None and (self.model is None or self.tokenizer is None):
            raise ValueError("`new_rows` is about a `model` that gets another `tokenizer`: give both, or leave it out")
        if (self.model is None) == (self.init is None):
            raise ValueError("give `model` (continue a checkpoint) or `init` (from scratch), exactly one")
        if self.init is not None and self.tokenizer is None:
            raise ValueError("a model from scratch needs `tokenizer`")
        return self


class Sft(Stage):
    """Supervised fine-tuning on conversations: loss on assistant turns and their end-of-turn token."""

    kind: Literal["sft"]
    model: str
    """Hub id (`owner/name@revision`), path, or `@stage`."""
    chat_template: str | None = None
    """Bundled name or `.jinja` file; absent = the model's own."""
    data: Data
    method: Method = Method.model_validate("full")
    trainer: dict[str, Json] = {}
    snapshots: Snapshots | None = None


class Dpo(Stage):
    """Preference optimisation against the policy it starts from."""

    kind: Literal["dpo"]
    model: str
    chat_template: str | None = None
    """Absent = the one the model was trained with."""
    data: Data
    method: Method | None = None
    """Absent: full for a full model, a new adapter of the parent's shape for an adapter."""
    trainer: dict[str, Json] = {}
    snapshots: Snapshots | None = None


class Merge(Stage):
    """Adapters and base, or several models, become one standalone model, from files, in fp32, rounded once."""

    kind: Literal["merge"]
    model: str | None = None
    """An adapter: its whole chain is merged into its base."""
    scale: float | None = None
    """With `model`: W + scale * delta instead of the whole delta of an adapter (or of a model beside `base_model`)."""
    models: dict[str, str] = {}
    """Instead of `model`: name -> hub id, path or `@stage` of what `method` combines, in this order."""
    method: Literal["linear", "slerp", "task_arithmetic", "ties", "dare_linear", "dare_ties"] | None = None
    """How `models` are combined; `linear` is their weighted mean, the others work on differences to the base."""
    base_model: str | None = None
    """Base of `models`; absent: the one under their adapters."""
    weights: dict[str, float] = {}
    """Name of a model -> its weight. Default: equal shares for linear, 1 for the others."""
    normalize: bool = False
    """Divide by the sum of the weights."""
    density: float | None = Field(default=None, gt=0, le=1)
    """ties, dare: share of each difference that is kept."""
    t: float | None = Field(default=None, ge=0, le=1)
    """slerp: 0 is the first model, 1 the second."""
    base: Literal["original", "dequantized", "auto"] | None = None
    """Which base receives a QLoRA adapter: as stored, as 4-bit training saw it (default), or the closer of both."""
    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    """Dtype of the merged weights; absent = the recipe's precision."""
    max_shard_size: str = "5GB"
    certificate: Certificate = Certificate()

    @model_validator(mode="after")
    def _one_way(self) -> Merge:
        if (self.model is None) == (not self.models):
            raise ValueError("give `model` (a chain) or `models` (a combination), exactly one")
        return self


class Check(Model):
    """One verdict on a generated answer."""

    name: str
    kind: Literal["exact", "contains", "regex", "any_of", "language", "stops"]
    field: str | None = None
    """Row field with the expected value (`any_of`: a list); not needed for `stops`."""
    value: str | None = None
    """A fixed expected value instead of a field."""


class Suite(Model):
    """One evaluation of every model of the stage."""

    name: str
    kind: Literal["bits_per_byte", "preference", "generate"]
    data: list[Source] = Field(min_length=1)
    max_rows: int | None = Field(default=None, ge=1)
    """First rows only."""
    max_length: int = Field(default=2048, ge=8)
    max_new_tokens: int = Field(default=64, ge=1)
    prompt_field: str = "prompt"
    """Row field with the question (a string, or messages)."""
    system: Literal["keep", "fold"] | None = None
    """As in `data`: `fold` puts system text before the user's next text. Default: keep (preference, generate)."""
    checks: list[Check] = []

    @field_validator("system")
    @classmethod
    def _default_is_absent(cls, value: str | None) -> str | None:
        return None if value == "keep" else value


class Gate(Model):
    """A figure that must hold, or the stage fails after writing its report."""

    suite: str
    metric: str
    model: str
    minus: str | None = None
    """Compare the difference to this model instead of the figure itself."""
    min: float | None = None
    max: float | None = None
    interval_above: float | None = None
    """The lower end of the 95 % interval must lie above this."""


class Evaluate(Stage):
    """The same questions to several models, with paired intervals."""

    kind: Literal["evaluate"]
    models: dict[str, str] = Field(min_length=1)
    """Column name -> hub id, path or `@stage`."""
    chat_template: str | None = None
    """Template for models that have none (a base); every other model keeps its own."""
    suites: list[Suite] = Field(min_length=1)
    require: list[Gate] = []


class Publish(Stage):
    """A self-contained folder (or hub repository) that plain transformers loads."""

    kind: Literal["publish"]
    model: str
    to: str | None = None
    """Folder, relative to the working directory; absent = the stage's own folder only."""
    hub: str | None = None
    """Hub repository `owner/name` to push to as well."""
    private: bool = True
    license: str | None = None
    report: str | None = None
    """`@stage` of an evaluation whose table goes into the card."""
    snapshots: bool | None = None
    """Also the model's snapshots, with the data order: folders `snapshots/step-N`; on the hub, branches `step-N`."""

    @field_validator("snapshots")
    @classmethod
    def _default_is_absent(cls, value: bool | None) -> bool | None:
        return value or None


AnyStage = Annotated[Pretrain | Sft | Dpo | Merge | Evaluate | Publish, Field(discriminator="kind")]


class Recipe(Model):
    """The whole way from a checkpoint to an aligned model."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    description: str = ""
    seed: int = 42
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    runtime: Runtime = Runtime()
    stages: dict[Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]*$")], AnyStage] = Field(min_length=1)
