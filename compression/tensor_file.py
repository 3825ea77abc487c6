"""Safetensors files, written as a stream: one tensor in memory at a time, hashed on the way to the disk.

`safetensors.torch.save_file` copies every tensor into memory before it writes the first byte, and its file must be
read again to be hashed. A bundle's weights may be as large as the machine's memory, so neither will do here.
Reading is left to `safetensors`.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

_CHUNK: Final = 16 << 20  # bytes written and hashed at once
_ALIGNMENT: Final = 8  # of the data in the file, as safetensors does
_DTYPE_NAMES: Final = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class TensorFileError(ValueError):
    """A file that does not hold the tensors it should."""


@dataclass(frozen=True, slots=True)
class WrittenFile:
    """What is known of a file that was written: its SHA-256 (hexadecimal) and size in bytes."""

    sha256: str
    bytes: int


class HashingWriter:
    """Writes to an open binary file and hashes what it writes."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._hash = hashlib.sha256()
        self._bytes = 0

    def write(self, data: bytes | memoryview) -> None:
        """Write all of `data`; raises OSError, on a full disk for one."""
        self._file.write(data)
        self._hash.update(data)
        self._bytes += len(data)

    def finish(self) -> WrittenFile:
        """Force the file onto the disk and say what it is."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return WrittenFile(self._hash.hexdigest(), self._bytes)


@dataclass(frozen=True, slots=True)
class _Shape:
    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int

    @classmethod
    def of(cls, tensor: Tensor) -> "_Shape":
        if tensor.dtype not in _DTYPE_NAMES:
            raise TensorFileError(f"tensors of {tensor.dtype} cannot be stored")
        return cls(tensor.dtype, tuple(tensor.shape), tensor.nbytes)


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    advance: Callable[[int], None] = lambda _bytes: None,
) -> WrittenFile:
    """Write `tensors` to a new safetensors file at `path`; raises OSError.

    `tensors` is asked twice for each tensor, for its shape and later for its data, so a mapping that reads from
    a memory-mapped checkpoint never holds more than one. `advance` is told the tensors' bytes as they are written.
    """
    shapes = {name: _Shape.of(tensors[name]) for name in tensors}
    order = sorted(shapes, key=lambda name: (-shapes[name].dtype.itemsize, name))  # keeps all data aligned
    with path.open("xb") as file:
        writer = HashingWriter(file)
        header = _header({name: shapes[name] for name in order}, metadata or {})
        writer.write(len(header).to_bytes(8, "little"))
        writer.write(header)
        for name in order:
            data = memoryview(_bytes_of(tensors[name]))
            for start in range(0, len(data), _CHUNK):
                chunk = data[start : start + _CHUNK]
                writer.write(chunk)
                advance(len(chunk))
        return writer.finish()


def _header(shapes: Mapping[str, _Shape], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    offset = 0
    for name, shape in shapes.items():
        entries[name] = {
            "dtype": _DTYPE_NAMES[shape.dtype],
            "shape": list(shape.shape),
            "data_offsets": [offset, offset + shape.nbytes],
        }
        offset += shape.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % _ALIGNMENT)


def _bytes_of(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of the safetensors file at `path`, on the CPU, and its metadata. Raises TensorFileError.

    The tensors are views of the mapped file: pages are read when they are touched.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise TensorFileError(f"{path} is not a readable safetensors file ({error})") from error
