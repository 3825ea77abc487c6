"""Few rows of parameters in which any two of them meet in every way."""

from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from typing import Any


def covering(*axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Rows of one value of each axis, in which any two values of two axes stand together at least once.

    They are always the same, and about as many as the two longest axes have pairs.
    """
    sizes = [len(axis) for axis in axes]
    missing = {
        (i, a, j, b)
        for i, j in combinations(range(len(axes)), 2)
        for a in range(sizes[i])
        for b in range(sizes[j])
    }
    used: Counter[tuple[int, int]] = Counter()
    rows = []
    while missing:
        i, a, j, b = min(missing)
        row = {i: a, j: b}
        for axis in sorted(set(range(len(axes))) - {i, j}, key=lambda axis: (-sizes[axis], axis)):
            row[axis] = max(
                range(sizes[axis]),
                key=lambda value: (_new(row, axis, value, missing), -used[axis, value], -value),
            )
        missing -= {(*one, *other) for one, other in combinations(sorted(row.items()), 2)}
        used.update(row.items())
        rows.append(tuple(axes[axis][row[axis]] for axis in range(len(axes))))
    return rows


def _new(row: dict[int, int], axis: int, value: int, missing: set[tuple[int, int, int, int]]) -> int:
    """How many of the missing pairs a row gains by a value of one more axis."""
    pairs = (sorted(((other, held), (axis, value))) for other, held in row.items())
    return sum((*one, *two) in missing for one, two in pairs)
