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
from exeunt.kernels.gpu import check_one_device, triton_runs


@dataclass(frozen=True, slots=True)
class GatedRows:
    """What a gate makes of T rows, all on their device."""

    confidence: (
        Tensor  # [T] float32, probability that exit and full model agree; 0 for rows that did not pass
    )
    leaves: Tensor  # [T] bool
    looked: Tensor  # [T] bool, the rows that passed the screen
    passed: (
        Tensor  # [T] bool, of these the rows that a confirmation is asked about; without one those that leave
    )
    state: Tensor  # [T, size], what the output matrix is applied to
    logits: Tensor  # [T, S] float32, those that decided: [T, V], the whole vocabulary's, with a confirmation


def gate_rows(
    hidden: Tensor,
    thresholds: Tensor,
    weights: ExitWeights,
    rule: GateRule,
    project: Callable[[Tensor], Tensor],
    listed: Tensor | None = None,
) -> GatedRows:
    """Decide for each row of hidden [T, size] whether its token leaves.

    `project` maps states [T, size] to the logits that decide [T, S]. Where the rule has a confirmation these are the
    whole vocabulary's, and `listed` [S] int64 says which of them are looked at first: all rows are confirmed, and the
    list's logits cost nothing more. `thresholds` [T] float32 is the confidence that each row needs, infinity for a row
    that may not leave. Nothing waits for the device, and no shape depends on what it finds: a CUDA graph can hold the
    call if it can hold `project`. Raises ValueError where a confirmation has no list, or a list none.
    """
    if (listed is None) != (rule.confirmation is None):
        raise ValueError("a confirmation needs to know the list that it confirms, and nothing else does")
    state, probe_logit, units = exit_state(hidden, weights)
    logits = project(state).float()
    first, every = (logits, None) if listed is None else (logits.index_select(1, listed), logits)
    return GatedRows(*gate_decisions(probe_logit, units, first, thresholds, rule, every), state, logits)


Decided = tuple[Tensor, Tensor, Tensor, Tensor]
"""Confidence [T] float32, leaves, looked and passed [T] bool, as `GatedRows` has them."""


def gate_decisions(
    probe_logit: Tensor,
    units: Tensor,
    logits: Tensor,
    thresholds: Tensor,
    rule: GateRule,
    whole: Tensor | None = None,
) -> Decided:
    """Return what is decided for rows of the logits that decide, and of those that confirm it where the rule asks them.

    `probe_logit` [T], `units` [T, units], `logits` [T, S], `thresholds` [T] and `whole` [T, V] are float32. NaN
    anywhere in a row keeps it, and only it, from leaving. Raises ValueError where shapes do not fit, and for tensors of
    several devices, the rule's among them.
    """
    rows = probe_logit.shape[0]
    if thresholds.shape != (rows,) or logits.dim() != 2 or logits.shape[0] != rows or logits.shape[1] < 2:
        raise ValueError(
            f"thresholds {list(thresholds.shape)} and logits {list(logits.shape)} are not [{rows}] and [{rows}, S] "
            "with S at least 2"
        )
    judge, confirmation = rule.judge, rule.confirmation
    if judge is not None:
        judge.check(units, rows, logits.shape[1])
    if (confirmation is None) != (whole is None):
        raise ValueError("a confirmation needs the whole vocabulary's logits, and nothing else does")
    if confirmation is not None and whole is not None:
        if whole.dim() != 2 or whole.shape[0] != rows or whole.shape[1] < logits.shape[1]:
            raise ValueError(
                f"the whole vocabulary's logits are {list(whole.shape)}, not [{rows}, V] with V at least "
                f"{logits.shape[1]}"
            )
        confirmation.judge.check(units, rows, whole.shape[1])
    check_one_device(
        "probe logits, units, logits, thresholds, whole logits and the rule's tensors",
        *(probe_logit, units, logits, thresholds, *(() if whole is None else (whole,)), *_tensors(rule)),
    )
    if triton_runs(logits.device):
        return _decisions_on_gpu(probe_logit, units, logits, thresholds, rule, whole)
    return gate_decisions_reference(probe_logit, units, logits, thresholds, rule, whole)


def _tensors(rule: GateRule) -> tuple[Tensor, ...]:
    """All that a rule weighs with."""
    judge, last = rule.judge, rule.confirmation
    own = (rule.combine, *(() if judge is None else judge.parts))
    return own if last is None else (*own, last.combine, *last.judge.parts)


def _decisions_on_gpu(
    probe_logit: Tensor,
    units: Tensor,
    logits: Tensor,
    thresholds: Tensor,
    rule: GateRule,
    whole: Tensor | None,
) -> Decided:
    from exeunt.kernels.exit_gate.triton import (  # Triton is there only where a GPU is
        decide_triton,
        gate_confidence_triton,
    )

    parts = None if rule.judge is None else rule.judge.parts
    last = rule.confirmation
    if last is None or whole is None:
        return decide_triton(probe_logit, logits, thresholds, rule.screen_ratio, rule.combine, units, parts)
    listed = gate_confidence_triton(probe_logit, logits, rule.combine, units, parts)
    return decide_triton(
        probe_logit,
        whole,
        thresholds,
        rule.screen_ratio,
        last.combine,
        units,
        last.judge.parts,
        listed,
        last.list_ratio,
    )


def gate_decisions_reference(
    probe_logit: Tensor,
    units: Tensor,
    logits: Tensor,
    thresholds: Tensor,
    rule: GateRule,
    whole: Tensor | None = None,
) -> Decided:
    """Return what `gate_decisions` returns."""
    parts, last = None if rule.judge is None else rule.judge.parts, rule.confirmation
    sure = gate_confidence_reference(probe_logit, logits, rule.combine, units, parts)
    looked = probe_logit.sigmoid() >= thresholds * rule.screen_ratio
    if last is None or whole is None:
        leaves = looked & (sure >= thresholds)
        return torch.where(looked, sure, 0.0), leaves, looked, leaves
    passed = looked & (sure >= thresholds * last.list_ratio)
    confirmed = gate_confidence_reference(probe_logit, whole, last.combine, units, last.judge.parts)
    confidence = torch.where(looked, torch.where(passed, confirmed, sure), 0.0)
    return confidence, passed & (confirmed >= thresholds), looked, passed
