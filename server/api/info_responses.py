"""What `GET /info` and `GET /v1/models` say: every field."""

from typing import Any

from pydantic import BaseModel, Field

from exeunt.compression.variant import KVFormat, SkippedKV, WeightFormat
from exeunt.server.api.responses import CompressionApplied
from exeunt.server.request import ExitMode


class ModelCard(BaseModel):
    """One served model, in OpenAI's shape."""

    id: str = Field(description="The served model's name.")
    object: str = Field(default="model", description="Always `model`.")
    created: int = Field(description="When it was loaded: Unix time, seconds.")
    owned_by: str = Field(default="exeunt", description="Always `exeunt`.")
    max_model_len: int = Field(description="The most tokens that prompt and answer may have together.")


class ModelList(BaseModel):
    """The served models, in OpenAI's shape."""

    object: str = Field(default="list", description="Always `list`.")
    data: list[ModelCard] = Field(description="The one model that is served.")


class ModelInfo(BaseModel):
    """The loaded model."""

    name: str = Field(description="Its name in answers and metrics (`--served-model-name`).")
    family: str = Field(description="Its architecture: gpt2, llama, mistral, qwen2 or qwen3.")
    blocks: int = Field(description="Transformer blocks: the depth of a token that does not leave early.")
    hidden_size: int = Field(description="Width of a token's state.")
    vocab_size: int = Field(description="Rows of the output matrix; token ids are below it.")
    parameters: int = Field(description="Parameters of the uncompressed model.")
    device: str = Field(description="Where it runs, e.g. `cpu` or `cuda:0`.")
    dtype: str = Field(description="What it computes in, e.g. `float32`.")


class BundleInfo(BaseModel):
    """Where the loaded bundle comes from; figures as in its manifest."""

    format_version: int = Field(description="Version of the bundle's format.")
    created: str = Field(description="When it was calibrated: ISO 8601, with its time zone.")
    exeunt_version: str = Field(description="The Exeunt that calibrated it.")
    base_model: dict[str, Any] = Field(
        description="The checkpoint it was made from: `name`, `architecture`, `sha256` of the weight files, "
        "`parameters`, `blocks`."
    )
    weights: list[str] = Field(
        description="Weight formats that the bundle holds, loaded or not; where only `int4` is here it has no "
        "full-precision copy of what is INT4."
    )
    linear_block: dict[str, Any] | None = Field(
        description="The block that can run as a linear map, null where none can: `index`, `rank`, `r2` on held-out "
        "activations, `parameters` of the map, `replaced_parameters`, and `r2_by_block` of a full-rank map for each "
        "block."
    )
    exits: list[dict[str, Any]] = Field(
        description="The exits, each with `name`, the `block` it follows, and on held-out `tokens`: `agreement` of "
        "its top token with the full model's, `untrained_agreement` before fitting, `auc` of its gate. `certified`: "
        "tokens may leave there for good; `drafting`: it proposes tokens in mode `verified`, and `draft` says what "
        "calibration expects of that."
    )
    evaluation: list[dict[str, Any]] = Field(
        description="Every mode on held-out text, teacher-forced: what the mode is, its `perplexity`, `kl` (nats a "
        "token) and `agreement` against the uncompressed model, `mean_depth` (blocks), `exit_rate`, `tokens`."
    )
    calibration: dict[str, Any] | None = Field(
        description="The text it was calibrated on: `data`, `sha256`, `tokens`, `splits` (tokens by use), `seed`, "
        "`origin`."
    )


class VariantInfo(BaseModel):
    """One combination of weights, KV cache and linear block that the model holds."""

    weights: WeightFormat = Field(description="The precision of the weights.")
    kv_cache: KVFormat = Field(description="The precision of the stored keys and values.")
    linear_block: bool = Field(description="Whether one block runs as a linear map.")


class ModesInfo(BaseModel):
    """What `compression` may ask for; `variants` are the combinations that there are."""

    variants: list[VariantInfo] = Field(description="The combinations that there are.")
    weights: list[WeightFormat] = Field(description="What `compression.weights` may be.")
    kv_cache: list[KVFormat] = Field(description="What `compression.kv_cache` may be.")
    linear_block: list[bool] = Field(description="What `compression.linear_block` may be.")
    early_exit: list[ExitMode] = Field(description="What `compression.early_exit.mode` may be.")
    skipped_kv: list[SkippedKV] = Field(
        description="What `compression.early_exit.skipped_kv` may be; empty without `approximate`."
    )


class CertificateInfo(BaseModel):
    """One target of the risk table under one combination.

    The certificate is about teacher-forced text like the calibration text: of the tokens that leave early under this
    threshold, at most the target's share has a top token other than full depth of the same combination has.
    """

    weights: WeightFormat = Field(description="The combination's weights.")
    kv_cache: KVFormat = Field(description="The combination's KV cache.")
    linear_block: bool = Field(description="Whether the combination runs one block as a linear map.")
    skipped_kv: SkippedKV = Field(description="How keys and values of skipped blocks come to be.")
    target: float = Field(description="The disagreement to stay below: what `max_disagreement` asks for.")
    certified: bool = Field(description="Whether it may be asked for.")
    threshold: float | None = Field(
        description="The calibrated probability to leave at; null where it is not certified."
    )
    exit_rate: float | None = Field(description="Share of the certifying text's tokens that left early.")
    disagreement: float | None = Field(
        description="Share of those that left whose top token differed from full depth's."
    )
    upper_bound: float | None = Field(
        description="What that share is at most, with the stated confidence: below the target where it is certified."
    )
    tokens: int = Field(description="Tokens that left early in the certifying text.")
    confidence: float = Field(description="Confidence of the certificate, e.g. 0.95.")
    reason: str | None = Field(description="Why the target is not certified; null where it is.")


