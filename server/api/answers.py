"""Turns the engine's events into the parts of a response."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from exeunt.server.api.compression import AppliedCompression, describe_applied
from exeunt.server.api.responses import (
    CompressionApplied,
    DepthInfo,
    ScoreDepth,
    Timing,
    TokenInfo,
    Usage,
)
from exeunt.server.request import (
    FINAL_EXIT,
    LOOKUP_EXIT,
    AnswerSummary,
    DepthTotals,
    EmittedToken,
    FinishEvent,
    StepEvent,
)


@dataclass(slots=True)
class GatheredAnswer:
    """One answer as it gathers from events."""

    parts: list[str] = field(default_factory=list)
    tokens: list[EmittedToken] = field(default_factory=list)
    summary: AnswerSummary | None = None

    def add(self, event: StepEvent | FinishEvent) -> None:
        """Take in what is new."""
        if event.text:
            self.parts.append(event.text)
        if isinstance(event, StepEvent):
            self.tokens.extend(event.tokens)
        else:
            self.summary = event.summary

    @property
    def text(self) -> str:
        return "".join(self.parts)


def token_info(token: EmittedToken) -> TokenInfo:
    """A token as the response shows it."""
    return TokenInfo.model_construct(
        _fields_set={"id", "text", "logprob", "depth", "exit"},
        id=token.id,
        text=token.text,
        logprob=token.logprob,
        depth=token.depth,
        exit=token.exit,
    )


def usage(prompt_tokens: int, summaries: Iterable[AnswerSummary]) -> Usage:
    """The token counts of a request."""
    completion = sum(summary.completion_tokens for summary in summaries)
    return Usage(
        prompt_tokens=prompt_tokens, completion_tokens=completion, total_tokens=prompt_tokens + completion
    )


def applied(compression: AppliedCompression) -> CompressionApplied:
    """What applied, as the response says it."""
    return CompressionApplied.model_validate(describe_applied(compression))


def depth_info(totals: DepthTotals) -> DepthInfo:
    """What an answer's tokens cost."""
    return DepthInfo(
        blocks=totals.blocks,
        mean=mean_depth(totals.by_exit, totals.blocks),
        exit_rate=exit_rate(totals.by_exit),
        by_exit=dict(totals.by_exit),
        blocks_executed=totals.blocks_executed,
        blocks_skipped=totals.blocks_skipped,
        blocks_wasted=totals.blocks_wasted,
        block_passes=totals.block_passes,
        drafts=totals.drafts,
        drafts_accepted=totals.drafts_accepted,
    )


def score_depth(by_exit: Mapping[str, int], blocks: int) -> ScoreDepth:
    """At which depth a text's tokens were predicted."""
    return ScoreDepth(
        blocks=blocks, mean=mean_depth(by_exit, blocks), exit_rate=exit_rate(by_exit), by_exit=dict(by_exit)
    )


def mean_depth(by_exit: Mapping[str, int], blocks: int) -> float | None:
    """The mean depth, in blocks, of tokens counted by exit; None without tokens."""
    tokens = sum(by_exit.values())
    if not tokens:
        return None
    return sum(exit_depth(name, blocks) * count for name, count in by_exit.items()) / tokens


def exit_depth(name: str, blocks: int) -> int:
    """Blocks that a token of this exit has passed; none where it was looked up."""
    if name == LOOKUP_EXIT:
        return 0
    return blocks if name == FINAL_EXIT else int(name.removeprefix("block_")) + 1


def exit_rate(by_exit: Mapping[str, int]) -> float | None:
    """The share of tokens that left before the last block; None without tokens."""
    tokens = sum(by_exit.values())
    return (tokens - by_exit.get(FINAL_EXIT, 0)) / tokens if tokens else None


def perplexity(nll: float, tokens: int) -> float | None:
    """exp(nll / tokens); None without tokens, and where it is beyond a float."""
    if not tokens:
        return None
    try:
        value = math.exp(nll / tokens)
    except OverflowError:
        return None
    return value if math.isfinite(value) else None


def timing(summaries: Iterable[AnswerSummary]) -> Timing:
    """The times of a request: its first answer's start, its first token, its last answer's end."""
    every = list(summaries)
    first_tokens = [s.time_to_first_token_s for s in every if s.time_to_first_token_s is not None]
    return Timing(
        queue_s=min(summary.queue_s for summary in every),
        time_to_first_token_s=min(first_tokens, default=None),
        total_s=max(summary.total_s for summary in every),
    )
