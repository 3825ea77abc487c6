"""Triton kernels on a GPU where there is one, else under Triton's interpreter, which runs them on the CPU."""

import importlib.util
from pathlib import Path

import pytest
import torch

import exeunt.kernels.native.library
from tests.kernels.triton.on_gpu import patch_language_once, poison


class NeedsTriton(pytest.Module):
    """A file of tests that cannot even be read without Triton."""

    def collect(self) -> list[pytest.Item]:
        """Skip all of them."""
        pytest.skip("needs the package triton", allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """Leave out the files that import kernels where Triton is not installed."""
    if importlib.util.find_spec("triton") is not None or module_path.name == "test_sources.py":
        return None
    module: pytest.Module = NeedsTriton.from_parent(parent, path=module_path)
    return module


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> str:
    """Where the kernels of these tests run."""
    if not torch.cuda.is_available():
        patch_language_once(monkeypatch)
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is allocated and not written shows."""
    poison(monkeypatch)


@pytest.fixture(autouse=True)
def plain_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """What they are compared with is plain PyTorch: no native kernels, which a new machine first compiles."""
    monkeypatch.setattr(exeunt.kernels.native.library, "_loaded", [None])