class NllCertificateInfo(BaseModel):
    """One target of the NLL risk table under one combination.

    The certificate is about teacher-forced text like the calibration text: over all its tokens, the negative
    log-likelihood under this threshold is on average at most the target above that of full depth of the same
    combination, each token's difference clipped to ± `clip`.
    """

    weights: WeightFormat = Field(description="The combination's weights.")
    kv_cache: KVFormat = Field(description="The combination's KV cache.")
    linear_block: bool = Field(description="Whether the combination runs one block as a linear map.")
    skipped_kv: SkippedKV = Field(description="How keys and values of skipped blocks come to be.")
    target: float = Field(
        description="The mean increase to stay below, nats per token: what `max_nll_increase` asks for."
    )
    certified: bool = Field(description="Whether it may be asked for.")
    threshold: float | None = Field(
        description="The calibrated probability to leave at; null where it is not certified."
    )
    exit_rate: float | None = Field(description="Share of the certifying text's tokens that left early.")
    increase: float | None = Field(description="The mean clipped increase that was seen, nats per token.")
    upper_bound: float | None = Field(
        description="What that mean is at most, with the stated confidence: below the target where it is certified."
    )
    unclipped: float | None = Field(
        description="The mean increase without a clip, nats per token: not certified."
    )
    unclipped_low: float | None = Field(description="Lower end of its 95 % interval.")
    unclipped_high: float | None = Field(description="Upper end of its 95 % interval.")
    perplexity: float | None = Field(
        description="Perplexity of the certifying text under the threshold, without a clip: not certified."
    )
    full_perplexity: float | None = Field(
        description="The same at full depth of the same combination, from the same tokens."
    )
    tokens: int = Field(description="Tokens of the certifying text that count.")
    clip: float = Field(description="Nats: the most that one token's increase counts as.")
    confidence: float = Field(description="Confidence of the certificate, e.g. 0.95.")
    reason: str | None = Field(description="Why the target is not certified; null where it is.")


class AuditInfo(BaseModel):
    """Tokens that left early under approximate exits and were compared with the full model, since the start."""

    share: float = Field(description="The share of early tokens that are chosen for it (`--audit-share`).")
    audited_tokens: int = Field(description="Tokens compared.")
    audit_agreements: int = Field(
        description="Those of them where the exit's most likely token was the full model's."
    )
    audit_kl: float = Field(description="Sum of KL(full || exit), nats.")
    audit_nll_full: float = Field(description="Sum of the full model's -logprob of the emitted tokens, nats.")
    audit_nll_exit: float = Field(description="Sum of the exits' -logprob of them, nats.")


class LimitsInfo(BaseModel):
    """What the server takes."""

    max_model_len: int = Field(description="The most tokens that prompt and answer may have together.")
    max_tokens_by_kv_cache: dict[str, int] = Field(
        description="The same by `kv_cache`: less than `max_model_len` where the KV cache holds less in that format."
    )
    max_num_seqs: int = Field(description="Answers that run at once.")
    max_num_queued_reqs: int = Field(description="Requests that may wait; the next is answered 429.")
    max_num_batched_tokens: int = Field(description="Tokens of one step; longer prompts are cut into chunks.")
    kv_cache_bytes: int = Field(description="Bytes of the KV cache, all formats together.")
    max_body_bytes: int = Field(description="The largest request body; a larger one is answered 413.")
    max_choices: int = Field(description="The most answers that `n` may ask for.")
    max_stop_strings: int = Field(description="The most strings that `stop` may hold.")
    request_timeout_s: float = Field(description="Seconds from arrival that a request may take.")


class InfoResponse(BaseModel):
    """The answer of `GET /info`."""

    model: ModelInfo = Field(description="What is loaded, and where it runs.")
    bundle: BundleInfo | None = Field(description="Where its bundle comes from; null for a plain model.")
    modes: ModesInfo = Field(description="What `compression` may ask for.")
    defaults: CompressionApplied = Field(description="What a request without `compression` gets.")
    risk_table: list[CertificateInfo] = Field(
        description="Every target of disagreement under every combination; empty for a plain model."
    )
    nll_risk_table: list[NllCertificateInfo] = Field(
        description="Every target of the NLL increase under every combination; empty for a plain model, and for a "
        "bundle that was not calibrated for any."
    )
    exits: list[str] = Field(description="The exits' names, shallowest first.")
    audits: AuditInfo = Field(description="How approximate exits do on the text that is served.")
    limits: LimitsInfo = Field(description="How much requests may ask for.")
    versions: dict[str, str] = Field(description="Versions of Exeunt, Python and the libraries that matter.")
