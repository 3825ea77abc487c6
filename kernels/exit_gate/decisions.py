"""A whole gate for every row of a batch without asking the device what it decided: for GPUs and their graphs.

`exit_gate` looks only at rows that pass the screen. On a GPU finding out which they are costs more than looking at all:
here every row is, and those that did not pass do not count.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from exeunt.kernels.exit_gate.dispatch import ExitWeights, exit_state
from exeunt.kernels.exit_gate.gate import GateRule
from exeunt.kernels.exit_gate.reference import gate_confidence_reference
from exeunt.kernels.gpu import triton_runs


@dataclass(frozen=True, slots=True)
class GatedRows:
    """What a gate makes of T rows, all on their device."""

    confidence: (
        Tensor  # [T] float32, probability that exit and full model agree; 0 for rows that did not pass
    )
    leaves: Tensor  # [T] bool
    looked: Tensor  # [T] bool, the rows that passed the screen
    state: Tensor  # [T, size], what the output matrix is applied to
    logits: Tensor  # [T, S] float32, those that decided


def gate_rows(
    hidden: Tensor,
    thresholds: Tensor,
    weights: ExitWeights,
    rule: GateRule,
    decisive: Callable[[Tensor], Tensor],
) -> GatedRows:
    """Decide for each row of hidden [T, size] whether its token leaves.

    `decisive` maps states [T, size] to the logits that decide [T, S]. `thresholds` [T] float32 is the confidence that
    each row needs, infinity for a row that may not leave. Nothing waits for the device, and no shape depends on what it
    finds: a CUDA graph can hold the call if it can hold `decisive`.
    """
    state, probe_logit, units = exit_state(hidden, weights)
    logits = decisive(state).float()
    return GatedRows(*gate_decisions(probe_logit, units, logits, thresholds, rule), state, logits)


def gate_decisions(
    probe_logit: Tensor, units: Tensor, logits: Tensor, thresholds: Tensor, rule: GateRule
) -> tuple[Tensor, Tensor, Tensor]:
    """Return confidence [T] float32, leaves [T] bool and looked [T] bool for rows of the logits that decide.

    `probe_logit` [T], `units` [T, units], `logits` [T, S] and `thresholds` [T] are float32. NaN anywhere in a row keeps
    it, and only it, from leaving. Raises ValueError where shapes do not fit.
    """
    rows = probe_logit.shape[0]
    if thresholds.shape != (rows,) or logits.dim() != 2 or logits.shape[0] != rows or logits.shape[1] < 2:
        raise ValueError(
            f"thresholds {list(thresholds.shape)} and logits {list(logits.shape)} are not [{rows}] and [{rows}, S] "
            "with S at least 2"
        )
    judge = rule.judge
    if judge is not None:
        judge.check(units, rows, logits.shape[1])
    parts = None if judge is None else judge.parts
    if triton_runs(logits.device):
        from exeunt.kernels.exit_gate.triton import decide_triton  # Triton is there only where a GPU is

        return decide_triton(probe_logit, logits, thresholds, rule.screen_ratio, rule.combine, units, parts)
    return gate_decisions_reference(probe_logit, units, logits, thresholds, rule)


def gate_decisions_reference(
    probe_logit: Tensor, units: Tensor, logits: Tensor, thresholds: Tensor, rule: GateRule
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `gate_decisions` returns."""
    parts = None if rule.judge is None else rule.judge.parts
    sure = gate_confidence_reference(probe_logit, logits, rule.combine, units, parts)
    looked = probe_logit.sigmoid() >= thresholds * rule.screen_ratio
    return torch.where(looked, sure, 0.0), looked & (sure >= thresholds), looked
