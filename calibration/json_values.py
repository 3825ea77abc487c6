"""Findings as JSON values: JSON has no number for what is not known."""

import math
from typing import Any


def json_values(record: Any) -> Any:
    """`record`, of dicts, lists, tuples and plain values, with None for numbers that are not finite."""
    if isinstance(record, dict):
        return {key: json_values(value) for key, value in record.items()}
    if isinstance(record, list | tuple):
        return [json_values(value) for value in record]
    return None if isinstance(record, float) and not math.isfinite(record) else record
