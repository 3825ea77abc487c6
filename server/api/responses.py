"""What answers say: every field of every success but those of `GET /info`, which stand in `info_responses.py`."""

from typing import Annotated, Any

from pydantic import BaseModel, Field

from exeunt.compression.variant import KVFormat, SkippedKV, WeightFormat
from exeunt.server.request import ExitMode, FinishReason

RequestId = Annotated[str, Field(description="The request's id.")]
ServedName = Annotated[str, Field(description="The served model's name.")]
Created = Annotated[int, Field(description="When the answer was made: Unix time, seconds.")]

_TEXT = "The answer, without the prompt; up to a stop string, which is not part of it."
_FINISH = "Why it ended; `cancelled` and `timeout`: as far as it got."
_TOKENS = "Every token. Absent with `details` false."


def _without_default(schema: dict[str, Any]) -> None:
    """A field that may be absent has no default that a reader could assume."""
    schema.pop("default", None)


class TokenInfo(BaseModel):
    """One generated token."""

    id: int = Field(description="Its id in the vocabulary.")
    text: str = Field(description="The token's own piece; the pieces of a character may not be text alone.")
    logprob: float = Field(
        description="Log-softmax of the raw logits of the head that emitted it, nats; in mode `verified` always the "
        "full model's."
    )
    depth: int = Field(
        description="Blocks passed before its logits; of a confirmed draft, before it was proposed: 0 where it was "
        "looked up."
    )
    exit: str = Field(
        description="`block_<i>`, the block it left after, counted from 0, or `final`; of a confirmed draft who "
        "proposed it, `lookup` being the text itself: what followed when the same tokens stood there before."
    )


class Usage(BaseModel):
    """Token counts; prompt tokens count once whatever `n` is."""

    prompt_tokens: int = Field(description="Tokens of the prompt.")
    completion_tokens: int = Field(description="Generated tokens of all answers.")
    total_tokens: int = Field(description="Both together.")


class EarlyExitApplied(BaseModel):
    """How tokens could leave. Fields that the mode does not use are absent."""

    mode: ExitMode = Field(
        description="`off`; `verified`: the answer is that of `off`; `approximate`: tokens left for good."
    )
    max_disagreement: float | None = Field(
        default=None, description="The certified target of disagreement; absent where none was asked for."
    )
    max_nll_increase: float | None = Field(
        default=None,
        description="The certified target of the NLL increase, nats per token; absent where none was asked for.",
    )
    threshold: float | None = Field(
        default=None,
        description="The calibrated probability a token needed to leave; null where the exit guard let none leave.",
    )
    skipped_kv: SkippedKV | None = Field(
        default=None,
        description="How keys and values of skipped blocks came to be: `backfill`, exactly, in a later pass, or "
        "`propagate`, from the state at the exit.",
    )


class CompressionApplied(BaseModel):
    """Which savings applied, defaults included."""

    weights: WeightFormat = Field(description="The precision of the weights.")
    kv_cache: KVFormat = Field(description="The precision of the stored keys and values.")
    linear_block: bool = Field(description="Whether one block ran as a linear map.")
    early_exit: EarlyExitApplied = Field(description="How tokens could leave early.")


class DepthInfo(BaseModel):
    """What the generated tokens cost. `blocks_*` count block × token pairs, `block_passes` block × pass pairs."""

    blocks: int = Field(description="Blocks of the model.")
    mean: float | None = Field(description="Mean depth of a token, blocks; null without tokens.")
    exit_rate: float | None = Field(
        description="Share of tokens that left before the last block, confirmed drafts included."
    )
    by_exit: dict[str, int] = Field(description="Tokens by the exit that emitted or proposed them.")
    blocks_executed: int = Field(description="Block × token pairs computed for the answer's tokens.")
    blocks_skipped: int = Field(
        description="Block × token pairs never computed; with `blocks_executed` it is tokens × blocks. 0 in mode "
        "`verified`; with `backfill` only what an answer's last tokens still owed at its end."
    )
    blocks_wasted: int = Field(
        description="Block × token pairs that the answer did not use: rejected drafts, audits, tokens computed "
        "again after a preemption, and on a GPU a step begun before it was known that the answer had ended."
    )
    block_passes: int = Field(
        description="Block × pass pairs that the answer took part in, wasted ones included; at full depth tokens × "
        "blocks. What `verified` and `backfill` save."
    )
    drafts: int = Field(description="Tokens that were proposed for confirmation; 0 but in mode `verified`.")
    drafts_accepted: int = Field(description="Proposed tokens that the full model confirmed.")


class Timing(BaseModel):
    """Seconds since the request arrived."""

    queue_s: float = Field(description="Until its computation began.")
    time_to_first_token_s: float | None = Field(
        description="Until its first token; null without tokens. With `n` above 1 the earliest answer's."
    )
    total_s: float = Field(description="Until its last answer was complete.")


