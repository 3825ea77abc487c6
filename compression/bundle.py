"""The bundle: a directory that holds one calibrated model, written all at once and verified when it is opened.

Writing goes to a hidden directory beside the target, file by file forced onto the disk, and becomes the target by
a rename: whatever interrupts it (an exception, Ctrl-C, a full disk) leaves nothing behind and an older bundle at
the target as it was. Opening compares every file that the manifest lists with its size and SHA-256; files that the
manifest does not list are neither read nor refused.
"""

import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from torch import Tensor

from exeunt.compression.exits import ExitHead, ExitHeadError, exit_metadata, exit_tensors, exits_from_tensors
from exeunt.compression.linear_block import (
    LinearBlock,
    LinearBlockError,
    linear_block_from_tensors,
    linear_block_tensors,
)
from exeunt.compression.manifest import (
    BUNDLE_KIND,
    FileRecord,
    Manifest,
    ManifestError,
    manifest_json,
    read_manifest,
)
from exeunt.compression.tensor_file import (
    HashingWriter,
    TensorFileError,
    WrittenFile,
    read_tensors,
    write_tensors,
)

MANIFEST: Final = "manifest.json"
CONFIG: Final = "config.json"
FULL_WEIGHTS: Final = "weights.safetensors"
INT4_WEIGHTS: Final = "weights.int4.safetensors"
LINEAR_BLOCK: Final = "linear_block.safetensors"
EXITS: Final = "exits.safetensors"
REPORT_HTML: Final = "report.html"
REPORT_JSON: Final = "report.json"

