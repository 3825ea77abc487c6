"""Writes bundles: all at once, or not at all.

Writing goes to a hidden directory beside the target, file by file forced onto the disk, and becomes the target by
a rename: whatever interrupts it (an exception, Ctrl-C, a full disk) leaves nothing behind and an older bundle at
the target as it was. An older bundle and the new one change places in one step; where the file system cannot do
that, there are two renames, and a process killed between them leaves the older bundle as `.NAME.old-xxxxxxxx`, which
the next write to the target puts back first.
"""

import ctypes
import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from torch import Tensor

from exeunt.compression.bundle import (
    CONFIG,
    EXITS,
    FULL_WEIGHTS,
    INT4_WEIGHTS,
    LINEAR_BLOCK,
    MANIFEST,
    REPORT_HTML,
    REPORT_JSON,
    Advance,
    Bundle,
    BundleError,
    manifest_fields,
    needed_files,
    unseen,
)
from exeunt.compression.exit_tensors import exit_metadata, exit_tensors, format_version
from exeunt.compression.exits import ExitHead
from exeunt.compression.linear_block import LinearBlock, linear_block_tensors
from exeunt.compression.manifest import (
    FileRecord,
    Manifest,
    manifest_json,
)
from exeunt.compression.tensor_file import HashingWriter, WrittenFile, write_tensors

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
_AT_FDCWD: Final = -100  # paths are relative to the working directory, as usual
_RENAME_EXCHANGE: Final = 2


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
    fields = manifest_fields(target)
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


def tensor_bytes(contents: BundleContents) -> int:
    """Bytes of all tensors of a bundle: what `write_bundle` tells `advance` in all."""
    groups = [tensors for _, tensors, _ in _tensor_files(contents)]
    return sum(tensors[name].nbytes for tensors in groups for name in tensors)


def write_bundle(path: Path | str, contents: BundleContents, advance: Advance = unseen) -> Bundle:
    """Write a bundle to `path` and return it, or leave everything as it was and raise.

    Raises BundleError where the target may not be replaced or the disk does not take it.
    """
    try:
        _restore(Path(os.path.realpath(path)))
    except OSError as error:
        raise BundleError(_write_problem(Path(path), error)) from error
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
    version = format_version(contents.exits)
    manifest = contents.manifest.model_copy(update={"files": records, "format_version": version})
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
    missing = [name for name in needed_files(manifest) if name not in manifest.files]
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
    """Put `partial` in the place of `target`; older bundles of it are deleted once the new one stands."""
    old = target.with_name(f".{target.name}.old-{secrets.token_hex(4)}")
    if not target.exists():
        partial.rename(target)
    else:
        check_target(target)  # nobody may have put files there in the meantime
        if _exchange(partial, target):
            with suppress(OSError):  # or it goes as the partial one
                partial.rename(old)
        else:
            _rename_twice(partial, target, old)
    try:
        _sync_directory(target.parent)
    finally:
        for each in _set_aside(target):
            shutil.rmtree(each, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Let two directories change places in one step; False, and nothing changed, where the system cannot."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)  # Linux, and not every file system
    if rename is None:
        return False
    done: int = rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE)
    return done == 0


def _rename_twice(partial: Path, target: Path, old: Path) -> None:
    try:
        target.rename(old)
        partial.rename(target)
    except BaseException:
        if old.exists() and not target.exists():
            old.rename(target)
        raise


def _restore(target: Path) -> None:
    """Put back the bundle that a writer killed between its two renames left beside `target`."""
    if os.path.lexists(target):
        return
    old = _set_aside(target)
    if len(old) == 1 and manifest_fields(old[0]) is not None:
        old[0].rename(target)


def _set_aside(target: Path) -> list[Path]:
    """The directories beside `target` to which bundles that stood there were renamed."""
    if not os.path.isdir(target.parent):
        return []
    name = re.compile(rf"\.{re.escape(target.name)}\.old-[0-9a-f]{{8}}", re.DOTALL)
    found = (target.parent / each for each in os.listdir(target.parent) if name.fullmatch(each))
    return [path for path in found if path.is_dir() and not path.is_symlink()]


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
