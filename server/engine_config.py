"""The limits an engine runs under: plain data, no torch."""

from dataclasses import dataclass, fields
from typing import Final, get_args

from exeunt.server.stage_choice import SchedulingPolicy

MAX_OWED: Final = 8
"""Positions of a sequence that may wait for deeper blocks; the next pass goes deep and takes them along."""


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """The engine's limits, resolved: every figure is final, none means "choose for me".

    Raises:
        ValueError: a limit is below 1, a share is not in [0, 1], or a step is smaller than the sequences that must each
            advance in it.
    """

    max_model_len: int  # tokens, prompt and answer together
    max_num_seqs: int = 64  # sequences that hold KV pages at once (each of a request's n choices is one)
    max_num_queued_reqs: int = 256  # requests that may wait for admission; the next one is refused
    max_num_batched_tokens: int = 512  # tokens of one tick; longer prompts are cut into chunks of it
    kv_cache_bytes: int = 512 * 2**20  # bytes of the page arena that all sequences share
    max_owed: int = MAX_OWED
    audit_share: float = 0.0  # of the tokens that leave early in the approximate mode, in [0, 1]
    scheduling: SchedulingPolicy = "run-through"
    cuda_graphs: bool = True  # on a GPU, passes of up to 512 tokens run as captured graphs
    async_scheduling: bool = (
        True  # beside graphs, a decode step is begun before the host has the one in front of it
    )
    longest_wait_s: float = (
        0.05  # with "queues": a row that waited so long in front of a stage has it run next
    )

    def __post_init__(self) -> None:
        if not 0.0 <= self.audit_share <= 1.0:
            raise ValueError(f"audit_share is {self.audit_share}; it must be in [0, 1].")
        if self.longest_wait_s <= 0:
            raise ValueError(f"longest_wait_s is {self.longest_wait_s}; it must be above 0.")
        if self.scheduling not in get_args(SchedulingPolicy):
            raise ValueError(
                f"scheduling is {self.scheduling!r}; it must be one of {get_args(SchedulingPolicy)}."
            )
        for item in fields(self):
            value = getattr(self, item.name)
            if item.type is int and value < 1:
                raise ValueError(f"{item.name} is {value}; it must be at least 1.")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens is {self.max_num_batched_tokens}; it must be at least max_num_seqs, "
                f"{self.max_num_seqs}, so that every running sequence can advance in one tick."
            )
