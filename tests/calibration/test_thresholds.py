"""Planning: what the gates' view forecasts, and which thresholds it has tested."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from exeunt.calibration.exit_training import Labelled
from exeunt.calibration.risk import disagreement_sequence
from exeunt.calibration.sequence_batch import batches
from exeunt.calibration.teacher_forcing import ForcedModel, logit_rows
from exeunt.calibration.thresholds import GateShares, GateView, gate_reach, plan_thresholds, view_gates
from exeunt.compression.decoder import Decoder
from tests.calibration.conftest import HIDDEN, VOCAB, confirmed_exit, random_exit
from tests.calibration.documents_view import documents_view

TARGETS = (0.01, 0.05, 0.2)


def view(tokens: int = 20_000, blocks: int = 80, seed: int = 0) -> GateView:
    """Two exits whose reach is a calibrated probability: a token agrees with exactly that chance."""
    g = np.random.default_rng(seed)
    reach = np.stack([g.beta(1.0, 1.5, tokens), g.beta(2.0, 1.0, tokens)])
    return GateView(
        reach,
        reach,
        reach,
        g.random((2, tokens)) < reach,
        np.repeat(np.arange(blocks), tokens // blocks),
        blocks,
    )


def test_tokens_leave_at_the_first_exit_that_lets_them() -> None:
    seen = GateView(
        np.array([[0.9, 0.2, 0.1, 0.8], [0.1, 0.9, 0.3, 0.9]]),
        np.ones((2, 4)),
        np.ones((2, 4)),
        np.array([[True, True, True, False], [False, False, True, True]]),
        np.array([0, 0, 1, 1]),
        2,
    )
    counts = seen.counts(0.8)
    assert counts.exits.tolist() == [2.0, 1.0]
    assert counts.errors.tolist() == [1.0, 1.0]  # the second token at exit 1, the fourth at exit 0
    assert counts.exit_rate == 0.75
    assert seen.leave_at(0.8).tolist() == [0, 1, 2, 0]


def test_shares_count_what_each_gate_does_with_tokens_that_come_to_it() -> None:
    """Of five tokens the last may not leave; the second exit is asked by the two that stay at the first."""
    seen = GateView(
        np.array([[0.9, 0.2, 0.1, 0.8, -1.0], [0.1, 0.9, 0.3, 0.9, 0.9]]),
        np.array([[0.9, 0.9, 0.1, 0.9, 0.9], [1.0, 1.0, 1.0, 1.0, 1.0]]),
        np.array([[0.9, 0.8, 0.1, 0.8, 0.9], [0.1, 0.9, 0.3, 0.9, 0.9]]),
        np.ones((2, 5), dtype=bool),
        np.zeros(5, dtype=np.int64),
        1,
    )
    assert seen.shares(0.8) == GateShares(0.8, asked=6 / 4, looked=5 / 4, whole=4 / 4, left=3 / 4)
    assert seen.shares(0.95) == GateShares(0.95, asked=2.0, looked=1.0, whole=0.0, left=0.0)


def test_plans_run_from_strict_to_loose_and_begin_where_passing_is_likely() -> None:
    plan = plan_thresholds(view(), TARGETS, certify_tokens=40_000)
    assert list(plan.thresholds) == sorted(plan.thresholds, reverse=True)
    assert len(set(plan.thresholds)) == len(plan.thresholds) <= 3 * len(TARGETS)
    assert set(plan.begins) == set(TARGETS)
    assert set(plan.begins.values()) <= set(plan.thresholds)
    fresh = view(seed=1)
    for target in (0.05, 0.2):
        risk = fresh.counts(plan.begins[target]).risk
        assert risk is not None
        assert risk < target
    assert plan.begins[0.01] >= plan.begins[0.05] >= plan.begins[0.2]


def test_the_view_is_what_the_gates_do(decoder: Decoder) -> None:
    """At every threshold the view's exits are those of a pass in which exits change nothing later."""
    exits = (random_exit(0, 1), random_exit(1, 2))
    rows = [torch.randint(VOCAB, (30,), generator=torch.Generator().manual_seed(s)) for s in (1, 2)]
    model = ForcedModel(decoder, "full", exits)
    (batch,) = batches(rows, 1000)
    _, final = model.full_depth(batch)
    top = model.top_tokens(final)
    hidden, states, start = decoder.embed(batch.token_ids, batch.positions), [], 0
    for head in exits:
        hidden = decoder.run_blocks(
            hidden, batch.geometry(model.layout.page_tokens), model.pages(batch), start, head.depth
        )
        states.append(Labelled(hidden, top))
        start = head.depth
    seen = view_gates(exits, states, rows, decoder.project)
    for head, data, place in zip(exits, states, (0, 1), strict=True):
        reach, _, _, agrees = gate_reach(head, data, decoder.project, 0.5)  # blind below 0.5
        leaves = seen.reach[place] >= 0.5
        later = batch.positions.numpy() > 0
        assert ((reach.numpy() >= 0.5) == leaves)[later].all()
        assert (agrees.numpy() == seen.agrees[place])[leaves & later].all()
        assert (reach.numpy() < 0.5).any()
    for threshold in (0.3, 0.5, 0.7):
        left = np.zeros(batch.tokens, dtype=bool)
        for head, data in zip(exits, states, strict=True):
            gate = head.gate(data.hidden, torch.full((batch.tokens,), threshold), decoder.project)
            left |= gate.leaves.numpy()
        left[batch.positions.numpy() == 0] = False
        assert seen.counts(threshold).total == left.sum() > 0


