"""The linear map that stands in for a block: ridge regression on the block's residual from second moments.

Streaming: only the moments are kept, in float64, so memory does not grow with the data. The regression is ordinary
ridge with an unpenalised constant (Hoerl and Kennard, Technometrics 1970); `exeunt.calibration.ranked_map` cuts it to a
rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

STRENGTHS: Final = (1e-6, 1e-4, 1e-3, 1e-2, 1e-1)
"""Ridge penalties to choose between, as a share of the inputs' mean variance."""


@dataclass(slots=True)
class Moments:
    """Sums over tokens of inputs x [X] and outputs y [Y], on the device they come from, in float64."""

    count: int
    sum_x: Tensor  # [X]
    sum_y: Tensor  # [Y]
    xx: Tensor  # [X, X]
    yx: Tensor  # [Y, X]
    yy: Tensor  # [], sum of squares of all outputs

    @classmethod
    def zeros(cls, inputs: int, outputs: int, device: torch.device | str = "cpu") -> "Moments":
        """No tokens seen."""

        def empty(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        return cls(0, empty(inputs), empty(outputs), empty(inputs, inputs), empty(outputs, inputs), empty())

    def add(self, x: Tensor, y: Tensor) -> None:
        """Count the tokens `x` [T, X] and `y` [T, Y], any dtype."""
        x, y = x.double(), y.double()
        self.count += x.shape[0]
        self.sum_x += x.sum(0)
        self.sum_y += y.sum(0)
        self.xx += x.T @ x
        self.yx += y.T @ x
        self.yy += y.square().sum()

    @property
    def mean_x(self) -> Tensor:
        """Mean input [X], float64."""
        return self.sum_x / self.count

    @property
    def mean_y(self) -> Tensor:
        """Mean output [Y], float64."""
        return self.sum_y / self.count

    @property
    def cov_xx(self) -> Tensor:
        """Covariance of the inputs [X, X], divided by the count."""
        return self.xx / self.count - torch.outer(self.mean_x, self.mean_x)

    @property
    def cov_yx(self) -> Tensor:
        """Covariance of outputs and inputs [Y, X], divided by the count."""
        return self.yx / self.count - torch.outer(self.mean_y, self.mean_x)

    @property
    def variance_y(self) -> float:
        """Mean over tokens of the squared distance of the outputs from their mean."""
        return float(self.yy / self.count - self.mean_y.square().sum())

    def error(self, weight: Tensor, bias: Tensor) -> float:
        """Mean over tokens of the squared error of y ≈ weight x + bias ([Y, X] and [Y] float64)."""
        offset = bias + weight @ self.mean_x - self.mean_y
        spread = (weight @ self.cov_xx * weight).sum() - 2 * (weight * self.cov_yx).sum()
        return float(spread + offset.square().sum()) + self.variance_y

    def r2(self, weight: Tensor, bias: Tensor) -> float:
        """Share of the outputs' variance that the map explains on these tokens (negative when it harms)."""
        variance = self.variance_y
        return 1.0 - self.error(weight, bias) / variance if variance > 0 else 0.0


@dataclass(frozen=True, slots=True)
class AffineFit:
    """y ≈ weight x + bias, in float64, and the penalty (absolute, per token) it was fitted with."""

    weight: Tensor  # [Y, X]
    bias: Tensor  # [Y]
    penalty: float


def fit_ridge(moments: Moments, penalty: float) -> AffineFit:
    """The map with the least mean squared error plus `penalty` × |weight|²; the constant is not penalised."""
    gram = moments.cov_xx
    gram = gram + penalty * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    weight = _solve(gram, moments.cov_yx)
    return AffineFit(weight, moments.mean_y - weight @ moments.mean_x, penalty)


def ridge_map(moments: Moments, strength: float) -> Tensor:
    """The ridge map without a constant, [Y, X] float64; the penalty is `strength` × the inputs' mean square."""
    gram = moments.xx / moments.count
    penalty = strength * gram.diagonal().mean()
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return _solve(gram + penalty * eye, moments.yx / moments.count)


def choose_ridge(fit: Moments, select: Moments, strengths: Sequence[float] = STRENGTHS) -> AffineFit:
    """The ridge map of the penalty (of `strengths` × the mean input variance) that errs least on `select`."""
    scale = float(fit.cov_xx.diagonal().mean())
    fits = [fit_ridge(fit, strength * max(scale, 1e-12)) for strength in strengths]
    return min(fits, key=lambda candidate: select.error(candidate.weight, candidate.bias))


def _solve(gram: Tensor, right: Tensor) -> Tensor:
    """right · gram⁻¹ for a symmetric positive `gram`, also where rounding left it barely so."""
    factor, failed = torch.linalg.cholesky_ex(gram)
    if int(failed) == 0:
        return torch.cholesky_solve(right.T, factor).T
    inverse: Tensor = torch.linalg.pinv(gram, hermitian=True)
    return right @ inverse.T
