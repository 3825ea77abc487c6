"""An exit's state, probe and confidence in plain PyTorch: what the native versions are tested against."""

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from exeunt.kernels.rows.reference import rms_norm_reference

LEAST_DOUBT: Final = -1e-6  # log-probabilities above this are rounding in float32: caps the log-odds at 13.8


def exit_state_reference(
    hidden: Tensor,
    norm: tuple[Tensor, Tensor | None, float],
    adapter: Tensor,
    probe: tuple[Tensor, Tensor, Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """Return n + A n [tokens, size], n being the norm of hidden, and the probe's logit of it [tokens] float32.

    `norm` is (weight, bias, eps), a layer norm where there is a bias; `probe` the weights of a perceptron with GELU,
    hidden [units, size] and [units], output [units] and [].
    """
    weight, bias, eps = norm
    normed = (
        rms_norm_reference(hidden, weight, eps)
        if bias is None
        else F.layer_norm(hidden, weight.shape, weight, bias, eps)
    )
    state = normed + F.linear(normed, adapter)
    hidden_weight, hidden_bias, output_weight, output_bias = probe
    units = F.gelu(F.linear(state.float(), hidden_weight, hidden_bias))
    return state, torch.addmv(output_bias, units, output_weight)


def gate_features(probe_logit: Tensor, logits: Tensor) -> Tensor:
    """Return the features of the gate's logistic regression for rows of logits [K, V] float32: [K, 3].

    `probe_logit` [K] as it is; the log-odds log(p / (1 - p)) of the exit's own top probability p; the distance between
    its two largest raw logits.
    """
    # log_softmax is one fused pass, a third of logsumexp's time, and exact where the top probability is near 1
    first, second = torch.log_softmax(logits, -1).topk(2, dim=-1).values.unbind(1)
    log_p = first.clamp(max=LEAST_DOUBT)
    log_odds = log_p - torch.log(-torch.expm1(log_p))
    return torch.stack((probe_logit, log_odds, first - second), dim=1)


def gate_confidence_reference(probe_logit: Tensor, logits: Tensor, combine: Tensor) -> Tensor:
    """Return the probability [K] float32 that the rows' top tokens are the full model's; `combine` [4]."""
    features = gate_features(probe_logit, logits)
    return torch.addmv(combine[-1], features, combine[:-1]).sigmoid()
