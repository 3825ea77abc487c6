"""What a machine must have for which part of the run: `python -m scripts.gpu_check.needs` says what a bare one lacks.

What is asked imports none of it, and nothing of `exeunt`: before the run's clock starts nothing waits for PyTorch.
"""

import ctypes
import re
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
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


def cuda_of_torch() -> bool:
    """Whether the PyTorch that is installed was built for CUDA; where it does not say so, it is not doubted."""
    spec = find_spec("torch")
    for folder in (spec and spec.submodule_search_locations) or ():
        try:
            said = Path(folder, "version.py").read_text(encoding="utf-8")
        except OSError:
            continue
        built = re.search(r"^cuda\b.*=\s*(\S+)", said, re.MULTILINE)
        return built is None or built[1] != "None"
    return True


def cuda_devices(driver: str = "libcuda.so.1") -> int:
    """How many devices the NVIDIA driver shows this process; 0 without one."""
    count = ctypes.c_int(0)
    try:
        cuda = ctypes.CDLL(driver)
        if cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)):
            return 0
    except (OSError, AttributeError):  # there is no driver, or what is called so is none
        return 0
    return count.value


def main() -> int:
    """Say what is lacking; the exit status, 0 where nothing is and there is a GPU that PyTorch was built for."""
    lacking = [*missing(BARE), *too_old()]
    if not lacking and not (cuda_of_torch() and cuda_devices()):
        lacking = ["a CUDA device that torch can use"]
    if lacking:
        print(f"{sys.executable} lacks {', '.join(lacking)}")
    return int(bool(lacking))


if __name__ == "__main__":
    sys.exit(main())
