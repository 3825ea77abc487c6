"""What responses say: every field of every success."""

from typing import Any

from pydantic import BaseModel, Field

from exeunt.compression.variant import KVFormat, WeightFormat
from exeunt.server.request import ExitMode, FinishReason, SkippedKV


def _without_default(schema: dict[str, Any]) -> None:
    """A field that may be absent has no default that a reader could assume."""
    schema.pop("default", None)


class TokenInfo(BaseModel):
    """One generated token."""

    id: int
    text: str = Field(description="The token's own piece; the pieces of a character may not be text alone.")
    logprob: float = Field(description="Log-softmax of the raw logits of the head that emitted it, nats.")
    depth: int = Field(description="Blocks passed before its logits.")
    exit: str = Field(description="`block_<i>`, the block it left after, counted from 0, or `final`.")


class Usage(BaseModel):
    """Token counts; prompt tokens count once whatever `n` is."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class EarlyExitApplied(BaseModel):
    """How tokens could leave. Fields that the mode does not use are absent."""

    mode: ExitMode
    max_disagreement: float | None = Field(
        default=None, description="The certified target; absent with a bare threshold."
    )
    threshold: float | None = Field(
        default=None, description="The calibrated probability a token needed to leave."
    )
    skipped_kv: SkippedKV | None = None


class CompressionApplied(BaseModel):
    """Which savings applied, defaults included."""

    weights: WeightFormat
    kv_cache: KVFormat
    linear_block: bool
    early_exit: EarlyExitApplied


class DepthInfo(BaseModel):
    """What the generated tokens cost. `blocks_*` count block × token pairs, `block_passes` block × pass pairs."""

    blocks: int = Field(description="Blocks of the model.")
    mean: float | None = Field(description="Mean depth of a token, blocks; null without tokens.")
    exit_rate: float | None = Field(description="Share of tokens that left before the last block.")
    by_exit: dict[str, int] = Field(description="Tokens by the exit that emitted them.")
    blocks_executed: int
    blocks_skipped: int
    blocks_wasted: int
    block_passes: int
    drafts: int
    drafts_accepted: int


class Timing(BaseModel):
    """Seconds since the request arrived."""

    queue_s: float
    time_to_first_token_s: float | None
    total_s: float


class Choice(BaseModel):
    """One of several answers."""

    index: int
    text: str
    finish_reason: FinishReason
    tokens: list[TokenInfo] = Field(
        default=[], description="Absent with `details` false.", json_schema_extra=_without_default
    )
    depth: DepthInfo
    perplexity: float | None = Field(description="exp of the mean of -logprob; null without tokens.")


class GenerateResponse(BaseModel):
    """The answer of `POST /generate`. With `n` above 1 the per-answer fields stand in `choices` instead."""

    id: str
    model: str
    created: int = Field(description="Unix time, seconds.")
    text: str = Field(default="", json_schema_extra=_without_default)
    finish_reason: FinishReason = Field(default=FinishReason.STOP, json_schema_extra=_without_default)
    tokens: list[TokenInfo] = Field(
        default=[], description="Absent with `details` false.", json_schema_extra=_without_default
    )
    choices: list[Choice] = Field(
        default=[], description="Only with `n` above 1.", json_schema_extra=_without_default
    )
    usage: Usage
    compression: CompressionApplied
    depth: DepthInfo | None = None
    perplexity: float | None = Field(
        default=None, description="exp of the mean of -logprob; null without tokens."
    )
    timing: Timing


class StreamStep(BaseModel):
    """One `data:` object of a stream: what is new in one answer."""

    id: str
    index: int = Field(description="Which answer, from 0.")
    text: str
    tokens: list[TokenInfo] = Field(
        default=[], description="Absent with `details` false.", json_schema_extra=_without_default
    )


class ScoredTokenInfo(BaseModel):
    """One token of a scored text; the first has nothing before it to be predicted from."""

    id: int
    text: str
    logprob: float | None
    depth: int | None
    exit: str | None


class ScoreUsage(BaseModel):
    """Token counts of a scored text."""

    prompt_tokens: int
    total_tokens: int


class ScoreDepth(BaseModel):
    """At which depth the text's tokens were predicted."""

    blocks: int
    mean: float | None
    exit_rate: float | None
    by_exit: dict[str, int]


