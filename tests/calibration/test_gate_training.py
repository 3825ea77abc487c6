"""Gates on planted states: what decides agreement is known, so the best possible gate is known too."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from exeunt.calibration.exit_choice import ExitCosts
from exeunt.calibration.exit_training import Labelled, TrainedHead
from exeunt.calibration.exit_worth import ExitWorth
from exeunt.calibration.gate_quality import GateQuality, auc
from exeunt.calibration.gate_training import (
    STOPPING_SHARE,
    ProbeTraining,
    planned_gate_tokens,
    train_gate,
)
from exeunt.compression.exit_output import Shortlist
from exeunt.compression.exits import ExitHead
from exeunt.compression.norm import Norm

H, V = 16, 96
NORM = Norm("rms", torch.ones(H), None, 1e-6)
OWN = TrainedHead(NORM, torch.zeros(H, H), 0.5, 0.5, 0.5)
OUTPUT = torch.randn(V, H, generator=torch.Generator().manual_seed(99)) / 2


def project(state: Tensor) -> Tensor:
    return state @ OUTPUT.T


def chance(hidden: Tensor) -> Tensor:
    """The planted probability that full depth says what the model's own head says here."""
    normed = NORM(hidden)
    return torch.sigmoid(2.0 * normed[:, 0] - 1.0 * normed[:, 1] + 0.5)


def planted(tokens: int, seed: int) -> Labelled:
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, H, generator=g)
    own = project(NORM(hidden)).argmax(-1)
    agrees = torch.rand(tokens, generator=g) < chance(hidden)
    return Labelled(hidden, torch.where(agrees, own, (own + 1) % V))


def test_a_planted_gate_is_recovered() -> None:
    """Agreement is a known logistic function of the state: the gate's AUC is near the best there is, and it says so."""
    fit, select = planted(12_000, 1), planted(8_000, 2)
    exit_head, quality = train_gate(
        3, OWN, fit, select, project, ProbeTraining(), torch.Generator().manual_seed(0)
    )
    agrees = (project(NORM(select.hidden)).argmax(-1) == select.top).numpy()
    best = auc(chance(select.hidden).double().numpy(), agrees)
    assert 0.75 < best < 0.95
    assert best - 0.015 < quality.auc < best + 0.005
    assert quality.auc_probe > best - 0.02
    assert quality.auc_top < best - 0.1
    assert quality.calibration_error < 0.025
    for said, was, tokens in quality.reliability:
        assert abs(said - was) < 4 * math.sqrt(0.25 / tokens) + 0.02, (said, was, tokens)
    new = planted(4_000, 3)
    reading = exit_head.inspect(new.hidden)
    sure = exit_head.confidence(reading, project(reading.state))
    assert float((sure - chance(new.hidden)).abs().mean()) < 0.04


def test_a_judge_sees_what_probe_and_margin_cannot() -> None:
    """Agreement depends on the state where the second token is close, and not where it is far: on both together."""

    def interacting(tokens: int, seed: int) -> Labelled:
        g = torch.Generator().manual_seed(seed)
        hidden = torch.randn(tokens, H, generator=g)
        normed = NORM(hidden)
        logits = project(normed)
        first, second = torch.log_softmax(logits, -1).topk(2, dim=-1).values.unbind(1)
        near = (first - second) < 0.6
        odds = torch.where(near, 4.0 * normed[:, 0], -4.0 * normed[:, 0])
        own = logits.argmax(-1)
        agrees = torch.rand(tokens, generator=g) < odds.sigmoid()
        return Labelled(hidden, torch.where(agrees, own, (own + 1) % V))

    _, quality = train_gate(
        0,
        OWN,
        interacting(12_000, 1),
        interacting(6_000, 2),
        project,
        ProbeTraining(),
        torch.Generator().manual_seed(0),
    )
    assert quality.auc_probe < 0.65
    assert quality.auc_top < 0.6
    assert quality.auc > 0.8


def test_quality_is_that_of_tokens_not_fitted_to() -> None:
    """Where agreement is a toss-up no gate separates, however many tokens its own regression would remember."""
    g = torch.Generator().manual_seed(5)

    def noise(tokens: int) -> Labelled:
        hidden = torch.randn(tokens, H, generator=g)
        own = project(NORM(hidden)).argmax(-1)
        agrees = torch.rand(tokens, generator=g) < 0.5
        return Labelled(hidden, torch.where(agrees, own, (own + 1) % V))

    found = []
    for seed in range(6):
        training = ProbeTraining(steps=200, evaluations=4)
        _, quality = train_gate(
            0, OWN, noise(1_000), noise(120), project, training, torch.Generator().manual_seed(seed)
        )
        found.append(quality.auc)
    # 120 tokens: one AUC scatters by 0.05, the mean of six by 0.02
    assert float(np.mean(found)) < 0.56


