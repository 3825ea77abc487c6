"""Which exits serve which mode."""

import pytest

from exeunt.server.drafting import LOOKUP
from exeunt.server.stages import StagePlan


def test_certified_exits_are_asked_in_the_approximate_mode_and_the_drafting_one_in_the_verified() -> None:
    plan = StagePlan(12, (1, 4, 8), certified=(1, 2), drafting=0)
    asked = {
        mode: [s for s in range(plan.stages) if plan.asks(mode, s)]
        for mode in ("approximate", "verified", "off")
    }
    assert asked == {"approximate": [1, 2], "verified": [0], "off": []}
    other = StagePlan(12, (1, 4, 8), certified=(0,), drafting=2)
    assert [s for s in range(4) if other.asks("approximate", s)] == [0]
    assert [s for s in range(4) if other.asks("verified", s)] == [2]


def test_without_more_said_all_exits_are_certified_and_the_first_drafts() -> None:
    plan = StagePlan(6, (1, 3))
    assert [s for s in range(3) if plan.asks("approximate", s)] == [0, 1]
    assert [s for s in range(3) if plan.asks("verified", s)] == [0]
    assert (plan.stop(LOOKUP), plan.exit_name(LOOKUP)) == (0, "lookup")


def test_a_stage_names_its_depth_and_exit_and_there_are_no_others() -> None:
    plan = StagePlan(12, (2, 6))
    assert [(plan.stop(s), plan.exit_name(s)) for s in range(plan.stages)] == [
        (3, "block_2"),
        (7, "block_6"),
        (12, "final"),
    ]
    assert (plan.stop(LOOKUP), plan.exit_name(LOOKUP)) == (0, "lookup")
    for other in (3, -2):
        with pytest.raises(KeyError):
            plan.stop(other)
