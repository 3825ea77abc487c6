"""The comparison of bounds: its draws have the truth that they say, and its commands print what the pages quote."""

import numpy as np
import pytest
from typer.testing import CliRunner

from scripts.compare_bounds.__main__ import app
from scripts.compare_bounds.bounds import BOUNDS
from scripts.compare_bounds.draws import BLOCK, Text


def test_texts_have_the_increase_that_they_say() -> None:
    text = Text(40, 0.2, 0.05)
    draws = text.draw(np.random.default_rng(0), 200, 100)
    assert draws.sums.shape == draws.squares.shape == draws.exits.shape == (200, 100)
    spread = draws.sums.std() / BLOCK / 20_000**0.5
    assert draws.sums.mean() / BLOCK == pytest.approx(text.increase, abs=4 * spread)
    assert draws.exits.mean() == pytest.approx(40, rel=0.05)


def test_costs_of_one_block_go_together() -> None:
    """At a higher correlation the same mean comes with a larger spread over blocks."""
    loose, close = (Text(60, 0.2, rho).draw(np.random.default_rng(1), 100, 100).sums for rho in (0.001, 0.2))
    assert close.mean() == pytest.approx(loose.mean(), rel=0.05)
    assert close.std() > 1.2 * loose.std()


def test_every_bound_certifies_what_costs_nothing_worth_mentioning() -> None:
    draws = Text(60, 0.02, 0.01).draw(np.random.default_rng(2), 20, 200)
    for name, certifies in BOUNDS.items():
        verdict = certifies(
            draws, 0.02 if name == "Johnson" else 2.9
        )  # his is not monotone: far off it turns back
        assert verdict.dtype == bool
        assert verdict.all(), name
        assert not certifies(draws, 0.0).any(), name


def test_the_tables_have_a_line_for_every_bound() -> None:
    result = CliRunner().invoke(app, ["simulate", "--texts", "4"])
    assert result.exit_code == 0
    for name in BOUNDS:
        assert result.stdout.count(f"| {name} |") == 2