def test_a_shortlist_decides_and_the_vocabulary_agrees() -> None:
    """With a shortlist agreement is still that of all tokens, and the gate's confidence holds for it."""
    fit, select = planted(12_000, 1), planted(8_000, 2)
    own = project(NORM(fit.hidden)).argmax(-1)
    often = torch.bincount(own, minlength=V).argsort(descending=True, stable=True)[: V // 4].sort().values
    exit_head, quality = train_gate(
        3,
        OWN,
        fit,
        select,
        project,
        ProbeTraining(),
        torch.Generator().manual_seed(0),
        shortlist=Shortlist(often),
    )
    assert exit_head.shortlist is not None
    assert quality.calibration_error < 0.03
    result = exit_head.gate(select.hidden, torch.full((8_000,), 0.8), project)
    right = result.logits.argmax(-1) == select.top[result.leaves]
    assert bool((~torch.isin(result.logits.argmax(-1), often)).any())
    assert float(right.float().mean()) == pytest.approx(
        float(result.confidence[result.leaves].mean()), abs=0.03
    )


def hidden_from_the_list(tokens: int, seed: int) -> Labelled:
    """Agreement hangs on the distance between the two largest logits, the first of which is outside the list's."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, H, generator=g)
    logits = project(NORM(hidden))
    first, second = logits.topk(2, dim=-1).values.unbind(1)
    agrees = torch.rand(tokens, generator=g) < (4.0 * (first - second) - 2.0).sigmoid()
    own = logits.argmax(-1)
    return Labelled(hidden, torch.where(agrees, own, (own + 1) % V))


def test_all_logits_see_what_a_blind_list_does_not() -> None:
    """With a list of tokens that are seldom said the gate separates by its confirmation alone, and is believed."""
    fit, select = hidden_from_the_list(12_000, 1), hidden_from_the_list(8_000, 2)
    own = project(NORM(fit.hidden)).argmax(-1)
    seldom = torch.bincount(own, minlength=V).argsort(stable=True)[: V // 8].sort().values
    free = ExitWorth(4, 12, ExitCosts(0.0, 0.0, 0.0), (0.1, 0.2))
    training, listed = ProbeTraining(), Shortlist(seldom)

    def trained(worth: ExitWorth) -> tuple[ExitHead, GateQuality]:
        generator = torch.Generator().manual_seed(0)
        return train_gate(3, OWN, fit, select, project, training, generator, shortlist=listed, worth=worth)

    head, quality = trained(free)
    assert head.confirmation is not None
    assert quality.auc_listed is not None
    assert quality.auc_listed < 0.7
    assert quality.auc > quality.auc_listed + 0.1
    assert quality.calibration_error < 0.03
    dear = replace(free, costs=ExitCosts(0.0, 0.0, 0.0, whole=50.0))
    strict, _ = trained(dear)
    assert strict.confirmation is not None
    assert head.confirmation.list_ratio < strict.confirmation.list_ratio == 1.0


def test_the_same_seed_gives_the_same_gate() -> None:
    fit, select = planted(1_500, 1), planted(600, 2)
    training = ProbeTraining(steps=60, evaluations=3)
    first, again, other = (
        train_gate(3, OWN, fit, select, project, training, torch.Generator().manual_seed(seed))[0]
        for seed in (0, 0, 1)
    )
    assert torch.equal(first.combine, again.combine)
    assert first.judge is not None
    assert again.judge is not None
    assert all(torch.equal(a, b) for a, b in zip(first.judge.parts, again.judge.parts, strict=True))
    assert not torch.equal(first.combine, other.combine)


def test_the_planned_work_is_the_work_done() -> None:
    done: list[int] = []
    training = ProbeTraining(steps=7, evaluations=2)
    fit, select = planted(500, 1), planted(300, 2)
    train_gate(3, OWN, fit, select, project, training, torch.Generator().manual_seed(0), done.append)
    assert sum(done) == planned_gate_tokens(500, 300, training)


def test_training_stops_by_tokens_that_it_does_not_train_on() -> None:
    """The last tenth disagrees with all the rest: what was learned from these does not survive it."""
    fit, select = planted(3_000, 1), planted(3_000, 2)
    cut = 3_000 - int(3_000 * STOPPING_SHARE)
    own = project(NORM(fit.hidden)).argmax(-1)
    turned = torch.where(fit.top == own, (own + 1) % V, own)
    contrary = replace(fit, top=torch.cat((fit.top[:cut], turned[cut:])))
    aucs = [
        train_gate(3, OWN, data, select, project, ProbeTraining(steps=240), torch.Generator().manual_seed(0))[
            1
        ].auc_probe
        for data in (fit, contrary)
    ]
    assert aucs[0] > aucs[1] + 0.02
