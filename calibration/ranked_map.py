"""A ridge map in every rank at once: its outputs' directions in the order of what they explain.

Reduced-rank ridge regression (Mukherjee and Zhu, Stat. Anal. Data Min. 2011, eq. 6): with W the ridge map and Σ the
inputs' covariance plus the penalty, U holds the eigenvectors of W Σ Wᵀ, the fitted outputs' second moments, and
V = Uᵀ W. Of all maps of rank R the first R columns of U and rows of V have the least penalised error, because the cut
is made in the space of fitted outputs and not of coefficients; what it adds to that error is the sum of the eigenvalues
left out.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from exeunt.calibration.block_fit import AffineFit, Moments
from exeunt.compression.linear_block import LinearBlock


@dataclass(frozen=True, slots=True)
class RankedMap:
    """y ≈ ȳ + U V (x − x̄), of which any first rows of V with the columns of U are the best map of their rank.

    Y outputs, X inputs; any floating dtype, one for all.
    """

    up: Tensor  # U, [Y, Y], orthonormal columns
    down: Tensor  # V, [Y, X]
    mean_x: Tensor  # [X]
    mean_y: Tensor  # [Y]

    @classmethod
    def of(cls, moments: Moments, fit: AffineFit) -> "RankedMap":
        """The map `fit` of the tokens in `moments`, float64."""
        _, vectors = _fitted_spectrum(moments, fit)
        return cls(vectors, vectors.T @ fit.weight, moments.mean_x, moments.mean_y)

    @classmethod
    def unpacked(cls, rows: Tensor) -> "RankedMap":
        """The map of which `packed` is `rows` [2 Y + 2, X], inputs as many as outputs."""
        outputs = (rows.shape[0] - 2) // 2
        return cls(rows[:outputs], rows[outputs:-2], rows[-2], rows[-1])

    def packed(self) -> Tensor:
        """All of it in one array, [2 Y + 2, X], of a map that has as many inputs as outputs."""
        return torch.cat([self.up, self.down, self.mean_x[None], self.mean_y[None]])

    def cut(self, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """The best map of rank at most `rank`: (U [Y, R], V [R, X], bias [Y]), float64."""
        # copies: a product's last bits may change with where its operands lie, and a map may be part of an array
        parts = self.up[:, :rank], self.down[:rank], self.mean_x
        up, down, mean = (part.double().clone(memory_format=torch.contiguous_format) for part in parts)
        return up, down, self.mean_y.double() - up @ (down @ mean)

    def linear_block(self, index: int, rank: int) -> LinearBlock:
        """Block `index` as this map, fitted on its residual, cut to `rank`; float32."""
        up, down, bias = self.cut(rank)
        return LinearBlock(index, down.float().contiguous(), up.float().contiguous(), bias.float())

    def r2_by_rank(self, moments: Moments) -> Tensor:
        """The share of the outputs' variance that the map of each rank explains on the tokens of `moments`.

        [Y + 1] float64, the first for the constant alone; all 0 where the outputs do not vary. U's columns being
        orthonormal, each direction takes from the squared error what it does whatever others are there.
        """
        variance = moments.variance_y
        if variance <= 0:
            return torch.zeros(len(self.mean_y) + 1, dtype=torch.float64)
        up, down = self.up.double(), self.down.double()
        offset = up.T @ (
            moments.mean_y - self.mean_y
        )  # how far the tokens' means are from the map's, by direction
        shift = down @ (moments.mean_x - self.mean_x)
        taken = 2 * ((up.T @ moments.cov_yx) * down).sum(1) - (down @ moments.cov_xx * down).sum(1)
        taken += 2 * offset * shift - shift.square()
        begun = -offset.square().sum()[None] / variance
        return torch.cat([begun, begun + taken.cumsum(0) / variance]).cpu()


def rank_within(budget: float, hidden: int) -> int:
    """The largest rank whose parameters (R × 2H + H) stay within `budget` parameters, at least 1 and at most H."""
    return max(1, min(hidden, int((budget - hidden) // (2 * hidden))))


def parameters_of(rank: int, hidden: int) -> int:
    """Parameters of a linear block of `rank`."""
    return hidden * (2 * rank + 1)


def _fitted_spectrum(moments: Moments, fit: AffineFit) -> tuple[Tensor, Tensor]:
    """Eigenvalues (descending) and eigenvectors (columns) of the fitted outputs' penalised second moments."""
    gram = moments.cov_xx
    fitted = fit.weight @ gram @ fit.weight.T + fit.penalty * fit.weight @ fit.weight.T
    values, vectors = torch.linalg.eigh((fitted + fitted.T) / 2)
    return values.flip(0), vectors.flip(1)
