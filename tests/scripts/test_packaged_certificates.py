"""The card's section on certificates: one row a target, and a verdict that follows the numbers."""

from typing import Any

from scripts.packaged_model.certificates import certificate_section


def evaluation(differ: dict[float, float]) -> dict[str, Any]:
    def mode(target: float | None, value: float, weights: str = "int4") -> dict[str, Any]:
        variant = {"weights": weights, "kv_cache": "int4", "linear_block": False}
        return {
            "mode": {"variant": variant, "target": target, "threshold": 0.9},
            "disagreement": {"value": value, "low": value / 2, "high": value * 2},
            "exit_rate": {"value": 0.25},
        }

    modes = [mode(target, value) for target, value in differ.items()]
    made = {"model": {"exits": ["block_2", "block_6"]}, "machine": {"cpu": "A CPU"}}
    return {"tokens": 12_000, "modes": [*modes, mode(None, 0.0), mode(0.01, 0.9, "full")], **made}


def test_each_target_has_a_row_and_kept_targets_are_said_to_be_kept() -> None:
    both = {"stories": evaluation({0.01: 0.006, 0.1: 0.07}), "novels": evaluation({0.01: 0.004, 0.1: 0.06})}
    section = certificate_section(both)
    assert "| 1% | 0.6% (0.3% to 1.2%), 25% leave | 0.4% (0.2% to 0.8%), 25% leave |" in section
    assert "| 10% | 7.0%" in section
    assert "Every target that is certified is kept on both." in section
    said = " ".join(section.split())
    assert "made on a machine that calls its processor A CPU; its tokens leave at `block_6`" in said
    assert "at the thresholds 0.9 for 1%, 0.9 for 10%. A bundle made elsewhere" in said


def test_a_broken_target_is_named() -> None:
    section = certificate_section({"stories": evaluation({0.01: 0.02, 0.1: 0.07})})
    assert "NOT kept: 1% on stories." in section


def test_without_evaluations_there_is_no_section() -> None:
    assert certificate_section({}) == ""
