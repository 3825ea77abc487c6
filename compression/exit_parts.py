"""What an exit's gate is made of: a probe, judges, and what confirms a shortlist's choice."""

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from exeunt.kernels.exit_gate.reference import JudgeParts

JUDGE_PARTS: Final = ("top_weight", "hidden_bias", "output_weight", "output_bias")
"""The tensors of an `ExitJudge`, in their order."""


class ExitHeadError(ValueError):
    """Tensors or settings that do not form an exit head."""


@dataclass(frozen=True, slots=True)
class ExitProbe:
    """A perceptron H → P → 1 with GELU, in float32 whatever the model's dtype."""

    hidden_weight: Tensor  # [P, H]
    hidden_bias: Tensor  # [P]
    output_weight: Tensor  # [P]
    output_bias: Tensor  # []


@dataclass(frozen=True, slots=True)
class ExitJudge:
    """The probe's second opinion, w · GELU(u + T t + c) + b: u the probe's units, t the K largest log-probabilities.

    In float32 whatever the model's dtype.
    """

    top_weight: Tensor  # T [K, P]: row k is what the k-th largest adds to each unit
    hidden_bias: Tensor  # c [P]
    output_weight: Tensor  # w [P]
    output_bias: Tensor  # b []

    @property
    def parts(self) -> JudgeParts:
        """The tensors as the kernels take them."""
        return self.top_weight, self.hidden_bias, self.output_weight, self.output_bias

    def to(self, device: torch.device | str) -> "ExitJudge":
        """The same on `device`, in float32."""
        return ExitJudge(*(part.to(device, torch.float32) for part in self.parts))


@dataclass(frozen=True, slots=True)
class ExitConfirmation:
    """The last word on rows that a shortlist lets pass, by the logits of the whole vocabulary.

    A row whose confidence by the shortlist is less than `list_ratio` × its threshold is turned away unasked. `combine`
    weighs what `ExitHead.combine` does: the judge's logit, and the features of all logits.
    """

    judge: ExitJudge
    combine: Tensor  # [4] float32
    list_ratio: float
