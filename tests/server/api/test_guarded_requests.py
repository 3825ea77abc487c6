"""What a guarded request is told: the threshold that applied, and what the audits have summed up to."""

from collections.abc import Callable
from typing import Any

import httpx

from exeunt.server.audit import Audit, AuditTotals
from exeunt.server.exit_guard import LAST_STEP, ExitGuard, threshold_at
from exeunt.server.request import ExitPolicy
from tests.server.api.conftest import ScriptedEngine

CERTIFIED = 0.9  # what the default variant's target of 0.05 is certified at


def ask(client: httpx.Client, route: str = "/generate", **early_exit: Any) -> Any:
    exits = {"mode": "approximate", "skipped_kv": "propagate", **early_exit}
    text = {"prompt": "x", "max_new_tokens": 2} if route == "/generate" else {"text": "xyz"}
    answer = client.post(route, json={**text, "compression": {"early_exit": exits}})
    assert answer.status_code == 200, answer.text
    return answer.json()["compression"]["early_exit"]


def act(guard: ExitGuard, steps: int) -> None:
    """Feed disagreement until the guard has raised the target of 0.05 by so many steps."""
    policy = ExitPolicy("approximate", threshold=CERTIFIED, target=0.05, skipped_kv="propagate")
    while (applied := guard.applied(policy)).guard_step < steps:
        guard.observe(applied, agreed=False)


def test_the_answer_says_the_threshold_that_applied(client: httpx.Client, engine: ScriptedEngine) -> None:
    assert ask(client, max_disagreement=0.05)["threshold"] == CERTIFIED
    act(engine.guard, 2)
    raised = threshold_at(CERTIFIED, 2)
    for route in ("/generate", "/score"):
        said = ask(client, route, max_disagreement=0.05)
        assert said == {
            "mode": "approximate",
            "max_disagreement": 0.05,
            "threshold": raised,
            "skipped_kv": "propagate",
        }
        assert (engine.requests[-1].exits.threshold, engine.requests[-1].exits.guard_step) == (raised, 2)
    assert ask(client, max_disagreement=0.1)["threshold"] == 0.8
    assert ask(client, threshold=0.3) == {
        "mode": "approximate",
        "threshold": 0.3,
        "skipped_kv": "propagate",
    }


def test_the_guard_leaves_targets_of_the_nll_increase_alone(
    client: httpx.Client, engine: ScriptedEngine
) -> None:
    """Audits count disagreement, which says nothing of this target: its requests keep the certified threshold."""
    act(engine.guard, LAST_STEP)
    for route in ("/generate", "/score"):
        said = ask(client, route, max_nll_increase=0.05)
        assert said == {
            "mode": "approximate",
            "max_nll_increase": 0.05,
            "threshold": 0.86,
            "skipped_kv": "propagate",
        }
        exits = engine.requests[-1].exits
        assert (exits.threshold, exits.target, exits.nll_target, exits.guard_step) == (0.86, None, 0.05, 0)
        engine.guard.observe(exits, agreed=False)  # and tell it nothing
    assert ask(client, max_disagreement=0.05)["threshold"] is None


def test_where_no_token_may_leave_the_threshold_is_null(client: httpx.Client, engine: ScriptedEngine) -> None:
    act(engine.guard, LAST_STEP)
    said = ask(client, max_disagreement=0.05)
    assert said["threshold"] is None
    assert said["max_disagreement"] == 0.05
    assert engine.requests[-1].exits.threshold is None


def test_info_shows_the_sums_of_audits(
    client: httpx.Client, engine: ScriptedEngine, reopen: Callable[..., Any]
) -> None:
    assert client.get("/info").json()["audits"] == {
        "share": 0.0,
        "audited_tokens": 0,
        "audit_agreements": 0,
        "audit_kl": 0.0,
        "audit_nll_full": 0.0,
        "audit_nll_exit": 0.0,
    }
    engine.audit_totals = (
        AuditTotals().plus(Audit(5, True, 0.25, 1.0, 0.5)).plus(Audit(9, False, 0.5, 2.0, 1.0))
    )
    assert client.get("/info").json()["audits"] == {
        "share": 0.0,
        "audited_tokens": 2,
        "audit_agreements": 1,
        "audit_kl": 0.75,
        "audit_nll_full": 3.0,
        "audit_nll_exit": 1.5,
    }
