"""An engine on a GPU says the same with CUDA graphs and without, whatever leaves where."""

import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from exeunt.compression.exit_output import Shortlist
from exeunt.compression.exits import ExitConfirmation, ExitJudge
from exeunt.compression.graph_pool import GraphPool
from exeunt.compression.model import LoadedModel, load_plain_model
from exeunt.compression.row_graphs import StepGraphs
from exeunt.server.request import ExitPolicy, SamplingParams
from exeunt.server.row_sampling import RowSampling
from exeunt.server.sampling import sample
from tests.server.conftest import VOCAB, random_exit
from tests.server.engine_bench import (
    BACKFILL,
    FULL,
    INT4_KV,
    LEAVE,
    OFF,
    VERIFIED,
    Begun,
    Heard,
    Taken,
    running,
)
from tests.server.test_soak import answer_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module")
def gpu_model(tiny_checkpoint: Path) -> LoadedModel:
    """The tiny model in bfloat16, with two exits of which the first looks at a shortlist, which all logits confirm."""
    model = load_plain_model(tiny_checkpoint, device="cuda", dtype=torch.bfloat16)
    first, second = (random_exit(block, model, seed) for block, seed in ((1, 1), (3, 2)))
    g = torch.Generator().manual_seed(3)
    judge = ExitJudge(
        torch.randn(5, 8, generator=g) / 5, torch.zeros(8), torch.randn(8, generator=g), torch.zeros(())
    )
    last = ExitConfirmation(judge, torch.tensor([1.0, 0.2, 0.1, 1.5]), 0.5)
    first = replace(first, judge=judge, shortlist=Shortlist(torch.arange(0, VOCAB, 3)), confirmation=last)
    exits = tuple(head.to(model.device, model.dtype) for head in (first, second))
    return replace(model, exits=exits)


def _spoken(model: LoadedModel, cuda_graphs: bool, audit_share: float = 0.0) -> list[Heard]:
    with running(model, audit_share=audit_share, cuda_graphs=cuda_graphs, max_num_seqs=9) as bench:
        with bench.held():
            asked = [
                bench.ask(
                    prompt=tuple((7 * i + j * j) % 256 for j in range(5 + 9 * i)),
                    exits=exits,
                    variant=variant,
                    temperature=0.8 * (i % 2),
                    top_p=0.9 if i == 3 else 1.0,
                    seed=i,
                    max_new_tokens=40,
                )
                for variant in (FULL, INT4_KV)
                for exits in (OFF, LEAVE, BACKFILL, VERIFIED)
                for i in range(5)
            ]
        heard = [each.wait() for each in asked]
        graphs = model.decoder(FULL).step_graphs
        assert (graphs is not None) == cuda_graphs
        if graphs is not None:
            assert graphs.count > 0
            deadline = time.monotonic() + 10  # the engine sets its gauges before it sleeps
            while (
                not bench.value("exeunt_resident_bytes", kind="cuda_graphs") and time.monotonic() < deadline
            ):
                time.sleep(0.01)
            assert bench.value("exeunt_resident_bytes", kind="cuda_graphs") > 0
    assert model.resident_bytes()["cuda_graphs"] == 0
    return heard


@pytest.mark.parametrize("audit_share", [0.0, 1.0])
def test_tokens_and_exits_are_those_without_graphs(gpu_model: LoadedModel, audit_share: float) -> None:
    plain, captured = (_spoken(gpu_model, graphs, audit_share) for graphs in (False, True))
    assert any(name != "final" for heard in plain for name in heard.exits())
    for one, two in zip(plain, captured, strict=True):
        assert one.ids() == two.ids()
        if one.mode != "verified":  # which drafts as it pays at the moment
            assert one.exits() == two.exits()


