"""An exit's gate on a GPU: decided there for all rows.

By stages the host takes rows that leave out of the batch. So what was decided comes there in one tensor, in one wait,
and of the logits only those of rows that leave are picked out, on the device. In a device's pass (`device_pass`) it
stays there.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import partial
from typing import Final

import torch
from torch import Tensor

from exeunt.compression.exit_output import ExitOutput
from exeunt.compression.host_memory import fetched, sent
from exeunt.kernels.exit_gate import GatedRows

Project = Callable[[Tensor], Tensor]
"""States [K, H] to logits [K, V]."""
Decide = Callable[[Tensor, Tensor, Project], GatedRows]
"""`ExitHead.decide`: states [T, H] and thresholds [T] float32, and what projects."""

_CONFIDENCE, _LEAVES, _LOOKED, _WHOLE = range(4)
ROWS_AT_ONCE: Final = 512  # all rows' logits are made: a gigabyte or less of them


@dataclass(frozen=True, slots=True)
class GateSteps:
    """How one exit decides on a GPU."""

    key: Hashable  # the same for the same exit
    decide: Decide
    listed: bool  # whether looks are at a shortlist
    confirmed: bool  # whether all logits confirm what that lets pass

    @property
    def _short(self) -> bool:
        """Whether the logits that decide are not those of rows that leave."""
        return self.listed and not self.confirmed

    def run(
        self, hidden: Tensor, thresholds: Tensor, project: Project
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """What `GateResult` holds, for states `hidden` [T, H]; all but the logits on the host."""
        decided = [torch.zeros(0, 4)]
        logits = []
        for start in range(0, len(hidden), ROWS_AT_ONCE):
            part = slice(start, start + ROWS_AT_ONCE)
            marks, known = self._decided(hidden[part], thresholds[part], project)
            decided.append(fetched(marks))
            leaving = decided[-1][:, _LEAVES].nonzero().squeeze(1)
            if len(leaving):
                logits.append(self._logits(known, leaving, project))
        told = torch.cat(decided) if len(decided) != 2 else decided[1]
        return (
            told[:, _CONFIDENCE].contiguous(),
            told[:, _LEAVES] > 0,
            told[:, _LOOKED].nonzero().squeeze(1),
            told[:, _WHOLE].nonzero().squeeze(1),
            torch.cat(logits) if logits else hidden.new_zeros((0, 0), dtype=torch.float32),
        )

    def leaving(self, hidden: Tensor, thresholds: Tensor, project: Project) -> tuple[Tensor, Tensor]:
        """Which rows leave, [T] bool, and the logits [T, V] float32 that each of them would leave with, all on their
        device: nothing waits for it, and a graph can hold the call."""
        rows = self.decide(hidden, thresholds, project)
        return rows.leaves, project(rows.state).float() if self._short else rows.logits

    def _decided(self, hidden: Tensor, thresholds: Tensor, project: Project) -> tuple[Tensor, ...]:
        """What `_marked` returns, by a captured graph where there is one; then it holds until the next graph's run."""
        if isinstance(project, ExitOutput) and project.graphs is not None:
            key = ("an exit's gate", self.key, id(project.linear))
            marked = partial(self._marked, project=project)
            found = project.graphs.run(key, marked, hidden, thresholds)
            if found is not None:
                return found
        return self._marked(hidden, thresholds.to(hidden.device, non_blocking=True), project)

    def _marked(self, hidden: Tensor, thresholds: Tensor, project: Project) -> tuple[Tensor, Tensor]:
        """[T, 4] float32, confidence, whether a row leaves, was looked at, and whether what it would say counted; and
        what a row's logits come from: the states [T, H] where a shortlist has the last word, else these logits
        themselves, [T, V] float32."""
        rows = self.decide(hidden, thresholds, project)
        whole = rows.passed if self.listed else rows.looked
        marks = torch.stack((rows.confidence, rows.leaves.float(), rows.looked.float(), whole.float()), dim=1)
        return marks, rows.state if self._short else rows.logits

    def _logits(self, known: Tensor, leaving: Tensor, project: Project) -> Tensor:
        """The logits [L, V] float32 of the rows `leaving` [L], copies."""
        if len(leaving) == len(known):
            left = known.clone()
        else:
            left = known.index_select(0, sent(leaving.numpy(), known.device))
        if not self._short:
            return left
        return project.captured(left) if isinstance(project, ExitOutput) else project(left).float()
