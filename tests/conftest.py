"""Fixtures that several test folders share: real checkpoints and texts where they are at hand."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# For ``scripts``, which is no part of the installed package. Last, so that it hides nothing.
sys.path.append(str(Path(__file__).resolve().parents[1]))
# Two, unless other workers of the run need the cores: threads of a small model then wait longer than they work.
torch.set_num_threads(
    max(1, min(2, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))
)
if not torch.cuda.is_available():  # before anything imports Triton, whose own functions look at it then
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread: small models lose time to a second one, and a loaded machine makes them lose much more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _shared() -> Path:
    beside = Path(__file__).resolve().parents[2] / "shared"
    return Path(os.environ.get("SHARED_FOLDER", beside))


@pytest.fixture(scope="session")
def shared_models() -> Path:
    """The folder of small real checkpoints, where there is one."""
    folder = _shared() / "models"
    if not folder.is_dir():
        pytest.skip("needs the folder of small real checkpoints (set SHARED_FOLDER to its parent)")
    return folder


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real texts, where there is one."""
    folder = _shared() / "data"
    if not folder.is_dir():
        pytest.skip("needs the folder of real texts (set SHARED_FOLDER to its parent)")
    return folder
