"""The bundle: a directory that holds one calibrated model, verified when it is opened.

Opening compares every file that the manifest lists with its size and SHA-256; files that the manifest does not list
are neither read nor refused. `bundle_writer` makes bundles.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from torch import Tensor

from exeunt.compression.architecture import Architecture, load_architecture
from exeunt.compression.bundle_format import BUNDLE_KIND, CONFIRMED_VERSION
from exeunt.compression.exit_tensors import exits_from_tensors, format_version
from exeunt.compression.exits import ExitHead, ExitHeadError
from exeunt.compression.linear_block import LinearBlock, LinearBlockError, linear_block_from_tensors
from exeunt.compression.tensor_file import TensorFileError, read_tensors

if TYPE_CHECKING:  # it imports pydantic, which plain models do without
    from exeunt.compression.manifest import FileRecord, Manifest

MANIFEST: Final = "manifest.json"
CONFIG: Final = "config.json"
FULL_WEIGHTS: Final = "weights.safetensors"
INT4_WEIGHTS: Final = "weights.int4.safetensors"
LINEAR_BLOCK: Final = "linear_block.safetensors"
EXITS: Final = "exits.safetensors"
REPORT_HTML: Final = "report.html"
REPORT_JSON: Final = "report.json"

_REMEDY: Final = "copy the bundle again or calibrate anew"
_HASH_THREADS: Final = 4
_HASH_CHUNK: Final = 4 << 20  # bytes

Advance = Callable[[int], None]
"""Called with the bytes of work done since the last call."""


def unseen(_bytes: int) -> None:
    """Progress that nobody looks at."""


class BundleError(Exception):
    """A bundle that cannot be opened or written; the message is one sentence that says why and what to do."""


@dataclass(frozen=True, slots=True)
class Bundle:
    """A verified bundle at `path`."""

    path: Path
    manifest: "Manifest"

    def architecture(self) -> Architecture:
        """What the decoder is built by: as the manifest remembers it, else from config.json.

        Raises ConfigError or UnsupportedModelError.
        """
        return self.manifest.architecture or load_architecture(self.path)

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of one of the bundle's files, mapped, on the CPU. Raises BundleError."""
        return self._read(name)[0]

    def linear_block(self) -> LinearBlock | None:
        """The linear block on the CPU as stored, None where the bundle has none. Raises BundleError."""
        record = self.manifest.linear_block
        if record is None:
            return None
        try:
            block = linear_block_from_tensors(_copied(self._read(LINEAR_BLOCK)[0]))
        except LinearBlockError as error:
            raise BundleError(f"{self.path / LINEAR_BLOCK}: {error}; {_REMEDY}") from error
        if block.index != record.index:
            raise BundleError(
                f"{self.path}: the manifest's linear block replaces block {record.index}, the tensors' "
                f"block {block.index}; {_REMEDY}"
            )
        return block

    def exits(self) -> tuple[ExitHead, ...]:
        """The exit heads on the CPU as stored, shallowest first. Raises BundleError."""
        if not self.manifest.exits:
            return ()
        try:
            tensors, metadata = self._read(EXITS)
            heads = exits_from_tensors(_copied(tensors), metadata)
        except ExitHeadError as error:
            raise BundleError(f"{self.path / EXITS}: {error}; {_REMEDY}") from error
        needed, said = format_version(heads), self.manifest.format_version
        if needed > said or (said == CONFIRMED_VERSION and needed < said):
            raise BundleError(
                f"{self.path}: the manifest's format_version is {said}, the exits are those of version {needed}; "
                f"{_REMEDY}"
            )
        listed = sorted(record.block for record in self.manifest.exits)
        if [head.block for head in heads] != listed:
            raise BundleError(
                f"{self.path}: the manifest lists exits after blocks {listed}, the tensors hold those after "
                f"{[head.block for head in heads]}; {_REMEDY}"
            )
        return heads

    def _read(self, name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
        try:
            return read_tensors(self.path / name)
        except TensorFileError as error:
            raise BundleError(f"{error}; {_REMEDY}") from error


def _copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that do not change with the file they were read from."""
    return {name: tensor.clone() for name, tensor in tensors.items()}


def is_bundle(path: Path) -> bool:
    """Whether `path` is the directory of a bundle, intact or not."""
    return manifest_fields(path) is not None


def open_bundle(path: Path | str) -> Bundle:
    """The bundle at `path`, every file of it verified. Raises BundleError."""
    from exeunt.compression.manifest import ManifestError, read_manifest

    path = Path(path)
    if not os.path.exists(
        path
    ):  # unlike Path.exists, False for a name too long or a folder one may not search
        raise BundleError(f"{path} does not exist; give the directory that `exeunt calibrate --out` wrote")
    if not path.is_dir():
        raise BundleError(
            f"{path} is not a directory; a bundle is the one that `exeunt calibrate --out` wrote"
        )
    try:
        text = (path / MANIFEST).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise BundleError(f"{path} is not a bundle: it holds no {MANIFEST}; {_REMEDY}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(f"{path / MANIFEST} cannot be read ({error}); {_REMEDY}") from error
    try:
        manifest = read_manifest(text)
    except ManifestError as error:
        raise BundleError(f"{path}: {error}") from error
    for name in needed_files(manifest):
        if name not in manifest.files:
            raise BundleError(
                f"{path}: {MANIFEST} lists no {name}, which what it says it holds needs; {_REMEDY}"
            )
    _verify_files(path, manifest.files)
    return Bundle(path, manifest)


def needed_files(manifest: "Manifest") -> list[str]:
    """The names of the files without which a bundle would not hold what `manifest` says it holds."""
    files = [CONFIG]
    if "full" in manifest.weights:
        files.append(FULL_WEIGHTS)
    if "int4" in manifest.weights:
        files.append(INT4_WEIGHTS)
    if manifest.linear_block is not None:
        files.append(LINEAR_BLOCK)
    if manifest.exits:
        files.append(EXITS)
    return files


def _verify_files(path: Path, files: "Mapping[str, FileRecord]") -> None:
    for name, record in files.items():
        try:
            size = (path / name).stat().st_size
        except FileNotFoundError as error:
            raise BundleError(f"{path}: {name} is missing; {_REMEDY}") from error
        except OSError as error:
            raise BundleError(f"{path / name} cannot be read ({error}); {_REMEDY}") from error
        if size != record.bytes:
            state = "truncated" if size < record.bytes else "altered"
            raise BundleError(
                f"{path}: {name} was {state}, it has {size} bytes and should have {record.bytes}; {_REMEDY}"
            )
    with ThreadPoolExecutor(_HASH_THREADS) as pool:  # hashing releases the interpreter's lock
        digests = pool.map(lambda name: file_sha256(path / name), files)
        for (name, record), digest in zip(files.items(), digests, strict=True):
            if digest != record.sha256:
                raise BundleError(
                    f"{path}: {name} was altered after the bundle was made, its SHA-256 does not match; {_REMEDY}"
                )


def file_sha256(path: Path, advance: Advance = unseen) -> str:
    """The SHA-256 of a file, hexadecimal. Raises BundleError where it cannot be read."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(_HASH_CHUNK):
                digest.update(chunk)
                advance(len(chunk))
        return digest.hexdigest()
    except OSError as error:
        raise BundleError(f"{path} cannot be read ({error}); {_REMEDY}") from error


def checkpoint_sha256(files: Sequence[Path], advance: Advance = unseen) -> str:
    """One SHA-256 for a checkpoint's weight files: the file's own, or of the sorted lines `sha256  name`."""
    if len(files) == 1:
        return file_sha256(files[0], advance)
    ordered = sorted(files, key=lambda path: path.name)
    lines = [f"{file_sha256(path, advance)}  {path.name}\n" for path in ordered]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def manifest_fields(path: Path) -> dict[str, object] | None:
    """What the manifest of the bundle at `path` says, unchecked; None where there is no bundle."""
    try:
        fields = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return fields if isinstance(fields, dict) and fields.get("kind") == BUNDLE_KIND else None
