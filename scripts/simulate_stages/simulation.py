"""One scenario: so many sequences decode at once, exits are drawn at random, and time passes as the costs say."""

from dataclasses import dataclass, field
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

from scripts.simulate_stages.cost import StageCosts
from scripts.simulate_stages.policy import Rows, Rule, StagePolicy, StageQueue

Mode = Literal["propagate", "backfill", "verified"]
Policy = Literal["wait for all", "run through", "fullest", "least waste"]
POLICIES: Final[tuple[Policy, ...]] = ("wait for all", "run through", "fullest", "least waste")
SHALLOW, DEEP = 0, 1

SCREENED: Final = 0.25  # of the rows that stay, so many passed the screen and were projected in vain
MAX_OWED: Final = 8  # tokens whose deeper keys and values may be owed under backfill
WARM_UP: Final = 0.2  # share of the tokens that is not counted


@dataclass(frozen=True, slots=True)
class Scenario:
    """What is simulated.

    `exit_rate` is the share of asked tokens that the gate lets leave: as the answer's tokens (propagate, backfill) or
    as drafts (verified), of which each is right with probability `acceptance` while those before it are. `max_owed` is
    how many tokens a sequence may owe to the deep stage: the draft length in verified mode.
    """

    costs: StageCosts
    sequences: int
    mode: Mode
    policy: Policy
    exit_rate: float
    acceptance: float = 1.0
    max_owed: int = MAX_OWED
    max_wait: float = 2.0  # in passes of all sequences through both stages, everything owed taken along
    tokens: int = 4000  # at least; and at least 60 for each sequence
    seed: int = 0

    def __post_init__(self) -> None:
        for name, share in (("exit rate", self.exit_rate), ("acceptance", self.acceptance)):
            if not 0.0 <= share <= 1.0:
                raise ValueError(f"{name} {share} must be between 0 and 1")
        if self.sequences > self.costs.most_sequences:
            raise ValueError(
                f"{self.sequences} sequences of {self.costs.context} tokens do not fit: "
                f"memory holds {self.costs.most_sequences}"
            )

    @property
    def max_wait_s(self) -> float:
        tokens = self.sequences * (1 if self.mode == "propagate" else 1 + self.max_owed)
        both = self.predict(SHALLOW, self.sequences, self.sequences)
        return self.max_wait * (both + self.predict(DEEP, self.sequences, tokens))

    def predict(self, stage: int, rows: float, tokens: float) -> float:
        """Expected seconds of a run of a stage."""
        if stage == DEEP:
            return self.costs.deep(rows, tokens, tokens if self.mode == "verified" else rows)
        leave = self.exit_rate * rows
        seconds = self.costs.shallow(rows, rows, leave + SCREENED * (rows - leave))
        return seconds + self.costs.propagate(leave) if self.mode == "propagate" else seconds


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of it. Times in seconds; a token that is sent together with another has a gap of 0 to it."""

    tokens_per_s: float
    ratio: float  # to exits off
    gap_p50_s: float
    gap_p99_s: float
    off_gap_s: float  # between tokens with exits off
    deep_rows: float  # mean rows of a deep run
    longest_wait_s: float  # of any row at any stage; 0 where no row ever waits


def simulate(scenario: Scenario) -> Outcome:
    """Run a scenario in steady state: every sequence that is answered goes on at once."""
    return _Run(scenario).outcome()


@dataclass(slots=True)
class _Run:
    scenario: Scenario
    now: float = 0.0
    sent: int = 0
    deep_runs: int = 0
    deep_rows: int = 0
    longest_wait: float = 0.0
    rng: np.random.Generator = field(init=False)
    owed: npt.NDArray[np.int64] = field(init=False)  # tokens that wait in front of the deep stage
    last_sent: npt.NDArray[np.float64] = field(init=False)
    gaps: list[npt.NDArray[np.float64]] = field(default_factory=list)

    def __post_init__(self) -> None:
        scenario = self.scenario
        self.rng = np.random.default_rng(scenario.seed)
        most = 1 if scenario.mode == "propagate" else scenario.max_owed + 1
        # Requests come at different times: they do not start in step.
        self.owed = self.rng.integers(0, most, scenario.sequences)
        self.last_sent = np.zeros(scenario.sequences)

    def outcome(self) -> Outcome:
        scenario = self.scenario
        wanted = max(scenario.tokens, 60 * scenario.sequences)
        steps = self._queue_steps if scenario.policy in ("fullest", "least waste") else self._batch_steps
        steps(int(WARM_UP * wanted))
        start, before = self.now, self.sent
        self.gaps.clear()
        self.longest_wait, self.deep_runs, self.deep_rows = 0.0, 0, 0
        steps(wanted)
        tokens_per_s = (self.sent - before) / (self.now - start)
        off_gap = scenario.costs.full(scenario.sequences)
        p50, p99 = np.quantile(np.concatenate(self.gaps), (0.5, 0.99))
        return Outcome(
            tokens_per_s=tokens_per_s,
            ratio=tokens_per_s * off_gap / scenario.sequences,
            gap_p50_s=float(p50),
            gap_p99_s=float(p99),
            off_gap_s=off_gap,
            deep_rows=self.deep_rows / max(self.deep_runs, 1),
            longest_wait_s=self.longest_wait,
        )

    def _batch_steps(self, until: int) -> None:
        """All sequences start every step together; who stays goes deeper at once, and all wait for the end."""
        together = self.scenario.policy == "wait for all"
        everyone = np.arange(self.scenario.sequences)
        while self.sent < until:
            leaves = self._run_shallow(everyone)
            if together and not leaves.all():
                leaves[:] = False
            staying = everyone[~leaves]
            counts = self._run_deep(staying)
            self._leave(everyone[leaves])
            self._send(staying, counts)

    def _queue_steps(self, until: int) -> None:
        """At each step one stage runs with all that has gathered there; who stays waits at the next."""
        scenario = self.scenario
        rule: Rule = "fullest" if scenario.policy == "fullest" else "least waste"
        policy = StagePolicy(rule, scenario.predict, scenario.sequences, scenario.max_wait_s)
        queues = [StageQueue(), StageQueue()]
        queues[SHALLOW].put(np.arange(scenario.sequences), scenario.sequences, self.now)
        while self.sent < until:
            stage = policy.choose(queues, self.now)
            self.longest_wait = max(self.longest_wait, self.now - queues[stage].since)
            rows = queues[stage].take()
            if stage == SHALLOW:
                leaves = self._run_shallow(rows)
                gone, staying = rows[leaves], rows[~leaves]
                self._leave(gone)
                queues[SHALLOW].put(gone, len(gone), self.now)
                queues[DEEP].put(staying, len(staying) + int(self.owed[staying].sum()), self.now)
            else:
                self._send(rows, self._run_deep(rows))
                queues[SHALLOW].put(rows, len(rows), self.now)

    def _run_shallow(self, rows: Rows) -> npt.NDArray[np.bool_]:
        """Which of the rows may leave. A row that owes too much is not asked."""
        scenario = self.scenario
        asked = (
            self.owed[rows] < scenario.max_owed if scenario.mode != "propagate" else np.full(len(rows), True)
        )
        leaves: npt.NDArray[np.bool_] = asked & (self.rng.random(len(rows)) < scenario.exit_rate)
        in_vain = asked & ~leaves & (self.rng.random(len(rows)) < SCREENED)
        left = int(leaves.sum())
        projected = left + int(in_vain.sum())
        self.now += scenario.costs.shallow(len(rows), int(asked.sum()), projected)
        return leaves

    def _leave(self, rows: Rows) -> None:
        scenario = self.scenario
        if not len(rows):
            return
        if scenario.mode == "propagate":
            self.now += scenario.costs.propagate(len(rows))
        else:
            self.owed[rows] += 1
        if scenario.mode != "verified":  # a draft is sent when it is confirmed
            self._send(rows, np.ones(len(rows), dtype=np.int64))

    def _run_deep(self, rows: Rows) -> npt.NDArray[np.int64]:
        """Take along what the rows owe; the number of tokens of the answer that each row now has."""
        scenario = self.scenario
        owed = self.owed[rows]
        counts = np.ones(len(rows), dtype=np.int64)
        if len(rows):
            tokens = len(rows) + int(owed.sum())
            self.now += scenario.predict(DEEP, len(rows), tokens)
            self.owed[rows] = 0
            self.deep_runs += 1
            self.deep_rows += len(rows)
        if (
            scenario.mode == "verified"
        ):  # drafts are right up to the first that is not; then the model's own token
            wrong = self.rng.random((len(rows), scenario.max_owed)) >= scenario.acceptance
            right = np.where(wrong.any(axis=1), wrong.argmax(axis=1), scenario.max_owed)
            counts += np.minimum(right, owed)
        return counts

    def _send(self, rows: Rows, counts: npt.NDArray[np.int64]) -> None:
        total = int(counts.sum())
        gaps = np.zeros(total)
        gaps[: len(rows)] = self.now - self.last_sent[rows]
        self.gaps.append(gaps)
        self.last_sent[rows] = self.now
        self.sent += total
