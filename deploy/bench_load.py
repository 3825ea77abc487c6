"""A benchmark's load, and what is traced of its answers: plain data, no torch."""

from dataclasses import dataclass, field
from typing import Final

TEMPERATURE: Final = 0.8


class BenchError(RuntimeError):
    """The benchmark cannot go on; one sentence says why."""


@dataclass(frozen=True, slots=True)
class Load:
    """What every mode is put through."""

    concurrency: int = 8
    prompt_tokens: int = 64
    max_new_tokens: int = 64
    requests: int = 32
    temperature: float = TEMPERATURE


@dataclass(slots=True)
class Trace:
    """One answered request: when it was sent, when each token came (seconds, one clock), at which exit."""

    sent: float
    arrivals: list[float] = field(default_factory=list)
    by_exit: dict[str, int] = field(default_factory=dict)
    depths: float = 0.0  # sum over tokens, blocks
    blocks: int = 0
    block_passes: int = 0  # block × pass pairs, as in the answer's `depth`
    drafts: int = 0
    drafts_accepted: int = 0
    ids: list[int] = field(default_factory=list)  # the tokens', where the engine tells them
    token_depths: list[int] = field(default_factory=list)  # blocks that each passed, likewise
