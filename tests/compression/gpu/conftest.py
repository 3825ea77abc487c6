"""A GPU's way through the decoder, on a GPU where there is one, else under Triton's interpreter on the CPU."""

import pytest
import torch

import exeunt.kernels.gpu
import exeunt.kernels.native.library
from tests.kernels.triton.on_gpu import patch_language_once


@pytest.fixture(autouse=True)
def plain_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are compared with plain PyTorch: native INT4 products round activations, and a new machine compiles them."""
    monkeypatch.setattr(exeunt.kernels.native.library, "_loaded", [None])


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Where the Triton kernels run, which they do for its tensors while a test lasts."""
    if not torch.cuda.is_available():
        pytest.importorskip("triton", reason="needs the package triton")
        patch_language_once(monkeypatch)
        monkeypatch.setattr(exeunt.kernels.gpu, "interpreted", True)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
