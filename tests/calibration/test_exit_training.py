"""Heads and gates find what is planted in the states; what they report is what they do."""

import math
from typing import Literal

import pytest
import torch

from exeunt.calibration.exit_training import (
    HeadTraining,
    Labelled,
    head_agreement,
    head_state,
    planned_visits,
    train_head,
)
from exeunt.calibration.gate_training import ProbeTraining, auc, logistic_regression, train_gate
from exeunt.compression.exits import ExitHead, ExitNorm, ExitProbe

H, V = 16, 24
NORM = ExitNorm("layer", torch.ones(H), torch.zeros(H), 1e-5)
QUICK = HeadTraining(visits=120_000, batch_tokens=256, learning_rate=1e-2, most_epochs=60)


def output_matrix() -> torch.Tensor:
    return torch.randn(V, H, generator=torch.Generator().manual_seed(0))


def project(state: torch.Tensor) -> torch.Tensor:
    return state @ output_matrix().T


def rotated(tokens: int, seed: int) -> Labelled:
    """States whose full-depth tokens are those of a fixed linear map of them: a head can learn it all."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, H, generator=g)
    mix = torch.randn(H, H, generator=torch.Generator().manual_seed(77)) / H**0.5
    return Labelled(hidden, project(NORM(hidden) @ mix.T).argmax(-1))


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_a_head_is_trained_on_the_state_that_serves(kind: Literal["rms", "layer"]) -> None:
    g = torch.Generator().manual_seed(5)
    scale = (1 + torch.randn(H, generator=g) / 5).requires_grad_()
    bias = torch.randn(H, generator=g) if kind == "layer" else None
    adapter = (torch.randn(H, H, generator=g) / H).requires_grad_()
    hidden = torch.randn(40, H, generator=g) * 3
    state = head_state(ExitNorm(kind, scale, bias, 1e-5), adapter, hidden)
    probe = ExitProbe(torch.zeros(2, H), torch.zeros(2), torch.zeros(2), torch.tensor(0.0))
    norm = ExitNorm(kind, scale.detach(), bias, 1e-5)
    served = ExitHead(0, norm, adapter.detach(), probe, torch.zeros(4), 0.0).read(hidden)[0]
    torch.testing.assert_close(state.detach(), served, atol=1e-5, rtol=1e-5)
    direction = torch.randn(state.shape, generator=g)
    slopes = torch.autograd.grad((state * direction).sum(), (scale, adapter))
    for weight, slope in zip((scale, adapter), slopes, strict=True):
        step = torch.randn(weight.shape, generator=g) / 100
        moved = {id(weight): (weight + step).detach()}
        other = head_state(
            ExitNorm(kind, moved.get(id(scale), scale.detach()), bias, 1e-5),
            moved.get(id(adapter), adapter.detach()),
            hidden,
        )
        rise = float(((other - state.detach()) * direction).sum())
        assert rise == pytest.approx(float((slope * step).sum()), rel=1e-3, abs=1e-3)


def test_a_head_learns_what_full_depth_does() -> None:
    fit, select = rotated(3000, 1), rotated(1000, 2)
    head = train_head(NORM, torch.zeros(H, H), fit, select, project, QUICK, torch.Generator().manual_seed(0))
    assert head.untrained_agreement < 0.3
    assert head.agreement > 0.85
    assert head_agreement(head.norm, head.adapter, select, project) == pytest.approx(head.agreement)
    assert not head.adapter.requires_grad


def test_training_never_ends_below_its_starts() -> None:
    """Labels that are noise teach nothing, and early stopping keeps the start."""
    g = torch.Generator().manual_seed(3)
    fit = Labelled(torch.randn(2000, H, generator=g), torch.randint(V, (2000,), generator=g))
    select = rotated(1000, 2)
    mix = torch.randn(H, H, generator=torch.Generator().manual_seed(77)) / H**0.5
    head = train_head(NORM, mix - torch.eye(H), fit, select, project, QUICK, torch.Generator().manual_seed(0))
    assert head.ridge_agreement == pytest.approx(1.0)
    assert head.agreement == head.ridge_agreement
    torch.testing.assert_close(head.adapter, mix - torch.eye(H))


def test_the_planned_work_is_the_work_done() -> None:
    done: list[int] = []
    training = HeadTraining(visits=1000, batch_tokens=64, evaluations=2)
    fit = rotated(500, 1)
    generator = torch.Generator().manual_seed(0)
    train_head(NORM, torch.zeros(H, H), fit, fit, project, training, generator, done.append)
    assert sum(done) == planned_visits(500, training) == 960


def gated(tokens: int, seed: int) -> Labelled:
    """The first hidden unit decides whether full depth says what the model's own head says here."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, H, generator=g)
    top = project(NORM(hidden)).argmax(-1)
    return Labelled(hidden, torch.where(NORM(hidden)[:, 0] > 0.3, top, (top + 1) % V))


def test_a_planted_gate_is_recovered() -> None:
    fit, select = gated(4000, 1), gated(2000, 2)
    never = HeadTraining(visits=1, batch_tokens=1, learning_rate=1e-12)
    head = train_head(NORM, torch.zeros(H, H), fit, select, project, never, torch.Generator().manual_seed(0))
    exit_head, quality = train_gate(
        3, head, fit, select, project, ProbeTraining(), torch.Generator().manual_seed(0)
    )
    assert quality.auc > 0.99
    assert quality.auc_probe > 0.99
    assert 0.4 < quality.auc_top < 0.6
    assert quality.calibration_error < 0.03
    gate = exit_head.gate(select.hidden, torch.full((2000,), 0.9), project)
    agrees = project(exit_head.read(select.hidden)[0]).argmax(-1) == select.top
    assert float(agrees[gate.leaves].float().mean()) > 0.95
    assert int(gate.leaves.sum()) > 400
    assert exit_head.screen_ratio > 0
    assert len(gate.projected) < 1500, "the screen turns away those that cannot leave"


def test_auc_is_the_chance_of_the_right_order() -> None:
    import numpy as np

    score, truth = np.array([0.1, 0.4, 0.4, 0.8]), np.array([False, False, True, True])
    assert auc(score, truth) == pytest.approx((1 + 0.5 + 1 + 1) / 4)
    assert auc(score, np.array([True] * 4)) == 0.5


def test_logistic_regression_finds_the_weights() -> None:
    g = torch.Generator().manual_seed(0)
    features = torch.randn(40_000, 3, generator=g) * torch.tensor([1.0, 5.0, 0.1]) + 2.0
    wanted = torch.tensor([1.5, -0.3, 4.0, -10.0])
    chance = torch.sigmoid(features @ wanted[:3] + wanted[3])
    found = logistic_regression(features, torch.rand(40_000, generator=g) < chance)
    torch.testing.assert_close(found[:3], wanted[:3], rtol=0.12, atol=0.03)
    separated = logistic_regression(features[:, :1], features[:, 0] > 2.0)
    assert math.isfinite(float(separated[0]))
    assert float(separated[0]) > 5
    same = logistic_regression(features, torch.ones(40_000, dtype=torch.bool))
    assert bool(torch.isfinite(same).all())
