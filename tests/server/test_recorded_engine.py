"""An engine whose graphs are recorded says what it says without: a GPU's way, with operators that stand for kernels."""

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from exeunt.compression.host_memory import Fetch
from exeunt.compression.model import LoadedModel, load_plain_model
from exeunt.server.request import ExitPolicy
from exeunt.server.runner import Runner
from exeunt.server.tick_run import TickRun
from tests.compression.recorded_gpu import RecordedGPU, recorded_gpu
from tests.server.conftest import with_exits
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
from tests.server.test_soak import Asked, answer_of, random_request

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> LoadedModel:
    """The tiny model in bfloat16, of whose sums the operators know every bit."""
    return with_exits(load_plain_model(tiny_checkpoint, device="cpu", dtype=torch.bfloat16))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[RecordedGPU]:
    """A GPU whose graphs are recorded."""
    with recorded_gpu(monkeypatch) as found:
        yield found


def _answers(
    model: LoadedModel, exits: ExitPolicy, audit_share: float = 0.0, **limits: Any
) -> tuple[list[Heard], float]:
    """Answers of several lengths, greedy and drawn, one of them without exits; and how many tokens were audited."""
    with running(model, audit_share=audit_share, max_num_seqs=6, **limits) as bench:
        with bench.held():
            asked = [
                bench.ask(
                    prompt=tuple((7 * i + j * j) % 256 for j in range(5 + 9 * i)),
                    exits=OFF if i == 4 else exits,
                    variant=variant,
                    temperature=1.3 * (i % 2),
                    top_p=0.9 if i == 3 else 1.0,
                    seed=i,
                    ignore_eos=i % 3 == 0,
                    stop=("e ",) if i == 4 else (),
                    max_new_tokens=15 + 8 * i,
                )
                for variant in (FULL, INT4_KV)
                for i in range(5)
            ]
        return [each.wait() for each in asked], bench.value("exeunt_audited_tokens_total")


@pytest.mark.parametrize("exits", [LEAVE, BACKFILL], ids=["propagate", "backfill"])
def test_where_the_device_decides_who_leaves_answers_are_the_same(
    model: LoadedModel, gpu: RecordedGPU, monkeypatch: pytest.MonkeyPatch, exits: ExitPolicy
) -> None:
    plain, audited = _answers(model, exits, 0.5, cuda_graphs=False)
    assert gpu.captures == 0
    taken, begun = Taken(monkeypatch), Begun(monkeypatch)
    device, audited_too = _answers(model, exits, 0.5)
    assert gpu.replays > gpu.captures > 0
    assert max(asking for _, asking in taken.rows) > 2
    assert (len(begun.rows) > 10) == (exits is LEAVE)
    assert any(name != "final" for heard in plain for name in heard.exits())
    assert [answer_of(one) for one in device] == [answer_of(one) for one in plain]
    assert audited == audited_too > 0


@pytest.mark.parametrize("exits", [OFF, LEAVE, BACKFILL], ids=["off", "propagate", "backfill"])
def test_a_tick_copies_to_the_host_once(
    model: LoadedModel, gpu: RecordedGPU, monkeypatch: pytest.MonkeyPatch, exits: ExitPolicy
) -> None:
    made, start, copies, ticks = Fetch.__init__, Runner._start_draws, list[torch.Size](), list[int]()

    def counted(fetch: Fetch, tensor: torch.Tensor) -> None:
        copies.append(tensor.shape)
        made(fetch, tensor)

    def started(runner: Runner, run: TickRun) -> None:
        start(runner, run)
        ticks.append(len(run.drawn_rows))

    monkeypatch.setattr(Fetch, "__init__", counted)
    monkeypatch.setattr(Runner, "_start_draws", started)
    _answers(model, exits)
    drawing = [rows for rows in ticks if rows]
    assert len(drawing) > 20
    assert [shape[0] for shape in copies] == drawing
    assert {shape[1] for shape in copies} == ({2} if exits is OFF else {2, 3})
    assert gpu.replays > 0


@pytest.mark.parametrize("exits", [OFF, VERIFIED], ids=["off", "verified"])
def test_steps_begun_ahead_and_verified_exits_say_the_same(
    model: LoadedModel, gpu: RecordedGPU, monkeypatch: pytest.MonkeyPatch, exits: ExitPolicy
) -> None:
    plain, _ = _answers(model, exits, cuda_graphs=False)
    begun = Begun(monkeypatch)
    device, _ = _answers(model, exits)
    assert gpu.replays > gpu.captures > 0
    assert len(begun.rows) > 10 or exits is VERIFIED
    assert [answer_of(one) for one in device] == [answer_of(one) for one in plain]


def test_a_crowd_hears_what_each_hears_alone(
    model: LoadedModel, gpu: RecordedGPU, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Most may leave early, and half of those wait; some are preempted, some cancelled on their way, many audited."""
    dice = random.Random(4)
    requests = [_leaving(dice, random_request(dice, seed)) for seed in range(16)]
    with running(model, max_num_seqs=8, cuda_graphs=False) as bench:
        with bench.held():
            sent = [each.send(bench) for each in requests]
        alone = [answer_of(one.wait()) for one in sent]
    taken = Taken(monkeypatch)
    with running(
        model, 16, audit_share=0.3, max_num_seqs=12, max_num_batched_tokens=64, max_num_queued_reqs=100
    ) as bench:
        with bench.held():
            long = [
                bench.ask(exits=exits, max_new_tokens=200, temperature=1.0) for exits in (LEAVE, BACKFILL)
            ]
            sent = [each.send(bench) for each in requests]
        for place, one in enumerate(sent):
            one.wait()
            if place < 2:
                bench.engine.cancel(f"r{1 + place}")  # the long ones, which were asked first
        crowd = [answer_of(one) for one in sent]
        preempted, audited = (
            bench.value(f"exeunt_{name}_total") for name in ("preemptions", "audited_tokens")
        )
    assert gpu.replays > gpu.captures > 0
    assert sum(asking for _, asking in taken.rows) > 50
    assert min(preempted, audited) > 0
    assert 0 < sum(len(one.ids()) for one in long) < 400
    for request, one, other in zip(requests, crowd, alone, strict=True):
        assert one == other, request


def _leaving(dice: random.Random, asked: Asked) -> Asked:
    """Most requests such that the device decides about their exits."""
    if asked.scored or dice.random() < 0.3:
        return asked
    exits = dice.choice((LEAVE, BACKFILL))
    return replace(asked, request=asked.request | {"exits": exits, "repetition_penalty": 1.0})
