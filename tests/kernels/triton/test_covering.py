"""Few rows of parameters: all pairs stand in them, and hardly more rows than the two longest axes need."""

from itertools import combinations, product

import pytest

from tests.kernels.triton.covering import covering


@pytest.mark.parametrize("sizes", [(7, 4, 4, 3, 3, 2, 4), (6, 4, 3, 4, 3, 2), (2, 2), (3, 1, 2)])
def test_any_two_values_meet(sizes: tuple[int, ...]) -> None:
    axes = [[f"{axis}.{value}" for value in range(size)] for axis, size in enumerate(sizes)]
    rows = covering(*axes)
    met = {pair for row in rows for pair in combinations(row, 2)}
    assert met == {pair for one, other in combinations(axes, 2) for pair in product(one, other)}
    longest, second = sorted(sizes)[-1], sorted(sizes)[-2]
    assert longest * second <= len(rows) <= 1.3 * longest * second
    assert rows == covering(*axes)
