"""Two losses compared on heads whose agreement and sureness can be counted by hand."""

import pytest
import torch

from exeunt.calibration.exit_training import CurvePoint, Labelled, Loss, TrainedHead
from exeunt.calibration.loss_comparison import compare_losses
from exeunt.compression.exits import ExitNorm

H, TOKENS = 4, 100
NORM = ExitNorm("rms", torch.ones(H), None, 1e12)  # divides by a million, whatever the state
MATRIX = 1e6 * torch.eye(H)[:2]  # two tokens, read off the first two units
ZERO = torch.zeros(H, H)
SWAP = torch.zeros(H, H)
SWAP[0, 2], SWAP[1, 3] = 1.0, 1.0  # adds the third and fourth unit to the first two


def project(state: torch.Tensor) -> torch.Tensor:
    return state @ MATRIX.T


def data() -> Labelled:
    """The first two units say token 0, faintly and ever less; the others say the truth for the first 60 tokens."""
    hidden = torch.zeros(TOKENS, H)
    hidden[:, 0] = torch.linspace(0.9, 0.1, TOKENS)
    top = torch.zeros(TOKENS, dtype=torch.int64)
    top[10:60] = 1
    hidden[10:60, 3] = 5.0
    return Labelled(hidden, top)


def head(adapter: torch.Tensor, selective: float, loss: Loss) -> TrainedHead:
    return TrainedHead(
        NORM,
        adapter,
        0.0,
        0.0,
        0.0,
        selective=selective,
        loss=loss,
        curve=(CurvePoint(0, 0.0, 0.0), CurvePoint(640, 0.0, selective)),
    )


def test_outcomes_are_counted_on_all_tokens() -> None:
    heads: dict[Loss, TrainedHead] = {
        "top token": head(SWAP, 0.9, "top token"),
        "distribution": head(ZERO, 0.5, "distribution"),
    }
    served, losses = compare_losses(7, heads, NORM, ZERO, data(), project, (0.02, 0.6))
    assert served is heads["top token"]
    assert losses.both is None
    assert (losses.block, losses.tokens, losses.risks, losses.served) == (7, TOKENS, (0.02, 0.6), "top token")
    assert losses.distribution.agreement == losses.start.agreement == 0.5
    # the own head is surest of the ten that it has right, then wrong fifty times
    assert losses.start.leaving == pytest.approx((0.10, 1.0))
    assert losses.top_token.agreement == 1.0
    assert losses.top_token.leaving == (1.0, 1.0)
    assert losses.top_token.selective == 1.0
    assert (losses.start.visits, losses.top_token.visits) == (0, 640)


@pytest.mark.parametrize(
    ("selective", "served"),
    [((0.5, 0.5, 0.5), "both"), ((0.5, 0.6, 0.5), "top token"), ((0.5, 0.6, 0.7), "distribution")],
)
def test_the_best_head_serves_and_of_equals_the_first(
    selective: tuple[float, float, float], served: Loss
) -> None:
    names: tuple[Loss, ...] = ("both", "top token", "distribution")
    heads = {name: head(ZERO, value, name) for name, value in zip(names, selective, strict=True)}
    kept, losses = compare_losses(0, heads, NORM, ZERO, data(), project, (0.1,))
    assert kept is heads[served]
    assert losses.served == served
    assert losses.both is not None
