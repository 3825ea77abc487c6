"""What a generation request asks for, and what the engine tells its caller: plain data, no torch."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal, NamedTuple

from exeunt.compression.variant import SkippedKV, Variant

ExitMode = Literal["off", "verified", "approximate"]
FINAL_EXIT = "final"  # the name of the model's own head among exits
LOOKUP_EXIT = "lookup"  # the name of no head: a confirmed token that had been looked up in the text


class FinishReason(StrEnum):
    """Why an answer ended: a stop string or end of text, its length, its caller, its deadline."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    TIMEOUT = "timeout"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are drawn. `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 truncate nothing."""

    max_new_tokens: int = 64
    min_new_tokens: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = 0  # drawn by the server when the caller gives none
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False


@dataclass(frozen=True, slots=True)
class ExitPolicy:
    """Whether and how a request's tokens may leave early.

    `threshold` is the calibrated probability a token needs to leave (approximate mode), None where none may; `target`
    the certified disagreement it was looked up for, `nll_target` the certified NLL increase (nats per token), both None
    when the caller gave the threshold itself. `guard_step` says by how many steps the exit guard had raised it when the
    request was admitted: only ever with a `target`, for audits count disagreement.
    """

    mode: ExitMode = "off"
    threshold: float | None = None
    target: float | None = None
    skipped_kv: SkippedKV = "propagate"
    guard_step: int = 0
    nll_target: float | None = None


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One validated request. `deadline` is on the `time.monotonic` clock, in seconds."""

    id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    variant: Variant
    exits: ExitPolicy
    n: int = 1
    arrival: float = 0.0
    deadline: float | None = None


class EmittedToken(NamedTuple):
    """One generated token. `logprob` is in nats, of the raw logits of the head that emitted it."""

    id: int
    text: str  # the token's own piece, as the tokenizer prints it alone
    logprob: float
    depth: int  # blocks passed before its logits
    exit: str  # "block_<i>", "final" or "lookup"


@dataclass(slots=True)
class DepthTotals:
    """Sums over one answer's tokens; the same events feed the metrics (blocks are block × token pairs)."""

    blocks: int = 0  # blocks of the model
    by_exit: dict[str, int] = field(default_factory=dict)
    blocks_executed: int = 0
    blocks_skipped: int = 0
    blocks_wasted: int = 0
    block_passes: int = 0
    drafts: int = 0
    drafts_accepted: int = 0


@dataclass(frozen=True, slots=True)
class AnswerSummary:
    """The totals of one finished answer (one choice of a request)."""

    finish_reason: FinishReason
    completion_tokens: int
    depth: DepthTotals
    nll: float  # sum of -logprob over the generated tokens, nats
    queue_s: float
    time_to_first_token_s: float | None
    total_s: float


class StepEvent(NamedTuple):
    """New text and tokens of one choice. Text never ends inside a character or a possible stop string."""

    choice: int
    text: str
    tokens: tuple[EmittedToken, ...]


@dataclass(frozen=True, slots=True)
class FinishEvent:
    """One choice is finished; `text` is what was still held back."""

    choice: int
    text: str
    summary: AnswerSummary


@dataclass(frozen=True, slots=True)
class FailureEvent:
    """The request failed: a bug (`error_id` is in the log) or a refusal after admission."""

    message: str
    kind: Literal["internal", "timeout", "cancelled", "shutdown"]
    error_id: str | None = None


Event = StepEvent | FinishEvent | FailureEvent


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """Log-probabilities of a given text, teacher-forced, under one variant and exit policy."""

    id: str
    token_ids: tuple[int, ...]
    variant: Variant
    exits: ExitPolicy
    deadline: float | None = None


@dataclass(frozen=True, slots=True)
class ScoredToken:
    """A given token and what the model made of it; the first token of a text has no logprob."""

    id: int
    text: str
    logprob: float | None
    depth: int | None
    exit: str | None