class ScoreResponse(BaseModel):
    """The answer of `POST /score`."""

    id: str
    model: str
    created: int
    tokens: list[ScoredTokenInfo] = Field(
        default=[], description="Absent with `details` false.", json_schema_extra=_without_default
    )
    logprob: float = Field(description="Sum over the text, nats.")
    perplexity: float | None = Field(description="exp of the mean of -logprob; null for a single token.")
    usage: ScoreUsage
    compression: CompressionApplied
    depth: ScoreDepth


class TokenizeResponse(BaseModel):
    """The tokens of a text."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str]


class DetokenizeResponse(BaseModel):
    """The text of tokens."""

    prompt: str


class TokenizerInfo(BaseModel):
    """What the tokenizer is."""

    tokenizer_class: str
    vocab_size: int
    special_tokens: dict[str, str]
    has_chat_template: bool


class ModelCard(BaseModel):
    """One served model, in OpenAI's shape."""

    id: str
    object: str = "model"
    created: int
    owned_by: str = "exeunt"
    max_model_len: int


class ModelList(BaseModel):
    """The served models, in OpenAI's shape."""

    object: str = "list"
    data: list[ModelCard]


class ModelInfo(BaseModel):
    """The loaded model."""

    name: str
    family: str
    blocks: int
    hidden_size: int
    vocab_size: int
    parameters: int
    device: str
    dtype: str


class BundleInfo(BaseModel):
    """Where the loaded bundle comes from; figures as in its manifest."""

    format_version: int
    created: str
    exeunt_version: str
    base_model: dict[str, Any]
    weights: list[str] = Field(
        description="Weight formats that the bundle holds, loaded or not; where only `int4` is here it has no "
        "full-precision copy of what is INT4."
    )
    linear_block: dict[str, Any] | None
    exits: list[dict[str, Any]]
    evaluation: list[dict[str, Any]]
    calibration: dict[str, Any] | None


class VariantInfo(BaseModel):
    """One combination of weights, KV cache and linear block that the model holds."""

    weights: WeightFormat
    kv_cache: KVFormat
    linear_block: bool


class ModesInfo(BaseModel):
    """What `compression` may ask for; `variants` are the combinations that there are."""

    variants: list[VariantInfo]
    weights: list[WeightFormat]
    kv_cache: list[KVFormat]
    linear_block: list[bool]
    early_exit: list[ExitMode]
    skipped_kv: list[SkippedKV]


class CertificateInfo(BaseModel):
    """One target of the risk table under one combination."""

    weights: WeightFormat
    kv_cache: KVFormat
    linear_block: bool
    skipped_kv: SkippedKV
    target: float
    certified: bool
    threshold: float | None
    exit_rate: float | None
    disagreement: float | None
    upper_bound: float | None
    tokens: int
    confidence: float
    reason: str | None


class LimitsInfo(BaseModel):
    """What the server takes."""

    max_model_len: int
    max_num_seqs: int
    max_num_queued_reqs: int
    max_num_batched_tokens: int
    kv_cache_bytes: int
    max_body_bytes: int
    max_choices: int
    max_stop_strings: int
    request_timeout_s: float


class InfoResponse(BaseModel):
    """The answer of `GET /info`."""

    model: ModelInfo
    bundle: BundleInfo | None = Field(description="Null for a plain model.")
    modes: ModesInfo
    defaults: CompressionApplied = Field(description="What a request without `compression` gets.")
    risk_table: list[CertificateInfo]
    exits: list[str]
    limits: LimitsInfo
    versions: dict[str, str]


class HealthResponse(BaseModel):
    """The process lives."""

    status: str = "ok"


class ReadyResponse(BaseModel):
    """A request would be served."""

    status: str = "ready"
