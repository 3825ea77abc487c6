"""Streamed safetensors files: what `safetensors` itself reads from them, and what is refused."""

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from exeunt.compression.tensor_file import TensorFileError, read_tensors, write_tensors


def _tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "bytes": torch.arange(7, dtype=torch.uint8),
        "half": torch.randn(3, 5).half(),
        "brain": torch.randn(2, 3).bfloat16(),
        "scalar": torch.tensor(1.5, dtype=torch.float64),
        "empty": torch.zeros(0, 4),
        "transposed": torch.randn(4, 6).t(),
        "flags": torch.tensor([True, False]),
        "ids": torch.arange(5),
    }


def test_safetensors_reads_what_is_written(tmp_path: Path) -> None:
    tensors, path = _tensors(), tmp_path / "x.safetensors"
    written = write_tensors(path, tensors, {"note": "α"})
    for again in (load_file(path), read_tensors(path)[0]):
        assert set(again) == set(tensors)
        for name, tensor in tensors.items():
            assert again[name].dtype == tensor.dtype
            assert torch.equal(again[name], tensor), name
    assert read_tensors(path)[1]["note"] == "α"
    content = path.read_bytes()
    assert (written.sha256, written.bytes) == (hashlib.sha256(content).hexdigest(), len(content))


def test_every_tensor_starts_at_a_multiple_of_its_own_size(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, _tensors())
    for name, tensor in read_tensors(path)[0].items():
        assert tensor.numel() == 0 or tensor.data_ptr() % tensor.element_size() == 0, name


def test_an_existing_file_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_text("mine")
    with pytest.raises(FileExistsError):
        write_tensors(path, _tensors())
    assert path.read_text() == "mine"


def test_what_is_no_safetensors_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"nonsense" * 4)
    for missing in (path, tmp_path / "none"):
        with pytest.raises(TensorFileError, match="not a readable safetensors file"):
            read_tensors(missing)
