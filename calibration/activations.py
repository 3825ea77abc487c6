"""Hidden states of whole splits, block by block: where they are kept, and who looks on while they pass.

States pass a model in `exeunt.calibration.streaming_pass`; whoever wants a block's for longer keeps its own copy.
Arrays live in files of a scratch folder, mapped into memory, so that a large model's do not have to fit.
"""

import errno
import hashlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Protocol

import torch
from torch import Tensor

from exeunt.calibration.errors import CalibrationError
from exeunt.calibration.journal import Entry

_NO_ROOM: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_CANNOT_RESERVE: Final = frozenset({errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS})  # of some file systems


class BlockVisitor(Protocol):
    """Looks on while a split passes the blocks one after another."""

    def see(self, block: int, tokens: slice, before: Tensor, after: Tensor) -> None:
        """States [T, H] in front of and behind `block`, on the model's device, of the split's `tokens`."""
        ...

    def finish(self, block: int) -> None:
        """All tokens have passed `block`."""
        ...

    def record(self, block: int) -> Entry:
        """What it has learned of the finished `block` and must know to go on behind it: tensors, and JSON values."""
        ...

    def restore(self, block: int, entry: Entry) -> bool:
        """Learn of `block` from what `record` said; False where that cannot be, and the pass has to begin anew."""
        ...

    def forget(self) -> None:
        """Know of no block: the pass begins anew."""
        ...


class Scratch:
    """Arrays of hidden states in the files of one folder; the folder's owner deletes it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._arrays = 0

    def array(self, tokens: int, hidden: int, dtype: torch.dtype, name: str | None = None) -> Tensor:
        """An array [tokens, hidden] on the CPU, backed by a file: zeroed, or what stands in the file called `name`.

        Raises CalibrationError where the disk has no room for it: its blocks are reserved here, for a write to memory
        that finds the disk full would end the process by a signal.
        """
        path = self._folder / (f"states-{self._arrays}" if name is None else name)
        self._arrays += name is None
        self._reserve(path, tokens * hidden * dtype.itemsize)
        flat = torch.from_file(str(path), shared=True, size=tokens * hidden, dtype=dtype)
        return flat.view(tokens, hidden)

    def _reserve(self, path: Path, size: int) -> None:
        """Give the file `path` of `size` bytes its place on the disk, where the system can; what it holds stays."""
        reserve = getattr(os, "posix_fallocate", None)
        if reserve is None or size == 0:
            return
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            reserve(descriptor, 0, size)
        except OSError as error:
            if error.errno in _CANNOT_RESERVE:
                return
            if error.errno not in _NO_ROOM:
                raise
            free, reason = shutil.disk_usage(self._folder).free, os.strerror(error.errno).lower()
            raise CalibrationError(
                f"{self._folder} has no room for {size:,} bytes of hidden states ({reason}; {free:,} bytes are "
                "free); set TMPDIR to a folder on a larger disk, or give one as --work."
            ) from error
        finally:
            os.close(descriptor)

    def sync(self, name: str) -> None:
        """Force the array called `name` onto the disk."""
        descriptor = os.open(self._folder / name, os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def digest(states: Tensor) -> str:
    """What tells whether an array on the CPU is as it was: 128 bits, hexadecimal."""
    data = states.contiguous().view(torch.uint8).numpy()
    return hashlib.blake2b(data.data, digest_size=16).hexdigest()


class StateKeeper:
    """Keeps the states behind some blocks: the visitor that exits are trained on."""

    def __init__(
        self, blocks: Sequence[int], tokens: int, hidden: int, dtype: torch.dtype, scratch: Scratch
    ) -> None:
        self.states = {block: scratch.array(tokens, hidden, dtype, self._name(block)) for block in blocks}
        self._scratch = scratch

    def see(self, block: int, tokens: slice, before: Tensor, after: Tensor) -> None:
        """Keep `after` where the block is one of those."""
        if block in self.states:
            self.states[block][tokens] = after

    def finish(self, block: int) -> None:
        """Nothing to do."""

    def record(self, block: int) -> Entry:
        """A digest of the states, which are on the disk when it returns."""
        if block not in self.states:
            return {}, None
        self._scratch.sync(self._name(block))
        return {}, digest(self.states[block])

    def restore(self, block: int, entry: Entry) -> bool:
        """Whether the states in the scratch folder are those that were recorded."""
        return block not in self.states or digest(self.states[block]) == entry[1]

    def forget(self) -> None:
        """Nothing to do: the states are overwritten."""

    @staticmethod
    def _name(block: int) -> str:
        return f"behind-block-{block}"
