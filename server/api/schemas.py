"""What requests may say: every field, its type and its limits. Nothing else is accepted."""

from typing import Annotated, Any, Final

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from exeunt.compression.variant import KVFormat, SkippedKV, WeightFormat
from exeunt.server.request import ExitMode

MAX_CHOICES: Final = 16
MAX_STOP_STRINGS: Final = 16
MAX_STOP_CHARACTERS: Final = 256
MAX_SEED: Final = 2**63 - 1
_LOWEST_TEMPERATURE: Final = (
    0.01  # below it logits overflow before they are compared; 0 says the same exactly
)


NLL_CLIP: Final = 3.0  # nats: what one token may count at most where calibration certifies


class Body(BaseModel):
    """A request body: strict types, known fields, finite numbers."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


def _nll_target(value: float) -> float:
    if value >= NLL_CLIP:
        raise PydanticCustomError(
            "nll_target",
            "it must be below {clip} nats, which a token's rise is clipped to: no text could break a larger target",
            {"clip": f"{NLL_CLIP:g}"},
        )
    return value


class EarlyExitOptions(Body):
    """How tokens may leave early. Asking for what the loaded model has not is a 400 that says what there is."""

    mode: ExitMode | None = Field(
        default=None,
        description="`verified`: what exits propose are drafts, which the full model confirms or replaces; the answer "
        "is that of `off`. `approximate`: tokens leave for good where an exit is sure enough. `off`: every token at "
        "full depth. Left out: the server's default, `verified` unless it was started with another.",
    )
    max_disagreement: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="Approximate only: a certified target of the risk table, the share of early tokens that may "
        "differ from full depth of the same weights, KV cache and linear block. Left out together with "
        "`max_nll_increase` and `threshold`: the smallest certified target from 0.02.",
    )
    max_nll_increase: Annotated[float, AfterValidator(_nll_target)] | None = Field(
        default=None,
        gt=0,
        description="Approximate only, instead of `max_disagreement`: a certified target of the NLL risk table, the "
        "nats per token by which the negative log-likelihood of text may rise over full depth of the same weights, KV "
        "cache and linear block, each token's rise clipped; exp of it bounds the ratio of the clipped perplexities. "
        "The exit guard does not watch it.",
    )
    threshold: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="Approximate only, instead of a target: the calibrated probability to leave at, one for "
        "all certified exits. Nothing is certified for it.",
    )
    skipped_kv: SkippedKV | None = Field(
        default=None,
        description="Approximate only: how keys and values of skipped blocks come to be. `backfill`: exactly, the "
        "token's state rides along in the next deep pass of its sequence. `propagate`: at once, from the state at the "
        "exit, without those blocks. Left out: `backfill` where the target (or, without one, any target) is certified "
        "for it, else `propagate`.",
    )


def _exit_shorthand(value: Any) -> Any:
    if isinstance(value, bool):
        return {"mode": "verified" if value else "off"}
    if value is None or isinstance(value, dict | EarlyExitOptions):
        return value
    raise PydanticCustomError("early_exit", "it must be true, false or an object")


class CompressionOptions(Body):
    """Which savings to use. A field left out (or null) takes the server's default; the response says what applied."""

    weights: WeightFormat | None = Field(
        default=None, description="The precision of the weights; `GET /info` says which are loaded."
    )
    kv_cache: KVFormat | None = Field(
        default=None, description="The precision of the stored keys and values."
    )
    linear_block: bool | None = Field(default=None, description="Run one block as a linear map.")
    early_exit: Annotated[
        EarlyExitOptions | None,
        BeforeValidator(_exit_shorthand, json_schema_input_type=bool | EarlyExitOptions | None),
    ] = Field(
        default=None,
        description="An object, or `true` for `verified` and `false` for `off`. A model without exits has `off` alone: "
        "asking it for more is a 400 that says what there is.",
    )


def _temperature(value: float) -> float:
    if 0 < value < _LOWEST_TEMPERATURE:
        raise PydanticCustomError(
            "temperature", "it must be 0 (greedy) or at least {lowest}", {"lowest": 0.01}
        )
    return value


# of a list that may be long only the first fault is told, so only that is looked for
AnyTokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(fail_fast=True)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, fail_fast=True)]


def _no_string(value: Any) -> Any:
    if isinstance(value, str):
        raise PydanticCustomError("stop", 'it must be a list of strings such as ["."]')
    return value


StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]


class GenerateBody(Body):
    """The body of `POST /generate`: exactly one of `prompt` and `prompt_token_ids`, everything else optional."""

    prompt: str | None = Field(default=None, min_length=1, description="The text to continue.")
    prompt_token_ids: TokenIds | None = Field(
        default=None, description="The prompt as token ids, instead of `prompt`."
    )
    max_new_tokens: int = Field(
        default=64, ge=1, description="Prompt and answer together must fit the model."
    )
    min_new_tokens: int = Field(default=0, ge=0, description="No end of text before so many tokens.")
    temperature: Annotated[float, AfterValidator(_temperature)] = Field(
        default=0.0, ge=0, le=100, description="0 is greedy; otherwise at least 0.01."
    )
    top_p: float = Field(
        default=1.0, gt=0, le=1, description="Draw from the likeliest tokens of this probability together."
    )
    top_k: int = Field(
        default=0, ge=0, le=2**31 - 1, description="Draw from so many likeliest tokens; 0 is all."
    )
    repetition_penalty: float = Field(
        default=1.0, ge=0.01, le=100, description="Above 1 makes known tokens less likely."
    )
    seed: int | None = Field(
        default=None,
        ge=0,
        le=MAX_SEED,
        description="Same seed, same answer; below 2^63. Null: drawn by the server.",
    )
    stop: Annotated[list[StopString], BeforeValidator(_no_string)] = Field(
        default_factory=list,
        max_length=MAX_STOP_STRINGS,
        description="The answer ends before any of these strings.",
    )
    ignore_eos: bool = Field(default=False, description="Go on past the end of text.")
    n: int = Field(default=1, ge=1, le=MAX_CHOICES, description="How many answers.")
    stream: bool = Field(default=False, description="Answer as server-sent events.")
    details: bool = Field(default=True, description="Report every token with its logprob, depth and exit.")
    compression: CompressionOptions | None = Field(default=None, description="Which savings to use.")


class ScoreBody(Body):
    """The body of `POST /score`: exactly one of `text` and `token_ids`."""

    text: str | None = Field(default=None, min_length=1, description="The text to score.")
    token_ids: TokenIds | None = Field(default=None, description="The text as token ids, instead of `text`.")
    details: bool = Field(default=True, description="Report every token.")
    compression: CompressionOptions | None = Field(default=None, description="Which savings to use.")


class TokenizeBody(Body):
    """The body of `POST /tokenize`."""

    prompt: str = Field(description="The text to cut into tokens.")
    add_special_tokens: bool = Field(default=True, description="Add what the tokenizer adds to a prompt.")


class DetokenizeBody(Body):
    """The body of `POST /detokenize`."""

    tokens: AnyTokenIds = Field(description="Token ids.")
