"""Fitting all exits: the journal gives back what was trained, and an interrupted fit ends as an uninterrupted one."""

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from exeunt.calibration.exit_choice import ExitCosts
from exeunt.calibration.exit_fit import ExitData, fit_exits, ridge_start, top_tokens
from exeunt.calibration.exit_records import FittedExit, read_exit
from exeunt.calibration.exit_training import HeadTraining, TrainedHead, train_head
from exeunt.calibration.gate_training import ProbeTraining
from exeunt.calibration.journal import FolderJournal, Journal, NoJournal
from exeunt.calibration.progress import Advance, ProgressReport
from exeunt.calibration.shortlist_choice import shortlist_sizes
from exeunt.calibration.teacher_forcing import ForcedModel
from exeunt.compression.decoder import Decoder
from exeunt.compression.exit_tensors import exit_metadata, exit_tensors
from exeunt.compression.exits import ExitNorm
from tests.calibration.conftest import HIDDEN
from tests.calibration.silent_progress import SilentProgress

FIT, SELECT = 900, 400
NORM = ExitNorm("rms", torch.ones(HIDDEN), None, 1e-6)
HEAD = HeadTraining(visits=4_000, batch_tokens=64, evaluations=3)
PROBE = ProbeTraining(units=8, steps=20, batch_tokens=64, evaluations=2)


class StoppedError(Exception):
    """What the tests stop a fit with."""


class StopsIn(SilentProgress):
    """Interrupts a phase after some calls of its advance."""

    def __init__(self, title: str, after: int) -> None:
        self._title, self._left = title, after

    @contextmanager
    def phase(self, title: str, total: int) -> Iterator[Advance]:
        """A phase that nobody sees, and that may not come to its end."""

        def advance(_units: int) -> None:
            if title == self._title:
                self._left -= 1
                if self._left < 0:
                    raise StoppedError

        yield advance


@pytest.fixture(scope="module")
def model(decoder: Decoder) -> ForcedModel:
    """The tiny model without exits."""
    return ForcedModel(decoder, "full", ())


@pytest.fixture(scope="module")
def data(model: ForcedModel) -> ExitData:
    """States behind two blocks, of which the later is nearer to the last one's."""
    g = torch.Generator().manual_seed(2)
    final = torch.randn(FIT + SELECT, HIDDEN, generator=g)
    states = {
        block: final + scale * torch.randn(final.shape, generator=g) for block, scale in ((0, 0.9), (2, 0.4))
    }
    return ExitData(states, final, top_tokens(model, final, lambda _tokens: None), FIT)


def fit(
    model: ForcedModel,
    data: ExitData,
    journal: Journal | None = None,
    progress: ProgressReport | None = None,
    compared: Sequence[int] = (2,),
    costs: ExitCosts | None = None,
) -> tuple[FittedExit, ...]:
    return fit_exits(
        model,
        NORM,
        data,
        HEAD,
        PROBE,
        3,
        progress or SilentProgress(),
        model.decoder,
        compared=compared,
        risks=(0.05, 0.2),
        journal=journal,
        costs=costs,
    )


def expect_same(one: Sequence[FittedExit], other: Sequence[FittedExit]) -> None:
    """To the bit, and in everything that the report says."""
    for a, b in zip(one, other, strict=True):
        left, right = exit_tensors([a.head]), exit_tensors([b.head])
        assert left.keys() == right.keys()
        assert all(torch.equal(left[name], right[name]) for name in left)
        assert exit_metadata([a.head]) == exit_metadata([b.head])
        assert (a.gate, a.losses, a.training.curve) == (b.gate, b.losses, b.training.curve)
        assert torch.equal(a.training.adapter, b.training.adapter)
        said = (
            "untrained_agreement",
            "ridge_agreement",
            "agreement",
            "selective",
            "start",
            "loss",
            "stopped_early",
        )
        assert [getattr(a.training, name) for name in said] == [getattr(b.training, name) for name in said]


