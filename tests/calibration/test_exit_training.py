"""Heads and gates find what is planted in the states; what they report is what they do."""

import math
from typing import Literal

import pytest
import torch
import torch.nn.functional as F

from exeunt.calibration.exit_fit import LOSSES
from exeunt.calibration.exit_training import (
    HeadTraining,
    Labelled,
    Loss,
    TrainedHead,
    head_agreement,
    head_state,
    loss_slope,
    planned_visits,
    train_head,
)
from exeunt.calibration.gate_training import ProbeTraining, auc, logistic_regression, train_gate
from exeunt.compression.exits import ExitHead, ExitNorm, ExitProbe

H, V = 16, 24
NORM = ExitNorm("layer", torch.ones(H), torch.zeros(H), 1e-5)
QUICK = HeadTraining(visits=120_000, learning_rate=1e-2, most_epochs=60, anchor_tokens=0)


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
    served = head_agreement(head.norm, head.adapter, select, project)
    assert (served.all, served.selective) == (head.agreement, head.selective)
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


def test_training_ends_when_agreement_stops_rising_and_keeps_the_best() -> None:
    """Few tokens, learnt by heart: held-out agreement rises and then falls."""
    training = HeadTraining(
        visits=200_000, batch_tokens=64, learning_rate=1e-2, most_epochs=2000, evaluations=50, anchor_tokens=0
    )
    done: list[int] = []
    head = train_head(
        NORM,
        torch.zeros(H, H),
        rotated(150, 1),
        rotated(1000, 2),
        project,
        training,
        torch.Generator().manual_seed(0),
        done.append,
    )
    assert head.stopped_early
    assert not head.still_rising
    assert head.visits < 100_000
    assert sum(done) == planned_visits(150, training), "what stopping spares is told as well"
    values = [point.selective for point in head.curve]
    assert head.selective == max(values) > values[0] + 0.2
    best = values.index(max(values))
    assert len(values) - 1 - best >= training.patience, "it went on to see that nothing better came"
    assert head.agreement == head.curve[best].agreement


def test_training_goes_on_while_agreement_rises() -> None:
    training = HeadTraining(visits=40_000, learning_rate=1e-3, most_epochs=60, evaluations=8, anchor_tokens=0)
    generator = torch.Generator().manual_seed(0)
    head = train_head(
        NORM, torch.zeros(H, H), rotated(3000, 1), rotated(1000, 2), project, training, generator
    )
    assert not head.stopped_early
    assert head.still_rising
    assert head.visits == planned_visits(3000, training)
    values = [point.selective for point in head.curve]
    assert values == sorted(values)


def test_a_head_is_held_back_towards_its_start_the_more_the_fewer_tokens_there_are() -> None:
    def moved(anchor: int, tokens: int) -> float:
        training = HeadTraining(
            visits=20_000, learning_rate=1e-2, most_epochs=200, evaluations=1, anchor_tokens=anchor
        )
        generator = torch.Generator().manual_seed(0)
        fit, select = rotated(tokens, 1), rotated(1000, 2)
        head = train_head(NORM, torch.zeros(H, H), fit, select, project, training, generator)
        return float(head.adapter.norm())

    free, held, held_less = moved(0, 300), moved(10_000, 300), moved(10_000, 3000)
    assert held < 0.5 * free
    assert held < 0.7 * held_less


def test_the_start_that_knows_when_it_is_right_is_taken_though_it_agrees_less_often() -> None:
    """The state holds the class twice, in two halves; how large the second is tells whether full depth says it."""
    half = H // 2
    g = torch.Generator().manual_seed(3)
    codes = torch.nn.functional.normalize(torch.randn(V, half, generator=g), dim=1)
    kind = torch.randint(V, (4000,), generator=g)
    right = torch.rand(4000, generator=g) < 0.6
    size = torch.where(right, 3.0, 0.6) + 0.1 * torch.rand(4000, generator=g)
    blurred = codes[kind] * size[:, None] + 0.6 * torch.randn(4000, half, generator=g)
    hidden = torch.cat((codes[kind] * (1 + 2 * torch.rand(4000, 1, generator=g)), blurred), 1)
    data = Labelled(hidden, torch.where(right, kind, (kind + 1) % V))
    first, second = (torch.cat((torch.eye(half) * (i == 0), torch.eye(half) * (i == 1)), 1) for i in (0, 1))
    matrix = 5.0 * torch.cat((codes, torch.zeros(V, half)), 1)  # reads the first half
    ridge = torch.cat((second - first, torch.zeros(half, H)))  # puts the second half in its place
    keeps = ExitNorm("rms", torch.ones(H) * 1e3, None, 1e6)  # of eps so large that sizes stay

    def read(state: torch.Tensor) -> torch.Tensor:
        return state @ matrix.T

    training, generator = HeadTraining(visits=1, batch_tokens=1, learning_rate=1e-12), torch.Generator()
    head = train_head(keeps, ridge, data, data, read, training, generator)
    assert head.ridge_agreement < head.untrained_agreement
    assert head.start == "ridge"
    assert head.selective > 0.8


