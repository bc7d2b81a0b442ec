"""What the schema's stages are put together from: the strict model, and blocks that refer to no other."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Json = Any


class Model(BaseModel):
    """Frozen and strict: an unknown key is an error, `"1"` is not a number."""

    # Descriptions for the JSON Schema are read from the source when it is asked for: pydantic would do it
    # at every start, for 30 ms.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, defer_build=True)


class ModelInit(Model):
    """Size block of a Llama-architecture model, spelled as in `LlamaConfig`."""

    hidden_size: int = Field(ge=8)
    num_hidden_layers: int = Field(ge=1)
    num_attention_heads: int = Field(ge=1)
    num_key_value_heads: int | None = Field(default=None, ge=1)
    intermediate_size: int = Field(ge=8)
    max_position_embeddings: int = Field(default=2048, ge=8)
    tie_word_embeddings: bool = True
    rope_theta: float = Field(default=10000.0, gt=0)
    rms_norm_eps: float = Field(default=1e-5, gt=0)

    @model_validator(mode="after")
    def _divides(self) -> ModelInit:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError("hidden_size must be a multiple of num_attention_heads")
        if self.num_attention_heads % (self.num_key_value_heads or self.num_attention_heads):
            raise ValueError("num_attention_heads must be a multiple of num_key_value_heads")
        return self


class TokenizerTraining(Model):
    """A byte-level BPE tokenizer trained on the stage's own texts."""

    vocab_size: int = Field(ge=300)
    """Entries in all, special and reserved tokens included."""
    reserved_tokens: list[str] = ["<|im_start|>", "<|im_end|>"]
    """Control tokens kept for chat; no text ever yields them."""


class Select(Model):
    """A seeded split of a source, so that training and evaluation can name its two sides."""

    rows: int = Field(ge=1)
    """Rows of the train side."""
    side: Literal["train", "heldout"]
    """Which side this source yields; `heldout` is all the rest."""
    by: Literal["row", "prompt"] = "prompt"
    """`prompt` keeps rows that share their prompt on one side."""
    seed: int = 0
    """Seed of the split."""


class Snapshots(Model):
    """Model-only checkpoints that are kept for good (a resume checkpoint is something else)."""

    every: int | None = Field(default=None, ge=1)
    """Every N steps."""
    step_zero: bool = False
    """Also before the first step."""
    powers_of_two: bool = False
    """Also at steps 1, 2, 4, 8… below `every`, as Pythia did."""


class Certificate(Model):
    """How merged files are compared with the adapters in use, and the largest differences that a merge may show."""

    mode: Literal["auto", "whole", "layers"] = "auto"
    """`whole` holds two models in memory, `layers` one layer at a time; `auto` takes layers where two do not fit."""
    relative_error: float | None = Field(default=None, gt=0)
    """Of the logits, |merged - in use| / |in use|; default by dtype and base."""
    max_logit_difference: float | None = Field(default=None, gt=0)
    """Largest absolute logit difference; not limited by default."""
    mean_kl: float | None = Field(default=None, gt=0)
    """Mean KL divergence in nats per token; default by dtype and base."""
    min_top1_agreement: float | None = Field(default=None, ge=0, le=1)
    """Share of tokens with the same most probable next one; default by dtype and base."""
    min_delta_cosine: float | None = Field(default=None, ge=0, le=1)
    """Between any tensor's change before and after rounding; not limited by default."""
    max_share_off: float | None = Field(default=None, ge=0, le=1)
    """Of any tensor's numbers, those that are not the ones in use, rounded; 0 by default."""