# What a checkpoint's folder may hold besides weights, and a bundle takes over as it is.
_SIDE_FILES: Final = (
    CONFIG,
    "generation_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
_REMEDY: Final = "copy the bundle again or calibrate anew"
_HASH_THREADS: Final = 4
_HASH_CHUNK: Final = 4 << 20  # bytes

Advance = Callable[[int], None]
"""Called with the bytes of work done since the last call."""


def _unseen(_bytes: int) -> None:
    """Progress that nobody looks at."""


class BundleError(Exception):
    """A bundle that cannot be opened or written; the message is one sentence that says why and what to do."""


@dataclass(frozen=True, slots=True)
class BundleContents:
    """What goes into a bundle.

    `checkpoint` is the folder that config and tokenizer are taken from. `manifest` says everything but its
    `files`, which writing fills in. `full` holds the checkpoint's own tensors under their own names, None when
    the bundle has INT4 weights only; `int4` what `weights.int4.safetensors` holds. Both may be lazy mappings.
    """

    checkpoint: Path
    manifest: Manifest
    full: Mapping[str, Tensor] | None
    int4: Mapping[str, Tensor] | None
    linear_block: LinearBlock | None
    exits: Sequence[ExitHead]
    report_html: str
    report_json: str


@dataclass(frozen=True, slots=True)
class Bundle:
    """A verified bundle at `path`."""

    path: Path
    manifest: Manifest

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
    return _manifest_fields(path) is not None


def open_bundle(path: Path | str) -> Bundle:
    """The bundle at `path`, every file of it verified. Raises BundleError."""
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
    for name in _needed_files(manifest):
        if name not in manifest.files:
            raise BundleError(
                f"{path}: {MANIFEST} lists no {name}, which what it says it holds needs; {_REMEDY}"
            )
    _verify_files(path, manifest.files)
    return Bundle(path, manifest)


def _needed_files(manifest: Manifest) -> list[str]:
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


def _verify_files(path: Path, files: Mapping[str, FileRecord]) -> None:
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


def file_sha256(path: Path, advance: Advance = _unseen) -> str:
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


def checkpoint_sha256(files: Sequence[Path], advance: Advance = _unseen) -> str:
    """One SHA-256 for a checkpoint's weight files: the file's own, or of the sorted lines `sha256  name`."""
    if len(files) == 1:
        return file_sha256(files[0], advance)
    ordered = sorted(files, key=lambda path: path.name)
    lines = [f"{file_sha256(path, advance)}  {path.name}\n" for path in ordered]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def check_target(path: Path | str) -> Path:
    """The real path at which a bundle may be written: a new one, an empty directory, or another bundle's.

    Raises BundleError for anything else, so that nobody loses files to a mistyped `--out`; call it before the
    work whose result it is to hold.
    """
    target = Path(os.path.realpath(path))
    if not os.path.lexists(target):
        return target
    if not target.is_dir():
        raise BundleError(f"{target} exists and is not a directory; give another --out or remove it")
    try:
        held = set(os.listdir(target))
    except OSError as error:
        raise BundleError(f"{target} cannot be read ({error}); give another --out") from error
    if not held:
        return target
    fields = _manifest_fields(target)
    if fields is None:
        raise BundleError(f"{target} exists and is not a bundle; give another --out or remove it")
    files = fields.get("files")
    foreign = sorted(held - {MANIFEST} - set(files if isinstance(files, dict) else ()))
    if foreign:
        raise BundleError(
            f"{target} is a bundle that also holds {foreign[0]!r}, which replacing it would delete; "
            "move that elsewhere or give another --out"
        )
    return target


def _manifest_fields(path: Path) -> dict[str, object] | None:
    try:
        fields = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return fields if isinstance(fields, dict) and fields.get("kind") == BUNDLE_KIND else None


def tensor_bytes(contents: BundleContents) -> int:
    """Bytes of all tensors of a bundle: what `write_bundle` tells `advance` in all."""
    groups = [tensors for _, tensors, _ in _tensor_files(contents)]
    return sum(tensors[name].nbytes for tensors in groups for name in tensors)


def write_bundle(path: Path | str, contents: BundleContents, advance: Advance = _unseen) -> Bundle:
    """Write a bundle to `path` and return it, or leave everything as it was and raise.

    Raises BundleError where the target may not be replaced or the disk does not take it.
    """
    target = check_target(path)
    try:
        with _created(target.parent), _partial(target) as partial:
            manifest = _write_files(partial, contents, advance)
            _sync_directory(partial)
            _install(partial, target)
    except OSError as error:
        raise BundleError(_write_problem(target, error)) from error
    return Bundle(target, manifest)


def _write_files(directory: Path, contents: BundleContents, advance: Advance) -> Manifest:
    written: dict[str, WrittenFile] = {}
    for source in _side_files(contents.checkpoint):
        written[source.name] = _write_bytes(directory / source.name, source.read_bytes())
    for name, tensors, metadata in _tensor_files(contents):
        written[name] = write_tensors(directory / name, tensors, metadata, advance)
    written[REPORT_HTML] = _write_bytes(directory / REPORT_HTML, contents.report_html.encode())
    written[REPORT_JSON] = _write_bytes(directory / REPORT_JSON, contents.report_json.encode())
    records = {name: FileRecord(sha256=file.sha256, bytes=file.bytes) for name, file in written.items()}
    manifest = contents.manifest.model_copy(update={"files": records})
    _check_complete(manifest)
    _write_bytes(directory / MANIFEST, manifest_json(manifest).encode())
    return manifest


def _tensor_files(
    contents: BundleContents,
) -> list[tuple[str, Mapping[str, Tensor], Mapping[str, str] | None]]:
    """The names of a bundle's tensor files, their tensors, and their metadata."""
    files: list[tuple[str, Mapping[str, Tensor], Mapping[str, str] | None]] = []
    if contents.full is not None:
        files.append((FULL_WEIGHTS, contents.full, None))
    if contents.int4 is not None:
        files.append((INT4_WEIGHTS, contents.int4, None))
    if contents.linear_block is not None:
        files.append((LINEAR_BLOCK, linear_block_tensors(contents.linear_block), None))
    if contents.exits:
        files.append((EXITS, exit_tensors(contents.exits), exit_metadata(contents.exits)))
    return files


def _check_complete(manifest: Manifest) -> None:
    missing = [name for name in _needed_files(manifest) if name not in manifest.files]
    if missing:
        raise BundleError(f"the manifest promises {missing[0]}, which the bundle was not given")


def _side_files(checkpoint: Path) -> list[Path]:
    found = {path for name in _SIDE_FILES if (path := checkpoint / name).is_file()}
    found |= {path for path in checkpoint.glob("tokenizer*") if path.is_file()}
    return sorted(found)


def _write_bytes(path: Path, data: bytes) -> WrittenFile:
    with path.open("xb") as file:
        writer = HashingWriter(file)
        writer.write(data)
        return writer.finish()


@contextmanager
def _created(directory: Path) -> Iterator[None]:
    """Make `directory` and its missing parents, and take them away again if what follows fails."""
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for path in missing:
            with suppress(OSError):
                path.rmdir()
        raise


@contextmanager
def _partial(target: Path) -> Iterator[Path]:
    """A new hidden directory beside `target`, gone at the end unless it was renamed."""
    partial = target.with_name(f".{target.name}.partial-{secrets.token_hex(4)}")
    try:
        partial.mkdir()
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _install(partial: Path, target: Path) -> None:
    """Put `partial` in the place of `target`; an older bundle there is deleted once the new one stands."""
    old = target.with_name(f".{target.name}.old-{secrets.token_hex(4)}")
    try:
        if target.exists():
            check_target(target)  # nobody may have put files there in the meantime
            target.rename(old)
        partial.rename(target)
    except BaseException:
        if old.exists() and not target.exists():
            old.rename(target)
        raise
    try:
        _sync_directory(target.parent)
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_problem(target: Path, error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = ""
        with suppress(OSError):
            free = f" ({shutil.disk_usage(target.parent).free} bytes are free)"
        return f"the bundle {target} could not be written, the disk is full{free}; make room or give another --out"
    return f"the bundle {target} could not be written ({error}); give another --out"
