"""Audits: a share of the tokens that left early in the approximate mode, compared with the full model. No torch.

A certificate speaks of text like the calibration text; audits say what holds for the text that is served.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final, Protocol

from exeunt.server.request import ExitPolicy

DEFAULT_SHARE: Final = 0.01
"""Of the early tokens. It costs one block in a hundred of what they save, and a disagreement of twice a target of 2 %
mostly shows within 100,000 of them."""

_TWO_TO_64: Final = 2.0**64


@dataclass(frozen=True, slots=True)
class Audit:
    """An early token compared with the full model's logits in its place; raw logits, nats."""

    position: int  # of the pass that the token followed from
    agreed: bool  # the exit's most likely token is the full model's
    kl: float  # KL(full || exit)
    nll_full: float  # -logprob of the emitted token under the full model
    nll_exit: float  # and under the exit


@dataclass(frozen=True, slots=True)
class AuditTotals:
    """Sums over all audits, as the metrics count them."""

    audited_tokens: int = 0
    audit_agreements: int = 0
    audit_kl: float = 0.0
    audit_nll_full: float = 0.0
    audit_nll_exit: float = 0.0

    def plus(self, audit: Audit) -> "AuditTotals":
        """The sums with one more audit."""
        return AuditTotals(
            self.audited_tokens + 1,
            self.audit_agreements + int(audit.agreed),
            self.audit_kl + audit.kl,
            self.audit_nll_full + audit.nll_full,
            self.audit_nll_exit + audit.nll_exit,
        )


class AuditMetrics(Protocol):
    """Where the same audits are counted for scrapes."""

    def audit(self, agreed: bool, kl: float, nll_full: float, nll_exit: float) -> None:
        """Count one audit; in nats, none negative."""
        ...


class AuditBook:
    """Counts audits. Only the engine's thread notes them; `totals` may be read from any.

    `on_audit` is told of each: under which policy the token left, and whether it agreed.
    """

    def __init__(
        self, metrics: AuditMetrics, on_audit: Callable[[ExitPolicy, bool], None] | None = None
    ) -> None:
        self._metrics = metrics
        self._on_audit = on_audit
        self.totals = AuditTotals()

    def note(self, exits: ExitPolicy, audit: Audit) -> None:
        """Count one audit of a token of a request with this policy."""
        audit = _not_negative(audit)
        self.totals = self.totals.plus(audit)
        self._metrics.audit(audit.agreed, audit.kl, audit.nll_full, audit.nll_exit)
        if self._on_audit is not None:
            self._on_audit(exits, audit.agreed)


def _not_negative(audit: Audit) -> Audit:
    """The audit without what rounding does: it can make sums of nothing a hair negative, and counters only grow."""
    kl, nll_full, nll_exit = (max(0.0, value) for value in (audit.kl, audit.nll_full, audit.nll_exit))
    return replace(audit, kl=kl, nll_full=nll_full, nll_exit=nll_exit)


def is_audited(name: str, position: int, share: float) -> bool:
    """Whether the token behind `position` of the answer `name` ("request id/choice") is compared, if it leaves early.

    A hash decides: the same tokens in every run, whatever they are batched with, and whatever they are.
    """
    if share <= 0.0:
        return False
    if share >= 1.0:
        return True
    digest = hashlib.blake2b(f"{name}/{position}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) < share * _TWO_TO_64
