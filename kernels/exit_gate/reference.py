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


def exit_state_reference(
    hidden: Tensor, norm: NormParts, adapter: Tensor, probe: ProbeParts
) -> tuple[Tensor, Tensor]:
    """Return the state of hidden [tokens, size] and the probe's logit of it [tokens] float32."""
    state = adapted_state_reference(hidden, norm, adapter)
    return state, probe_logit_reference(state, probe)


def adapted_state_reference(hidden: Tensor, norm: NormParts, adapter: Tensor) -> Tensor:
    """Return n + A n [tokens, size], n being the norm of hidden: what the output matrix is applied to."""
    weight, bias, eps = norm
    normed = (
        rms_norm_reference(hidden, weight, eps)
        if bias is None
        else F.layer_norm(hidden, weight.shape, weight, bias, eps)
    )
    return normed + F.linear(normed, adapter)


def probe_logit_reference(state: Tensor, probe: ProbeParts) -> Tensor:
    """Return the probe's logit of each row of state [tokens, size]: [tokens] float32."""
    hidden_weight, hidden_bias, output_weight, output_bias = probe
    units = F.gelu(F.linear(state.float(), hidden_weight, hidden_bias))
    return torch.addmv(output_bias, units, output_weight)


def gate_features(probe_logit: Tensor, logits: Tensor) -> Tensor:
    """Return the features of the gate's logistic regression for rows of logits [K, V] float32: [K, 3].

    `probe_logit` [K] as it is; the log-odds log(p / (1 - p)) of the exit's own top probability p; the distance between
    its two largest raw logits.
    """
    # log_softmax is one fused pass, and exact where the top probability is near 1
    first, second = torch.log_softmax(logits, -1).topk(2, dim=-1).values.unbind(1)
    log_p = first.clamp(max=LEAST_DOUBT)
    log_odds = log_p - torch.log(-torch.expm1(log_p))
    return torch.stack((probe_logit, log_odds, first - second), dim=1)


def gate_confidence_reference(probe_logit: Tensor, logits: Tensor, combine: Tensor) -> Tensor:
    """Return the probability [K] float32 that the rows' top tokens are the full model's; `combine` [4]."""
    return confidence_of(gate_features(probe_logit, logits), combine)


def confidence_of(features: Tensor, combine: Tensor) -> Tensor:
    """Return the gate's probability [K] for the features [K, 3] of rows; `combine` [4] weighs them and a constant."""
    return torch.addmv(combine[-1], features, combine[:-1]).sigmoid()