@pytest.mark.parametrize("least", [0.0, 0.5])
def test_a_gate_never_projects_more_rows_than_logits_may_have(decoder: Decoder, least: float) -> None:
    head = random_exit(1, 2)
    hidden = torch.randn(3000, HIDDEN, generator=torch.Generator().manual_seed(4))
    data = Labelled(hidden, torch.zeros(3000, dtype=torch.int64))
    asked: list[int] = []

    def project(state: torch.Tensor) -> torch.Tensor:
        asked.append(len(state))
        return decoder.project(state)

    reach, screened, whole, agrees = gate_reach(head, data, project, least)
    most = logit_rows(VOCAB, torch.device("cpu"))
    assert most < 1500
    assert max(asked) <= most
    looked = screened >= least
    assert sum(asked) == looked.sum() > most
    reading = head.inspect(hidden)
    logits = decoder.project(reading.state)
    sure = torch.minimum(head.confidence(reading, logits), screened)
    torch.testing.assert_close(reach, torch.where(looked, sure, screened))
    assert torch.equal(whole, screened), "without a shortlist a look is at the whole vocabulary"
    assert torch.equal(agrees, looked & (logits.argmax(-1) == 0))


@pytest.mark.parametrize("list_ratio", [None, 0.0, 0.6, 1.0])
@pytest.mark.parametrize("screen_ratio", [0.0, 0.5])
def test_reach_is_what_a_gate_with_a_shortlist_does_row_by_row(
    decoder: Decoder, list_ratio: float | None, screen_ratio: float
) -> None:
    """Looked at, projected onto all tokens, and gone: each up to its own threshold, at whatever threshold is asked."""
    head = replace(confirmed_exit(1, 2, list_ratio), screen_ratio=screen_ratio)
    hidden = torch.randn(400, HIDDEN, generator=torch.Generator().manual_seed(4))
    top = decoder.project(head.read(hidden)[0]).argmax(-1)
    reach = gate_reach(head, Labelled(hidden, top), decoder.project)
    assert bool(reach.agrees.all())
    differ = 0
    for threshold in (0.25, 0.5, 0.75, 0.9):
        gate = head.gate(hidden, torch.full((400,), threshold), decoder.project)
        looked, whole = (torch.zeros(400, dtype=torch.bool) for _ in range(2))
        looked[gate.looked], whole[gate.whole] = True, True
        for said, done in ((reach.looked, looked), (reach.whole, whole), (reach.leaves, gate.leaves)):
            near = (said - threshold).abs() < 1e-5  # products of other numbers of rows may round otherwise
            assert torch.equal((said >= threshold)[~near], done[~near])
            assert int(near.sum()) < 4
        differ += int((whole & ~gate.leaves).sum())
    assert (differ > 0) == (list_ratio is not None), "without a confirmation whom the list lets pass leaves"


@pytest.mark.parametrize("target", TARGETS)
def test_an_unsafe_gate_is_not_certified(target: float) -> None:
    """A gate whose reach says nothing: whatever is planned first is far above every target."""
    g = np.random.default_rng(1)
    reach = g.random((1, 10_000))
    seen = GateView(reach, reach, reach, g.random((1, 10_000)) < 0.5, np.repeat(np.arange(40), 250), 40)
    plan = plan_thresholds(seen, (target,), certify_tokens=10_000)
    risk = seen.counts(plan.begins[target]).risk
    assert risk is not None
    assert risk > target


@pytest.mark.slow
@pytest.mark.parametrize(("documents", "spread"), [(20, 0.5), (40, 1.0), (80, 1.0)])
def test_the_whole_way_from_planning_to_certificates_keeps_its_level(documents: int, spread: float) -> None:
    """Planned on a select split, ρ estimated there, then tested in sequence on a certify split of twice its tokens.

    Of the certificates that could be, at most 5 % are of thresholds whose true risk, that of a text of thousands of
    documents, is above the target.
    """
    generator = np.random.default_rng(17)
    population = documents_view(generator, 4000, 1_000_000, spread)
    surest = np.argsort(-population.reach[0])
    risks = np.cumsum(~population.agrees[0][surest]) / np.arange(1, len(surest) + 1)  # by how many leave
    runs, unsafe, held = 100, 0, 0
    for _ in range(runs):
        select = documents_view(generator, max(20, documents // 2), 8_000, spread)
        plan = plan_thresholds(select, TARGETS, certify_tokens=16_000)
        certify = documents_view(generator, documents, 16_000, spread)
        for target in TARGETS:
            sequence = disagreement_sequence(target, plan.begins[target], plan.correlation)
            for threshold in plan.thresholds:
                sequence.test(threshold, certify.counts(threshold))
            found = sequence.certificate
            if found.threshold is not None:
                left = int((population.reach[0] >= found.threshold).sum())
                held += 1
                unsafe += bool(risks[left - 1] > target)
    assert held > 0.2 * runs * len(TARGETS)  # it is not by certifying nothing
    assert unsafe / (runs * len(TARGETS)) <= 0.05
