"""The options of a calibration as the report shows them."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from exeunt.calibration.options import CalibrationOptions


def options_record(options: CalibrationOptions) -> dict[str, Any]:
    """What was asked for, but for where things lie on the machine."""
    named = {"model", "out", "data", "origin", "work"}  # the manifest names them, without their folders
    return {
        field.name: _plain(getattr(options, field.name))
        for field in fields(options)
        if field.name not in named
    }


def _plain(value: object) -> Any:
    """A value of the options as JSON."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, tuple | list):
        return [_plain(each) for each in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def option_lines(options: CalibrationOptions) -> Iterator[tuple[str, str]]:
    """Every option's name and value as text, those of a group after its name: `head.visits`."""
    return _lines(options_record(options), "")


def _lines(record: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    for name, value in record.items():
        if isinstance(value, dict):
            yield from _lines(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value if isinstance(value, str) else json.dumps(value)
