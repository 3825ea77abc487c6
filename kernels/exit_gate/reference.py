"""An exit's state, probe and confidence in plain PyTorch: what training uses and native versions are tested against."""

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from exeunt.kernels.rows.reference import rms_norm_reference

LEAST_DOUBT: Final = -1e-6  # log-probabilities above this are rounding in float32: caps the log-odds at 13.8

NormParts = tuple[Tensor, Tensor | None, float]
"""Weight, bias and eps; a layer norm where there is a bias, an RMS norm where there is none."""

ProbeParts = tuple[Tensor, Tensor, Tensor, Tensor]
"""A perceptron with GELU: hidden weight [units, size] and bias [units], output weight [units] and bias []."""


JudgeParts = tuple[Tensor, Tensor, Tensor, Tensor]
"""A probe's second opinion: what each of the K largest log-probabilities adds to its units [K, units], a bias of the
units [units], output weight [units] and bias []."""


def exit_state_reference(
    hidden: Tensor, norm: NormParts, adapter: Tensor, probe: ProbeParts
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the state of hidden [tokens, size], the probe's logit of it [tokens] and its units [tokens, units]."""
    state = adapted_state_reference(hidden, norm, adapter)
    units = probe_units_reference(state, probe)
    return state, probe_output_reference(units, probe), units


def adapted_state_reference(hidden: Tensor, norm: NormParts, adapter: Tensor) -> Tensor:
    """Return n + A n [tokens, size], n being the norm of hidden: what the output matrix is applied to."""
    weight, bias, eps = norm
    normed = (
        rms_norm_reference(hidden, weight, eps)
        if bias is None
        else F.layer_norm(hidden, weight.shape, weight, bias, eps)
    )
    return normed + F.linear(normed, adapter)


def probe_units_reference(state: Tensor, probe: ProbeParts) -> Tensor:
    """Return the probe's hidden units for rows of state [tokens, size], before GELU: [tokens, units] float32."""
    return F.linear(state.float(), probe[0], probe[1])


def probe_output_reference(units: Tensor, probe: ProbeParts) -> Tensor:
    """Return the probe's logit for rows of its units [tokens, units] before GELU: [tokens] float32."""
    return torch.addmv(probe[3], F.gelu(units), probe[2])


def top_log_probabilities(logits: Tensor, count: int) -> Tensor:
    """Return the `count` largest log-probabilities of each row of logits [K, V] float32, descending: [K, count]."""
    return torch.log_softmax(logits, -1).topk(count, dim=-1).values


def judge_logit_reference(units: Tensor, tops: Tensor, judge: JudgeParts) -> Tensor:
    """Return w · GELU(u + T t + c) + b for the probe's units u [K, units] and log-probabilities t [K, count]: [K]."""
    weight, hidden_bias, output_weight, output_bias = judge
    return torch.addmv(output_bias, F.gelu(torch.addmm(units + hidden_bias, tops, weight)), output_weight)


def gate_features(opinion: Tensor, logits: Tensor) -> Tensor:
    """Return the features of the gate's logistic regression for rows of logits [K, V] float32: [K, 3].

    `opinion` [K], the judge's logit or the probe's, as it is; the log-odds log(p / (1 - p)) of the exit's own top
    probability p; the distance between its two largest raw logits.
    """
    # log_softmax is one fused pass, and exact where the top probability is near 1
    first, second = torch.log_softmax(logits, -1).topk(2, dim=-1).values.unbind(1)
    log_p = first.clamp(max=LEAST_DOUBT)
    log_odds = log_p - torch.log(-torch.expm1(log_p))
    return torch.stack((opinion, log_odds, first - second), dim=1)


def gate_confidence_reference(
    probe_logit: Tensor,
    logits: Tensor,
    combine: Tensor,
    units: Tensor | None = None,
    judge: JudgeParts | None = None,
) -> Tensor:
    """Return the probability [K] float32 that the rows' top tokens are the full model's; `combine` [4].

    A judge reads the probe's `units` [K, units], and its logit takes the place of `probe_logit` [K].
    """
    opinion = probe_logit
    if judge is not None and units is not None:
        opinion = judge_logit_reference(units, top_log_probabilities(logits, judge[0].shape[0]), judge)
    return confidence_of(gate_features(opinion, logits), combine)


def confidence_of(features: Tensor, combine: Tensor) -> Tensor:
    """Return the gate's probability [K] for the features [K, 3] of rows; `combine` [4] weighs them and a constant."""
    return torch.addmv(combine[-1], features, combine[:-1]).sigmoid()
