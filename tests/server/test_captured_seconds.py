"""What capturing CUDA graphs takes is no part of what stages cost, nor of how long a variant was served."""

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from exeunt.compression.decoder import Decoder
from exeunt.compression.host_memory import Fetch
from exeunt.compression.model import LoadedModel
from exeunt.compression.row_graphs import StepGraphs
from exeunt.server import sampling
from exeunt.server.auditor import Auditor
from exeunt.server.request import SamplingParams
from exeunt.server.row_sampling import RowSampling, row_keys
from exeunt.server.sampling import sample
from exeunt.server.scheduler import Scheduler
from exeunt.server.tick_run import StageRun
from tests.compression.fake_graphs import FakePool
from tests.server.engine_bench import BACKFILL, go_by_stages, running

CAPTURE_S = 0.15  # far longer than a step, on a busy machine too


@pytest.mark.parametrize("audit_share", [0.0, 1.0])
def test_captures_are_set_apart(
    tiny_model: LoadedModel, monkeypatch: pytest.MonkeyPatch, audit_share: float
) -> None:
    pool: Any = SimpleNamespace(seconds=0.0)
    project = Decoder.head

    def capturing(decoder: Decoder, hidden: torch.Tensor) -> torch.Tensor:
        time.sleep(CAPTURE_S)
        pool.seconds += CAPTURE_S
        return project(decoder, hidden)

    runs: list[StageRun] = []
    served: list[float] = []
    serve = Scheduler.served

    def noted(scheduler: Scheduler, variant: Any, seconds: float) -> None:
        served.append(seconds)
        serve(scheduler, variant, seconds)

    go_by_stages(monkeypatch)
    monkeypatch.setattr(Decoder, "head", capturing)
    monkeypatch.setattr(Scheduler, "served", noted)
    with running(tiny_model, audit_share=audit_share) as bench:
        engine = bench.engine
        engine._on_stages = runs.append
        engine._runner._graphs = SimpleNamespace(pool=pool)  # type: ignore[assignment] # all that is read of it
        monkeypatch.setattr("exeunt.server.runner.start_each", lambda *given: sampling.start_each(*given[:3]))
        bench.answer(exits=BACKFILL, max_new_tokens=8)
    assert pool.seconds > CAPTURE_S * 2
    assert sorted(run.seconds for run in runs)[len(runs) // 2] < CAPTURE_S / 2
    assert sorted(served)[len(served) // 2] < CAPTURE_S / 2
    assert min(run.seconds for run in runs) > 0
    assert engine._costs.around.seconds < CAPTURE_S / 2


def test_an_auditor_leaves_captures_to_others() -> None:
    captured = [0.0]
    auditor = Auditor(1.0, torch.device("cpu"), lambda: captured[0])
    with auditor._aside():
        time.sleep(CAPTURE_S)
        captured[0] += CAPTURE_S
    assert abs(auditor.take_seconds()) < CAPTURE_S / 2


@pytest.mark.parametrize("failing", [False, True])
def test_what_comes_beside_the_tokens_comes_where_rows_are_drawn_one_by_one_too(
    failing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = torch.randn(5, 70, generator=torch.Generator().manual_seed(4))
    if failing:
        monkeypatch.setattr(sampling, "row_keys", lambda rows: 1 / (1 - len(rows) // 5))
    found = sampling.start_each(logits, ROWS, beside=torch.tensor([4, 3, 2, 1, 0])).wait()
    assert found.beside == (4, 3, 2, 1, 0)
    assert [error is not None for error in found.errors] == [failing] * 5


ROWS = [
    RowSampling(SamplingParams(temperature=temperature, seed=seed), 0, seed)
    for seed, temperature in enumerate((0.0, 0.7, 1.3, 0.0, 1.0))
]


@pytest.mark.parametrize("beside", [(), (3, 0, 2, 1 << 40, 7)], ids=["", "beside"])
@pytest.mark.parametrize("with_graphs", [False, True])
def test_draws_that_travel_packed_are_the_same(
    with_graphs: bool, beside: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs = StepGraphs(FakePool()) if with_graphs else None
    along = torch.tensor(beside) if beside else None
    copies: list[torch.Size] = []

    class Counted(Fetch):
        def __init__(self, tensor: torch.Tensor) -> None:
            copies.append(tensor.shape)
            super().__init__(tensor)

    monkeypatch.setattr(sampling, "Fetch", Counted)
    logits = torch.randn(5, 70, generator=torch.Generator().manual_seed(4)) * 3
    logits[3, 5] = torch.nan
    expected = sample(logits, ROWS)
    temperatures = torch.tensor([row.params.temperature for row in ROWS]).numpy()
    for _ in range(2):
        keys = row_keys(ROWS)
        started = sampling._start_there(logits, logits, temperatures, keys, graphs, along)
        found = started.wait()
        assert found.ids == expected.ids
        assert found.errors == expected.errors
        assert found.beside == beside
        assert found.logprobs[:3] == pytest.approx(expected.logprobs[:3], abs=1e-6)
        assert started.ids is not None
        ids = started.ids.long().tolist()
        assert ids[:3] + ids[4:] == [*found.ids[:3], *found.ids[4:]]
        assert ids[3] in range(70)  # of a row without a token too
    assert copies == [(5, 3 if beside else 2)] * 2
    if graphs is not None:
        assert graphs.count == 1
        cut = logits.masked_fill(torch.arange(70) > 30, -torch.inf)
        assert sampling._start_there(logits, cut, temperatures, keys, graphs, along).wait().beside == beside
        assert graphs.count == 1  # what others were drawn from is theirs
