"""How a model's blocks are cut into stages at its exits: plain data, no torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise

from exeunt.server.drafting import LOOKUP
from exeunt.server.request import FINAL_EXIT, LOOKUP_EXIT, ExitMode


@dataclass(frozen=True, slots=True)
class StagePlan:
    """Stages of a model of `blocks` blocks: stage s runs blocks `starts[s]` to `stops[s] - 1`.

    Every stage but the last ends in an exit, named by the block it follows; the last ends in the model's own head.
    """

    blocks: int
    exit_blocks: tuple[int, ...]  # the block each exit follows, ascending, each before the last block
    certified: tuple[int, ...] | None = None  # stages that end in an exit for the approximate mode; None: all
    drafting: int | None = None  # the stage that ends in the exit that drafts; None: the first
    # the number of the last stage, which ends in the model's own head
    last: int = field(init=False, compare=False)
    # by stage, and for LOOKUP, depth and exit
    _ends: Mapping[int, tuple[int, str]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        inner = self.exit_blocks
        if any(a >= b for a, b in pairwise(inner)) or any(not 0 <= e < self.blocks - 1 for e in inner):
            raise ValueError(f"exits {inner} must ascend and lie after blocks 0 to {self.blocks - 2}")
        exits = [*((block + 1, f"block_{block}") for block in inner), (self.blocks, FINAL_EXIT)]
        object.__setattr__(self, "last", len(inner))
        object.__setattr__(self, "_ends", {**dict(enumerate(exits)), LOOKUP: (0, LOOKUP_EXIT)})

    def asks(self, mode: ExitMode, stage: int) -> bool:
        """Whether tokens of requests in this mode may leave at the end of `stage`."""
        if mode == "off" or stage >= self.last:
            return False
        if mode == "verified":
            return stage == (self.drafting or 0)
        return self.certified is None or stage in self.certified

    @property
    def stages(self) -> int:
        """How many stages there are."""
        return len(self.exit_blocks) + 1

    def start(self, stage: int) -> int:
        """The first block of a stage."""
        return self.exit_blocks[stage - 1] + 1 if stage else 0

    def stop(self, stage: int) -> int:
        """One past the last block of a stage: also the depth, in blocks, of a token that leaves at its end."""
        return self._ends[stage][0]

    def exit_name(self, stage: int) -> str:
        """The name of the head at the end of a stage."""
        return self._ends[stage][1]
