"""What one decision of the stage queues costs: choose, take all rows that wait there, put them where they go next."""

import time
from typing import Final

import numpy as np

from scripts.simulate_stages.policy import Rule, StagePolicy, StageQueue
from scripts.simulate_stages.simulation import DEEP, SHALLOW, Scenario
from scripts.simulate_stages.sweep import costs_of

ROWS: Final = (256, 10_000)
_DECISIONS: Final = 2000
_CONTEXT: Final = 256  # so short that 10,000 sequences fit


def decision_costs(rule: Rule, decisions: int = _DECISIONS) -> dict[str, dict[str, float]]:
    """Median and 90th percentile of a decision in microseconds, by the number of rows that wait in both queues."""
    return {str(rows): _decision_cost(rule, rows, decisions) for rows in ROWS}


def _decision_cost(rule: Rule, rows: int, decisions: int) -> dict[str, float]:
    scenario = Scenario(costs_of("int4", _CONTEXT), rows, "backfill", rule, exit_rate=0.5)
    policy = StagePolicy(rule, scenario.predict, rows, scenario.max_wait_s)
    queues = [StageQueue(), StageQueue()]
    queues[SHALLOW].put(np.arange(rows), rows, 0.0)
    rng = np.random.default_rng(0)
    now, taken_s = 0.0, np.zeros(decisions)
    for index in range(decisions):
        leaves = rng.random(rows) < scenario.exit_rate  # what the device would say
        start = time.perf_counter()
        stage = policy.choose(queues, now)
        taken = queues[stage].take()
        if stage == SHALLOW:
            gone = leaves[: len(taken)]
            stay = taken[~gone]
            queues[SHALLOW].put(taken[gone], len(taken) - len(stay), now)
            queues[DEEP].put(stay, len(stay), now)
        else:
            queues[SHALLOW].put(taken, len(taken), now)
        taken_s[index] = time.perf_counter() - start
        now += scenario.predict(stage, len(taken), len(taken))
    p50, p90 = np.quantile(taken_s, (0.5, 0.9)) * 1e6
    return {"p50_us": round(float(p50), 1), "p90_us": round(float(p90), 1)}