def _leaving(
    model: LoadedModel, exits: ExitPolicy, cuda_graphs: bool, audit_share: float
) -> tuple[list[Heard], float]:
    """Answers whose tokens leave, among some whose tokens do not, and how many tokens were audited."""
    with running(model, audit_share=audit_share, cuda_graphs=cuda_graphs, max_num_seqs=9) as bench:
        with bench.held():
            asked = [
                bench.ask(
                    prompt=tuple((7 * i + j * j) % 256 for j in range(5 + 9 * i)),
                    exits=OFF if i == 5 else exits,
                    variant=variant,
                    temperature=1.3 * (i % 2),
                    top_p=0.9 if i == 3 else 1.0,
                    seed=i,
                    ignore_eos=i % 3 == 0,
                    max_new_tokens=40 + 20 * i,
                )
                for variant in (FULL, INT4_KV)
                for i in range(7)
            ]
        heard = [each.wait() for each in asked]
        return heard, bench.value("exeunt_audited_tokens_total")


@pytest.mark.parametrize("audit_share", [0.0, 0.5])
@pytest.mark.parametrize("exits", [LEAVE, BACKFILL], ids=["propagate", "backfill"])
def test_where_the_device_decides_who_leaves_answers_are_the_same(
    gpu_model: LoadedModel, monkeypatch: pytest.MonkeyPatch, exits: ExitPolicy, audit_share: float
) -> None:
    plain, audited = _leaving(gpu_model, exits, False, audit_share)
    taken, begun = Taken(monkeypatch), Begun(monkeypatch)
    device, audited_too = _leaving(gpu_model, exits, True, audit_share)
    assert max(asking for _, asking in taken.rows) > 3
    if exits is LEAVE:
        assert max(begun.rows, default=0) > 1
    assert any(name != "final" for heard in plain for name in heard.exits())
    assert [answer_of(one) for one in device] == [answer_of(one) for one in plain]
    assert audited == audited_too
    assert (audited > 0) == (audit_share > 0)


def _plain_answers(
    model: LoadedModel, *, cuda_graphs: bool = True, async_scheduling: bool = True
) -> list[Heard]:
    """Answers whose steps can be begun ahead; they end by a token, by a stop string, or by their length."""
    with running(model, max_num_seqs=9, cuda_graphs=cuda_graphs, async_scheduling=async_scheduling) as bench:
        with bench.held():
            asked = [
                bench.ask(
                    prompt=tuple((7 * i + j * j) % 256 for j in range(5 + 9 * i)),
                    variant=variant,
                    temperature=1.3 * (i % 2),
                    top_p=0.9 if i == 3 else 1.0,
                    seed=i,
                    ignore_eos=i % 3 == 0,
                    stop=("e ",) if i == 4 else (),
                    max_new_tokens=40 + 20 * i,
                )
                for variant in (FULL, INT4_KV)
                for i in range(7)
            ]
        return [each.wait() for each in asked]


def test_steps_begun_ahead_say_the_same(gpu_model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = Begun(monkeypatch)
    in_turn = _plain_answers(gpu_model, async_scheduling=False)
    assert begun.rows == []
    ahead = _plain_answers(gpu_model)
    assert len(begun.rows) > 20
    without_graphs = _plain_answers(gpu_model, cuda_graphs=False)
    for other in (ahead, without_graphs):
        assert [answer_of(one) for one in other] == [answer_of(one) for one in in_turn]


def test_draws_in_graphs_are_the_same_bits() -> None:
    graphs = StepGraphs(GraphPool(torch.device("cuda")))
    for rows in (1, 3, 8, 40, 3, 200):
        logits = torch.randn(rows, 3000, device="cuda") * 4
        asks = [
            RowSampling(SamplingParams(temperature=(0.0, 0.7, 1.2)[i % 3], seed=i), 0, i) for i in range(rows)
        ]
        plain, captured = sample(logits, asks), sample(logits, asks, graphs=graphs)
        assert captured == plain
    assert graphs.count == 4


def test_a_row_that_cannot_be_drawn_harms_no_other() -> None:
    graphs = StepGraphs(GraphPool(torch.device("cuda")))
    logits = torch.randn(4, 300, device="cuda")
    logits[2, 7] = torch.nan
    asks = [RowSampling(SamplingParams(temperature=1.0, seed=i), 0, 0) for i in range(4)]
    plain, captured = sample(logits, asks), sample(logits, asks, graphs=graphs)
    assert captured.ids == plain.ids
    assert captured.ids[2] == -1
    assert [error is None for error in captured.errors] == [True, True, False, True]
