"""The states of tokens that wait in front of a stage."""

from torch import Tensor

from exeunt.server.sequence import Sequence


class HeldStates:
    """By sequence and stage the states [tokens, hidden] of `Sequence.pending`, in its order, in one piece or more."""

    def __init__(self) -> None:
        self._held: dict[Sequence, dict[int, list[Tensor]]] = {}

    def __bool__(self) -> bool:
        """Whether any is held."""
        return bool(self._held)

    def put_back(self, sequence: Sequence, positions: list[int], states: Tensor, stage: int) -> None:
        """Have tokens at these positions, all later than those that wait there, wait in front of `stage`."""
        sequence.put_back(stage, positions)
        self._held.setdefault(sequence, {}).setdefault(stage, []).append(states)

    def look(self, sequence: Sequence, stage: int) -> list[Tensor]:
        """What waits in front of a stage, and goes on doing so. Raises KeyError where nothing does."""
        return self._held[sequence][stage]

    def waiting(self, sequence: Sequence) -> list[Tensor]:
        """All that waits of a sequence, the deepest first: the deeper it waits the older it is."""
        return [
            states
            for stage in sorted(sequence.pending, reverse=True)
            for states in self.look(sequence, stage)
        ]

    def take(self, sequence: Sequence, stage: int) -> tuple[list[int], list[Tensor]]:
        """The positions and states that wait in front of a stage, and do so no more; both empty where nothing does."""
        waiting = sequence.pending.pop(stage, [])
        if not waiting:
            return [], []
        held = self._held[sequence]
        states = held.pop(stage)
        if not held:
            del self._held[sequence]
        return waiting, states

    def forget(self, sequence: Sequence) -> None:
        """Drop all that is held of a sequence."""
        self._held.pop(sequence, None)