class Choice(BaseModel):
    """One of several answers."""

    index: int = Field(description="Which answer, from 0.")
    text: str = Field(description=_TEXT)
    finish_reason: FinishReason = Field(description=_FINISH)
    tokens: list[TokenInfo] = Field(default=[], description=_TOKENS, json_schema_extra=_without_default)
    depth: DepthInfo = Field(description="What this answer's tokens cost.")
    perplexity: float | None = Field(description="exp of the mean of -logprob; null without tokens.")


class GenerateResponse(BaseModel):
    """The answer of `POST /generate`. With `n` above 1 the per-answer fields stand in `choices` instead."""

    id: RequestId
    model: ServedName
    created: Created
    text: str = Field(default="", description=_TEXT, json_schema_extra=_without_default)
    finish_reason: FinishReason = Field(
        default=FinishReason.STOP, description=_FINISH, json_schema_extra=_without_default
    )
    tokens: list[TokenInfo] = Field(default=[], description=_TOKENS, json_schema_extra=_without_default)
    choices: list[Choice] = Field(
        default=[], description="The answers. Only with `n` above 1.", json_schema_extra=_without_default
    )
    usage: Usage = Field(description="Token counts of prompt and answers.")
    compression: CompressionApplied = Field(description="Which savings applied.")
    depth: DepthInfo | None = Field(
        default=None, description="What the answer's tokens cost; absent with `n` above 1."
    )
    perplexity: float | None = Field(
        default=None, description="exp of the mean of -logprob; null without tokens."
    )
    timing: Timing = Field(description="Where the time went, in seconds since the request arrived.")


class StreamStep(BaseModel):
    """One `data:` object of a stream: what is new in one answer."""

    id: RequestId
    index: int = Field(description="Which answer, from 0.")
    text: str = Field(
        description="The text that is new; empty while a token may be part of a character or stop string."
    )
    tokens: list[TokenInfo] = Field(
        default=[],
        description="The tokens that are new. Absent with `details` false.",
        json_schema_extra=_without_default,
    )


class ScoredTokenInfo(BaseModel):
    """One token of a scored text; the first has nothing before it to be predicted from."""

    id: int = Field(description="Its id in the vocabulary.")
    text: str = Field(description="The token's own piece.")
    logprob: float | None = Field(
        description="Log-softmax of the raw logits of the head that predicted it, nats; null for the first."
    )
    depth: int | None = Field(description="Blocks passed before those logits; null for the first.")
    exit: str | None = Field(
        description="`block_<i>`, the block after which it was predicted, or `final`; null for the first."
    )


class ScoreUsage(BaseModel):
    """Token counts of a scored text."""

    prompt_tokens: int = Field(description="Tokens of the text.")
    total_tokens: int = Field(description="The same: nothing is generated.")


class ScoreDepth(BaseModel):
    """At which depth the text's tokens were predicted."""

    blocks: int = Field(description="Blocks of the model.")
    mean: float | None = Field(
        description="Mean depth of a predicted token, blocks; null for a single token."
    )
    exit_rate: float | None = Field(
        description="Share of tokens predicted before the last block; null for a single token."
    )
    by_exit: dict[str, int] = Field(description="Tokens by the exit that predicted them.")


class ScoreResponse(BaseModel):
    """The answer of `POST /score`."""

    id: RequestId
    model: ServedName
    created: Created
    tokens: list[ScoredTokenInfo] = Field(default=[], description=_TOKENS, json_schema_extra=_without_default)
    logprob: float = Field(description="Sum over the text, nats.")
    perplexity: float | None = Field(description="exp of the mean of -logprob; null for a single token.")
    usage: ScoreUsage = Field(description="Token counts of the text.")
    compression: CompressionApplied = Field(description="Which savings applied.")
    depth: ScoreDepth = Field(description="At which depth its tokens were predicted.")


class TokenizeResponse(BaseModel):
    """The tokens of a text."""

    count: int = Field(description="How many tokens.")
    max_model_len: int = Field(description="The most tokens that prompt and answer may have together.")
    tokens: list[int] = Field(description="Their ids.")
    token_strs: list[str] = Field(description="How the vocabulary spells each.")


class DetokenizeResponse(BaseModel):
    """The text of tokens."""

    prompt: str = Field(description="The text.")


class TokenizerInfo(BaseModel):
    """What the tokenizer is."""

    tokenizer_class: str = Field(description="Its class in `transformers`.")
    vocab_size: int = Field(description="Tokens that it knows, added ones included.")
    special_tokens: dict[str, str] = Field(description="What is special by its use, e.g. `eos_token`.")
    has_chat_template: bool = Field(description="Whether it can lay out a chat.")


class HealthResponse(BaseModel):
    """The process lives."""

    status: str = Field(default="ok", description="Always `ok`.")


class ReadyResponse(BaseModel):
    """A request would be served."""

    status: str = Field(default="ready", description="Always `ready`.")
