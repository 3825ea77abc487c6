"""Hundreds of requests of every kind at once: every answer is the one that the same request gets alone."""

import random
from dataclasses import dataclass
from typing import Any

import pytest

from exeunt.compression.model import LoadedModel
from exeunt.compression.variant import Variant
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


@pytest.mark.parametrize("run_through", [True, False])
def test_every_answer_of_a_crowd_is_the_one_it_gets_alone(tiny_model: LoadedModel, run_through: bool) -> None:
    """Weights in float32; greedy and seeded; pages are short, so that some are preempted and recomputed."""
    dice = random.Random(20 + run_through)
    requests = [random_request(dice, seed) for seed in range(REQUESTS)]
    with running(tiny_model, max_num_seqs=3) as bench:
        alone = [answer_of(request.send(bench, alone=True).wait()) for request in requests]
    with running(
        tiny_model,
        16,
        run_through,
        lambda _: FixedDrafter(dice.choice((0.0, 0.4)), dice.choice((1, 4))),
        audit_share=0.3,
        max_num_seqs=24,
        max_num_batched_tokens=64,
        max_num_queued_reqs=REQUESTS,
    ) as bench:
        asked = [request.send(bench) for request in requests]
        crowd = [answer_of(one.wait()) for one in asked]
        preempted = bench.value("exeunt_preemptions_total")
        drafts = bench.value("exeunt_drafts_total")
        audits = bench.value("exeunt_audited_tokens_total")
    for request, one, other in zip(requests, crowd, alone, strict=True):
        assert one == other, request
    assert preempted >= 5
    assert min(drafts, audits) > 100
