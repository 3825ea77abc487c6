"""The exit guard: raises thresholds whose live disagreement is above the target they were certified for. No torch.

A certificate speaks of text like the calibration text; what is served may be other text. Audits say how often tokens
that left really disagree, and where that is, by an anytime-valid bound, more than the target that the requests asked
for, later requests get a threshold that is one step stricter.
"""

import logging
import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from exeunt.server.rate_evidence import CONFIDENCE, RateEvidence
from exeunt.server.request import ExitPolicy

log = logging.getLogger("exeunt.guard")

STEP: Final = 0.5
"""On the log-odds scale: a token that just passes has odds of disagreeing exp(-0.5) = 0.61 times those before."""
LAST_STEP: Final = 10
"""At it no token of such a request leaves; the step before has 90 times the calibrated odds."""
WINDOW: Final = 10_000
"""Audited tokens after which evidence is gathered afresh: what traffic was like long ago must not outweigh today."""
FIRST_REST: Final = 1000
"""Requests without one audit, after which no token can be said to leave: at an early token for each and one audit in a
hundred, ten would have come."""
MOST_REST: Final = 64_000
_LOOSEST_ODDS: Final = (
    0.01  # steps from a calibrated threshold below this begin here: log-odds of 0 are no place to start
)


def threshold_at(calibrated: float, step: int) -> float | None:
    """The threshold `step` steps above a calibrated one, never looser; None: no token leaves."""
    if step <= 0:
        return calibrated
    if step >= LAST_STEP:
        return None
    if calibrated >= 1.0:
        return calibrated
    odds = max(calibrated, _LOOSEST_ODDS) / (1.0 - max(calibrated, _LOOSEST_ODDS))
    raised = odds * math.exp(STEP * step)
    return max(calibrated, raised / (1.0 + raised))


@dataclass(slots=True)
class _Watch:
    """One target: its step, what the audits at this step say, and how long it rests where there are none."""

    step: int = 0
    evidence: RateEvidence = field(default_factory=RateEvidence)
    quiet: int = 0  # requests since the last audit at this step
    rest: int = FIRST_REST  # of them that end in a trial of the step before
    on_trial: bool = False


class ExitGuard:
    """Watches every certified target that requests ask for. May be called from any thread.

    All combinations of weights, KV cache, linear block and skipped keys and values share a target's step, each from
    its own calibrated threshold. At a step the evidence is of tokens of requests that were admitted at it, and decides:

    - raise, when the lower bound of their disagreement is above the target;
    - relax, when the upper bound is so far below that the odds of one step, exp(0.5), leave room for it: else the step
      would be taken back and forth;
    - begin afresh, after `WINDOW` tokens.

    Where no token leaves none can be audited. After `FIRST_REST` requests without an audit the step before is tried,
    and after twice as many when that has failed.

    `on_change` is told the thresholds of the combination that `calibrated` is of, whenever one changes: infinity where
    no token leaves.
    """

    def __init__(
        self,
        calibrated: Mapping[float, float | None],
        on_change: Callable[[Mapping[float, float | None]], None],
    ) -> None:
        self._calibrated = dict(calibrated)
        self._on_change = on_change
        self._watches: dict[float, _Watch] = {}
        self._lock = threading.Lock()

    def applied(self, exits: ExitPolicy) -> ExitPolicy:
        """The policy that a request is admitted with. A bare threshold, or another mode, is left as it is."""
        if exits.mode != "approximate" or exits.target is None or exits.threshold is None:
            return exits
        with self._lock:
            watch = self._watch(exits.target)
            watch.quiet += 1
            if watch.step and watch.quiet > watch.rest:
                self._move(exits.target, watch, watch.step - 1, f"on trial after {watch.rest} requests")
                watch.on_trial = True
            step = watch.step
        return replace(exits, threshold=threshold_at(exits.threshold, step), guard_step=step)

    def observe(self, exits: ExitPolicy, agreed: bool) -> None:
        """A token that left under this policy was audited."""
        target = exits.target
        if target is None:
            return
        with self._lock:
            watch = self._watch(target)
            if exits.guard_step != watch.step:
                return  # admitted before the last change: another threshold
            watch.quiet = 0
            evidence = watch.evidence
            evidence.add(hit=not agreed)
            # a bound moves up with a disagreement only, and down without one
            if not agreed and watch.step < LAST_STEP and evidence.exceeds(target):
                self._raise(target, watch)
            elif agreed and watch.step and evidence.stays_below(target * math.exp(-STEP)):
                self._relax(target, watch)
            elif evidence.tokens >= WINDOW:
                watch.evidence = RateEvidence()

    def _watch(self, target: float) -> _Watch:
        return self._watches.setdefault(target, _Watch())

    def _raise(self, target: float, watch: _Watch) -> None:
        if watch.on_trial:
            watch.rest = min(2 * watch.rest, MOST_REST)
        self._move(target, watch, watch.step + 1, f"disagreement of at least {watch.evidence.lower():.4f}")

    def _relax(self, target: float, watch: _Watch) -> None:
        watch.rest = FIRST_REST
        self._move(target, watch, watch.step - 1, f"disagreement of at most {watch.evidence.upper():.4f}")

    def _move(self, target: float, watch: _Watch, step: int, why: str) -> None:
        evidence = watch.evidence
        log.log(
            logging.WARNING if step > watch.step else logging.INFO,
            "max_disagreement %g: exit guard at step %d of %d, was %d: %s (%d of %d audited tokens, confidence %g)",
            target,
            step,
            LAST_STEP,
            watch.step,
            why,
            evidence.hits,
            evidence.tokens,
            CONFIDENCE,
        )
        watch.step, watch.evidence, watch.quiet, watch.on_trial = step, RateEvidence(), 0, False
        calibrated = self._calibrated.get(target)
        if calibrated is not None:
            threshold = threshold_at(calibrated, step)
            self._on_change({target: math.inf if threshold is None else threshold})
