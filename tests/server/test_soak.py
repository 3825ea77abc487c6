"""Hundreds of requests of every kind at once: every answer is the one that the same request gets alone."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from exeunt.compression.model import LoadedModel
from exeunt.compression.variant import Variant
from exeunt.kernels.blocks import OWN_ROWS_WORK
from exeunt.server.request import ExitPolicy, FinishEvent, ScoredToken, StepEvent
from tests.server.engine_bench import (
    FULL,
    LINEAR,
    OFF,
    PROMPT,
    WAIT_S,
    Bench,
    Heard,
    ask_score,
    running,
)
from tests.server.fixed_drafter import FixedDrafter

INT4_BOTH = Variant(kv_cache="int4", linear_block=True)
VARIANTS = (FULL, Variant(kv_cache="int4"), LINEAR, INT4_BOTH)
REQUESTS = 240


@dataclass(frozen=True)
class Asked:
    """One request of the soak: what to ask, and whether to have its prompt scored in place of continued."""

    request: dict[str, Any]
    scored: bool

    def send(self, bench: Bench, *, alone: bool = False) -> "Heard | Scored":
        """Ask for it; `alone`, verified exits are asked for as exits off, which is what they promise to equal."""
        if not self.scored:
            exits = OFF if alone and self.request["exits"].mode == "verified" else self.request["exits"]
            return bench.ask(**self.request | {"exits": exits})
        prompt, variant, exits = (self.request[key] for key in ("prompt", "variant", "exits"))
        return Scored(ask_score(bench, prompt, exits, variant))


@dataclass(frozen=True)
class Scored:
    outcome: Any

    def wait(self) -> "Scored":
        self.outcome.result(WAIT_S)
        return self

    def answer(self) -> list[ScoredToken]:
        return list(self.outcome.result(WAIT_S))


def answer_of(one: "Heard | Scored") -> Any:
    """All that its caller learns but its timing, and but for where drafts came from."""
    if isinstance(one, Scored):
        return one.answer()
    choices = range(one.choices)
    reasons = {e.choice: e.summary.finish_reason for e in one.events if isinstance(e, FinishEvent)}
    steps = [event for event in one.events if isinstance(event, StepEvent)]
    tokens = [[t for step in steps if step.choice == c for t in step.tokens] for c in choices]
    drafted = one.mode in ("off", "verified")
    return (
        [one.text(c) for c in choices],
        [[(t.id, t.logprob, None if drafted else t.exit) for t in some] for some in tokens],
        [reasons[c] for c in choices],
    )


def random_request(dice: random.Random, seed: int) -> Asked:
    exits = dice.choice(
        (
            OFF,
            ExitPolicy("verified"),
            *(
                ExitPolicy("approximate", threshold=threshold, skipped_kv=kv)
                for threshold in (0.3, 0.5, 0.8)
                for kv in ("propagate", "backfill")
            ),
        )
    )
    text = bytes(PROMPT) * 4
    length = dice.choice((1, 2, 15, 17, 100))
    start = dice.randrange(len(text) - length)
    prompt = tuple(text[start : start + length])
    if dice.random() < 0.1 and exits.mode != "verified":
        return Asked({"prompt": prompt, "variant": dice.choice(VARIANTS), "exits": exits}, scored=True)
    return Asked(
        {
            "prompt": prompt,
            "variant": dice.choice(VARIANTS),
            "exits": exits,
            "n": dice.choice((1, 1, 1, 3)),
            "temperature": dice.choice((0.0, 0.0, 0.8, 1.3)),
            "top_p": dice.choice((1.0, 0.8)),
            "top_k": dice.choice((0, 5)),
            "repetition_penalty": dice.choice((1.0, 1.2)),
            "min_new_tokens": dice.choice((0, 5)),
            "ignore_eos": dice.random() < 0.5,
            "stop": dice.choice(((), ("e ",), ("\x00", "qz"))),
            "seed": seed,
            "max_new_tokens": dice.choice((1, 3, 20, 60, 120)),
        },
        scored=False,
    )


def soak(model: LoadedModel, run_through: bool, count: int) -> tuple[float, float, float]:
    """Ask `count` requests alone, then all at once, and compare; returns preemptions, drafts and audited tokens."""
    dice = random.Random(20 + run_through)
    requests = [random_request(dice, seed) for seed in range(count)]
    with running(model, max_num_seqs=3) as bench:
        alone = [answer_of(request.send(bench, alone=True).wait()) for request in requests]
    with running(
        model,
        16,
        run_through,
        lambda _: FixedDrafter(dice.choice((0.0, 0.4)), dice.choice((1, 4))),
        audit_share=0.3,
        max_num_seqs=24,
        max_num_batched_tokens=64,
        max_num_queued_reqs=count,
    ) as bench:
        asked = [request.send(bench) for request in requests]
        crowd = [answer_of(one.wait()) for one in asked]
        counts = [bench.value(f"exeunt_{name}_total") for name in ("preemptions", "drafts", "audited_tokens")]
    for request, one, other in zip(requests, crowd, alone, strict=True):
        assert one == other, request
    return counts[0], counts[1], counts[2]


@pytest.mark.parametrize("run_through", [True, False])
def test_every_answer_of_a_crowd_is_the_one_it_gets_alone(tiny_model: LoadedModel, run_through: bool) -> None:
    """Weights in float32; greedy and seeded; pages are short, so that some are preempted and recomputed."""
    preempted, drafts, audits = soak(tiny_model, run_through, REQUESTS)
    assert preempted >= 5
    assert min(drafts, audits) > 100


@pytest.fixture
def two_threads(tiny_model: LoadedModel) -> Iterator[None]:
    """Two threads, which take rows by themselves however little there is to do."""
    before = torch.get_num_threads()
    blocks = [tiny_model.decoder(variant).native_blocks for variant in VARIANTS]
    shapes = [each.shape for each in blocks if each is not None]
    torch.set_num_threads(2)
    for shape in shapes:
        shape.own_rows_work = 0
    yield
    for shape in shapes:
        shape.own_rows_work = OWN_ROWS_WORK
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_threads_that_take_rows_by_themselves_change_no_answer(tiny_model: LoadedModel) -> None:
    soak(tiny_model, True, REQUESTS // 4)
