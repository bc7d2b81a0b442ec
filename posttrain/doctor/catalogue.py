"""The defects the doctor knows: one id each, how grave it is, and whether it can be mended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class Defect:
    """One entry of the catalogue."""

    id: str
    severity: Severity
    """`error`: training or serving goes wrong; `warning`: it can, in ways the user has to know;
    `note`: what the family is known to do (only for a template whose facts file declares it)."""
    title: str
    mendable: bool = False
    """Whether `--fix` can mend it (in the cases that its remedy names)."""


@dataclass(frozen=True)
class Finding:
    """A defect that a checkpoint has."""

    id: str
    severity: Severity
    where: str
    """File, key, token or row: the narrowest place that is known."""
    cause: str
    """What was found, in one line."""
    remedy: str
    """What to do, in one line."""
    mendable: bool = False


def found(id: str, where: str, cause: str, remedy: str, severity: Severity | None = None) -> Finding:
    """Builds the finding of a catalogued defect; KeyError for an id that is not in the catalogue."""
    defect = CATALOGUE[id]
    return Finding(id, severity or defect.severity, where, cause, remedy, defect.mendable)


_ALL = [
    # files
    Defect("tokenizer-broken", "error", "tokenizer files do not load", mendable=True),
    Defect("truncation-baked-in", "error", "tokenizer.json cuts or pads every text", mendable=True),
    Defect("files-disagree", "warning", "tokenizer, config and template files contradict each other", mendable=True),
    Defect("no-template", "error", "there is no chat template", mendable=True),
    Defect("no-default-template", "error", "several chat templates, none called default"),
    Defect("template-broken", "error", "the template is no Jinja, or renders no conversation"),
    Defect("template-not-as-trained", "error", "the folder holds another template than it was trained with"),
    # sizes
    Defect("id-out-of-range", "error", "a special token id has no embedding row", mendable=True),
    Defect("rows-fewer-than-tokens", "error", "tokens of the tokenizer have no embedding row", mendable=True),
    Defect("tied-weights-differ", "error", "config says tied, the files hold two different matrices", mendable=True),
    Defect("max-length-unset", "warning", "model_max_length is no length of this model", mendable=True),
    # special tokens
    Defect("pad-missing", "error", "there is no pad token", mendable=True),
    Defect("pad-is-eos", "warning", "the pad token is a stop token", mendable=True),
    Defect("eos-missing", "error", "there is no eos token", mendable=True),
    Defect("end-of-turn-not-eos", "error", "the token that ends an answer does not stop generation", mendable=True),
    Defect("end-of-turn-not-one-token", "error", "what ends an answer is not one token", mendable=True),
    Defect("template-tokens-missing", "error", "the template writes tokens the tokenizer lacks", mendable=True),
    Defect("token-row-untrained", "error", "a token of the template has an untrained embedding row", mendable=True),
    Defect("token-flags-eat-text", "warning", "added tokens swallow white space or match normalised text"),
    Defect("unk-is-pad", "warning", "the pad token is unk, which texts produce", mendable=True),
    Defect("tokenizer-changes-text", "warning", "text does not survive encoding and decoding"),
    Defect("prefix-space", "warning", "the tokenizer writes a space after special tokens (legacy)"),
    # beginning and end of text
    Defect("bos-doubled", "error", "a conversation begins with two BOS", mendable=True),
    Defect("bos-not-in-template", "warning", "plain text begins with BOS, a conversation does not", mendable=True),
    Defect("bos-missing", "error", "the family needs BOS and nothing writes it", mendable=True),
    Defect("bos-flag-lies", "warning", "add_bos_token says one thing, encoding does another", mendable=True),
    Defect("eos-appended", "error", "the tokenizer appends EOS to every text", mendable=True),
    # behaviour of the template
    Defect("system-refused", "warning", "the template raises on a system message", mendable=True),
    Defect("system-dropped", "error", "the template drops the system message", mendable=True),
    Defect("system-injected", "warning", "the template writes a system text nobody asked for"),
    Defect("date-in-template", "warning", "the template writes today's date"),
    Defect("roles-refused", "warning", "the template refuses common orders of roles"),
    Defect("content-trimmed", "warning", "the template trims what messages say"),
    Defect("template-indented", "error", "white space of the template's source is rendered", mendable=True),
    Defect("generation-prompt-ignored", "warning", "add_generation_prompt changes nothing, or is always on"),
    Defect("generation-prompt-not-prefix", "error", "the prompt is not how the trained text begins"),
    Defect("history-rewritten", "warning", "earlier turns change when turns follow"),
    Defect("reasoning-dropped", "warning", "reasoning is left out"),
    Defect("tools-dropped", "warning", "tools or tool calls are left out, or fail"),
    Defect("marks-wrong", "error", "the template's generation marks hold more, or less, than answers"),
    Defect("end-of-turn-outside-marks", "error", "the marks leave out the end of turn", mendable=True),
    # data
    Defect("control-tokens-in-data", "warning", "messages contain the text of control tokens"),
    Defect("eos-in-data", "warning", "answers end with the text of the end of turn"),
    Defect("bos-in-data", "warning", "texts begin with the text of BOS"),
    Defect("boundary-merge", "warning", "prompts and answers join into one token"),
    Defect("rows-not-rendered", "error", "rows of the data cannot be rendered with this template"),
]
CATALOGUE = {defect.id: defect for defect in _ALL}
