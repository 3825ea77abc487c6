"""The source files of the code that calibrates: what a bundle is made by, beside what it is made from. No torch."""

from importlib import import_module
from pathlib import Path
from typing import Final

LAYERS: Final = ("exeunt.kernels", "exeunt.compression", "exeunt.calibration")
"""The code that calibrates."""
ENDINGS: Final = (".py", ".cpp", ".h", ".html", ".css")


def source_files() -> list[Path]:
    """Every file of those layers that decides what a bundle holds, in a fixed order."""
    found: list[Path] = []
    for layer in LAYERS:
        for place in import_module(layer).__path__:
            found += sorted(path for path in Path(place).rglob("*") if path.suffix in ENDINGS)
    return found