@pytest.mark.parametrize(
    ("title", "after"),
    [
        ("Training exit heads", 5),  # within the first head
        ("Training exit heads", 70),  # within the second
        ("Training exit gates", 10),  # all heads are there
        ("Training exit gates", 35),  # one exit is whole
    ],
)
def test_an_interrupted_fit_ends_as_one_that_was_not(
    model: ForcedModel, data: ExitData, tmp_path: Path, title: str, after: int
) -> None:
    journal = FolderJournal(tmp_path / "work", "it")
    with pytest.raises(StoppedError):
        fit(model, data, journal, StopsIn(title, after))
    resumed = fit(model, data, FolderJournal(tmp_path / "work", "it"))
    expect_same(resumed, fit(model, data, NoJournal()))


def test_exits_share_the_shortlist_that_dear_looks_ask_for(
    model: ForcedModel, data: ExitData, tmp_path: Path
) -> None:
    sizes = shortlist_sizes(model.decoder.spec.vocab_size)
    dear = ExitCosts(0.1, 50.0, 0.1, looks=tuple((size, 0.01) for size in sizes))
    journal = FolderJournal(tmp_path / "work", "it")
    with pytest.raises(StoppedError):
        fit(model, data, journal, StopsIn("Training exit gates", 35), costs=dear)
    resumed = fit(model, data, FolderJournal(tmp_path / "work", "it"), costs=dear)
    listed = {None if each.head.shortlist is None else each.head.shortlist.key for each in resumed}
    assert len(listed) == 1
    assert None not in listed
    assert resumed[0].head.shortlist is not None
    assert len(resumed[0].head.shortlist) in sizes
    expect_same(resumed, fit(model, data, NoJournal(), costs=dear))
    free = ExitCosts(0.1, 0.0, 0.1, looks=tuple((size, 1.0) for size in sizes))
    assert all(each.head.shortlist is None for each in fit(model, data, costs=free))
    assert all(each.head.shortlist is None for each in fit(model, data))


def test_what_is_finished_is_not_done_again(model: ForcedModel, data: ExitData, tmp_path: Path) -> None:
    journal = FolderJournal(tmp_path / "work", "it")
    first = fit(model, data, journal)
    again = fit(model, data, journal, StopsIn("Training exit heads", 0))
    expect_same(first, again)
    kept = read_exit(journal, NORM, 2)
    assert kept is not None
    expect_same(first[1:], [kept])
    assert read_exit(journal, NORM, 1) is None


def test_one_exit_does_not_hang_on_which_others_are_fitted(model: ForcedModel, data: ExitData) -> None:
    both, alone = fit(model, data), fit(model, data.only([2]))
    expect_same(both[1:], alone)


def test_losses_are_compared_where_asked_and_the_best_head_serves(model: ForcedModel, data: ExitData) -> None:
    early, late = fit(model, data)
    assert early.losses is None
    assert early.training.loss == "both"
    assert late.losses is not None
    losses = late.losses
    assert (losses.block, losses.tokens, losses.risks) == (2, SELECT, (0.05, 0.2))
    assert losses.both is not None
    outcomes = {"top token": losses.top_token, "distribution": losses.distribution, "both": losses.both}
    best = max(outcome.selective for outcome in outcomes.values())
    served = outcomes[losses.served]
    assert served.selective == best == late.training.selective
    assert served.agreement == late.training.agreement
    assert late.training.loss == losses.served
    assert losses.start.visits == 0
    assert losses.start.selective <= best
    for outcome in (losses.start, *outcomes.values()):
        assert 0.0 <= outcome.leaving[0] <= outcome.leaving[1] <= 1.0


def test_an_exit_nearer_to_the_end_agrees_more(model: ForcedModel, data: ExitData) -> None:
    early, late = fit(model, data, compared=())
    assert late.training.agreement > early.training.agreement + 0.1
    assert (early.head.block, late.head.block) == (0, 2)


def test_a_start_is_given_up_when_its_head_is_trained(
    model: ForcedModel, data: ExitData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start is as large as a head, and of many candidates only those that wait hold one."""
    made: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []
    train, begin = train_head, ridge_start

    def start(*of: Any) -> torch.Tensor:
        found = begin(*of)
        made.append(weakref.ref(found))
        return found

    def watch(*of: Any) -> TrainedHead:
        alive.append(sum(each() is not None for each in made))
        return train(*of)

    monkeypatch.setattr("exeunt.calibration.exit_fit.ridge_start", start)
    monkeypatch.setattr("exeunt.calibration.exit_fit.train_head", watch)
    fit(model, data, compared=())
    assert (len(made), alive) == (2, [2, 1])
