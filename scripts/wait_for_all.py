"""Early exit as a batch without stage queues does it: nobody leaves unless all may. For comparison only.

A tick that asks such gates goes a stage at a time. What it is compared with does so too: `by_stages`.
"""

from collections.abc import Callable
from dataclasses import fields, replace

import torch
from torch import Tensor

from exeunt.compression.exits import ExitHead, GateResult
from exeunt.compression.model import LoadedModel


class UnanimousExit(ExitHead):
    """An exit whose gate lets a batch's rows leave together or not at all."""

    def gate(self, hidden: Tensor, thresholds: Tensor, project: Callable[[Tensor], Tensor]) -> GateResult:
        found = super().gate(hidden, thresholds, project)
        if bool(found.leaves.all()):
            return found
        return replace(found, leaves=torch.zeros_like(found.leaves), logits=found.logits[:0])


class StagedExit(ExitHead):
    """An exit like any other, but not of the class that ticks in one call are made for."""


def waiting_for_all(model: LoadedModel) -> LoadedModel:
    """The same model with gates that wait for all."""
    return _with_exits(model, UnanimousExit)


def by_stages(model: LoadedModel) -> LoadedModel:
    """The same model, whose ticks go a stage at a time."""
    return _with_exits(model, StagedExit)


def _with_exits(model: LoadedModel, kind: type[ExitHead]) -> LoadedModel:
    exits = (
        kind(**{field.name: getattr(head, field.name) for field in fields(head) if field.init})
        for head in model.exits
    )
    return replace(model, exits=tuple(exits))