def test_the_same_seed_gives_the_same_head_to_the_bit() -> None:
    def head() -> TrainedHead:
        training = HeadTraining(visits=5000, batch_tokens=64)
        generator = torch.Generator().manual_seed(7)
        return train_head(
            NORM, torch.zeros(H, H), rotated(500, 1), rotated(500, 2), project, training, generator
        )

    one, other = head(), head()
    assert torch.equal(one.adapter, other.adapter)
    assert one.curve == other.curve


def test_the_distributions_loss_is_the_top_tokens_where_all_of_it_is_on_the_top_token() -> None:
    """The last state is made so large that what it says is one-hot; a norm that keeps sizes lets it through."""
    flat = ExitNorm("rms", torch.ones(H), None, 1e12)  # divides by a million whatever the state

    def sharp(state: torch.Tensor) -> torch.Tensor:
        return project(state * 1e6)

    g = torch.Generator().manual_seed(1)
    hidden = torch.randn(2000, H, generator=g)
    mix = torch.randn(H, H, generator=torch.Generator().manual_seed(77)) / H**0.5
    final = hidden @ mix.T * 1e5
    top = sharp(flat(final)).argmax(-1)
    data = Labelled(hidden, top, final)
    training = HeadTraining(visits=6000, batch_tokens=64, learning_rate=1e-2, anchor_tokens=0)
    heads = [
        train_head(
            flat,
            torch.zeros(H, H),
            data,
            data,
            sharp,
            training,
            torch.Generator().manual_seed(0),
            loss=loss,
        )
        for loss in LOSSES
    ]
    assert heads[0].agreement > heads[0].untrained_agreement + 0.2
    for other in heads[1:]:
        torch.testing.assert_close(heads[0].adapter, other.adapter, atol=1e-5, rtol=1e-4)


def test_the_distribution_cannot_be_matched_without_it() -> None:
    data = rotated(300, 1)
    training, generator = HeadTraining(visits=300), torch.Generator().manual_seed(0)
    with pytest.raises(ValueError, match="no states of the last block"):
        train_head(
            NORM,
            torch.zeros(H, H),
            data,
            data,
            project,
            training,
            generator,
            loss="distribution",
        )


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
    assert len(gate.looked) < 1500, "the screen turns away those that cannot leave"


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


@pytest.mark.parametrize(("loss", "of_top"), [("top token", 1.0), ("both", 0.5), ("distribution", 0.0)])
def test_training_goes_down_the_slope_of_its_loss(loss: Loss, of_top: float) -> None:
    g = torch.Generator().manual_seed(4)
    data = Labelled(
        torch.randn(30, H, generator=g), torch.randint(V, (30,), generator=g), torch.randn(30, H, generator=g)
    )
    assert data.final is not None
    logits = torch.randn(30, V, generator=g, requires_grad=True)
    wanted = project(NORM(data.final)).softmax(-1)
    top, divergence = F.cross_entropy(logits, data.top), F.cross_entropy(logits, wanted)
    (of_top * top + (1 - of_top) * divergence).backward()
    torch.testing.assert_close(loss_slope(logits.detach(), data, project, NORM, loss), logits.grad)


def test_a_loss_that_needs_full_depths_states_says_so() -> None:
    with pytest.raises(ValueError, match="no states of the last block"):
        loss_slope(torch.zeros(3, V), rotated(3, 1), project, NORM, "both")
