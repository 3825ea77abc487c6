"""Early exit as a batch without stage queues does it: nobody leaves unless all may. For comparison only."""

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


def waiting_for_all(model: LoadedModel) -> LoadedModel:
    """The same model with gates that wait for all."""
    exits = (
        UnanimousExit(**{field.name: getattr(head, field.name) for field in fields(head) if field.init})
        for head in model.exits
    )
    return replace(model, exits=tuple(exits))
