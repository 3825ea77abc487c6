"""What a machine must have for which part of the run: `python -m scripts.gpu_check.needs` says what a bare one lacks.

What is asked imports none of it, and nothing of `exeunt`.
"""

import re
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Final

LEAST: Final = {"torch": (2, 11), "triton": (3, 6), "transformers": (5, 12)}
"""Versions that the kernels and models are written for, those of pyproject.toml."""
BARE: Final = (*LEAST, "safetensors", "numpy")
"""Modules without which nothing runs; the last two come with transformers."""
TESTS: Final = ("pytest",)
METRICS: Final = ("prometheus_client",)
"""Without it engines count nothing: their speeds then lack what a server's metrics cost it."""
BUNDLE: Final = ("pydantic",)
"""Without it no bundle is opened, and the packaged model runs without exits."""


def missing(names: Sequence[str]) -> list[str]:
    """Those of the modules that are not installed."""
    return [name for name in names if not _is_there(name)]


def too_old() -> list[str]:
    """Packages that are there in a version older than `LEAST`, each with both versions."""
    found = []
    for name, least in LEAST.items():
        try:
            said = version(name)
        except PackageNotFoundError:
            continue  # a module that no package stands for says nothing of its age
        numbers = re.match(r"(\d+)\.(\d+)", said)
        if numbers is not None and (int(numbers[1]), int(numbers[2])) < least:
            found.append(f"{name} {said} (needs {least[0]}.{least[1]})")
    return found


def _is_there(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except (ImportError, ValueError):  # ValueError: of a module that is loaded and says nothing of where from
        return name in sys.modules


def main() -> int:
    """Say what is lacking; the exit status, 0 where nothing is and PyTorch has a GPU."""
    lacking = [*missing(BARE), *too_old()]
    if not lacking:
        import torch

        lacking = [] if torch.cuda.is_available() else ["a CUDA device that torch can use"]
    if lacking:
        print(f"{sys.executable} lacks {', '.join(lacking)}")
    return int(bool(lacking))


if __name__ == "__main__":
    sys.exit(main())
