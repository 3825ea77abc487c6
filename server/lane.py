"""The queues of one variant. Plain data, no torch."""

from dataclasses import dataclass, field

from exeunt.server.row import Row
from exeunt.server.sequence import Sequence
from exeunt.server.stage_choice import StageQueue


@dataclass(slots=True)
class Lane:
    """The rows and sequences of one variant: who is ready to start a pass, and who waits at each deeper stage."""

    decoding: dict[Sequence, float] = field(default_factory=dict)  # since when, on the scheduler's clock
    prefilling: dict[Sequence, float] = field(default_factory=dict)
    deeper: list[dict[Sequence, Row]] = field(default_factory=list)  # [stage - 1]
    served_s: float = 0.0  # time this variant has had; the least served variant runs next
    running: int = 0  # sequences admitted and not ended

    def deepest(self) -> int | None:
        """The deepest stage at which a row waits, None when nothing does."""
        for stage in range(len(self.deeper), 0, -1):
            if self.deeper[stage - 1]:
                return stage
        return 0 if self.decoding or self.prefilling else None

    def queues(self) -> list[StageQueue]:
        """The stages in front of which rows wait; each holds its rows in the order in which they came."""
        found = []
        ready = len(self.decoding) + len(self.prefilling)
        if ready:
            oldest = min(next(iter(some.values())) for some in (self.decoding, self.prefilling) if some)
            found.append(StageQueue(0, ready, oldest))
        for stage, waiting in enumerate(self.deeper, start=1):
            if waiting:
                found.append(StageQueue(stage, len(waiting), next(iter(waiting.values())).since))
        return found

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out of whatever queue it stands in."""
        self.decoding.pop(sequence, None)
        self.prefilling.pop(sequence, None)
        for waiting in self.deeper:
            waiting.pop(sequence, None)
