"""The compiled native kernels, loaded once per process, or nothing where they cannot be had.

They are called through ctypes, not as registered operators: a call costs one to two microseconds so, a fraction of
what dispatching an operator does, and nothing on the CPU captures or compiles the graph that would need registered
operators. A tick that runs all stages makes one call, where the head and all draws are such as it knows; one that goes
by stages makes four, and a few more at every exit.
EXEUNT_NATIVE=0 turns them off.
"""

import ctypes
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from exeunt.kernels.native.build import (
    FLAG_CHOICES,
    NativeBuildError,
    cached_library,
    find_compiler,
    is_cached,
)

logger = logging.getLogger(__name__)

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_loading = threading.Lock()
_loaded: list["NativeLibrary | None"] = []  # one entry once the question is settled

_pointer, _long, _int, _float = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_SIGNATURES = {
    "exeunt_int4_linear": [_pointer] * 4 + [_long] * 4 + [_int] * 2,
    "exeunt_full_linear": [_pointer] * 4 + [_long] * 3 + [_int] * 2,
    "exeunt_run_blocks": [_pointer, _long] + [_pointer] * 3 + [_long] + [_pointer] * 4 + [_long] + [_int] * 2,
    "exeunt_model_pass": [_pointer] * 5 + [_long] + [_int] * 2,
    "exeunt_project_kv": [_pointer, _long] + [_pointer] * 3 + [_long] + [_pointer] * 4 + [_long] + [_int] * 2,
    "exeunt_exit_state": [_pointer] * 4 + [_long] + [_pointer] * 2 + [_int] * 2,
    "exeunt_exit_gate": [_pointer] * 5 + [_long] + [_pointer] * 2 + [_int] * 2,
    "exeunt_gate_confidence": [_pointer] * 6 + [_long] * 2 + [_float, _int],
    "exeunt_draw": [_pointer] * 4 + [_long] * 2 + [_pointer] * 3 + [_int],
    "exeunt_write_kv": [_pointer] * 3 + [_long] * 2 + [_pointer, _long] + [_int] * 2,
    "exeunt_paged_attention": [_pointer] * 4 + [_long] * 4 + [_float] + [_int] * 2,
    "exeunt_rms_norm": [_pointer] * 3 + [_long] * 3 + [_float, _int],
}


class NativeLibrary:
    """The functions of one compiled library; their arguments are those of kernels/native/exeunt.cpp."""

    def __init__(self, path: Path) -> None:
        """Load the library; raises OSError where it cannot be, AttributeError where it is not one of ours."""
        self.path = path
        handle = ctypes.CDLL(str(path))
        self.lanes = int(handle.exeunt_lanes())
        self.int4_linear = self._function(handle, "exeunt_int4_linear")
        self.full_linear = self._function(handle, "exeunt_full_linear")
        self.run_blocks = self._function(handle, "exeunt_run_blocks")
        self.model_pass = self._function(handle, "exeunt_model_pass", _int)
        self.project_kv = self._function(handle, "exeunt_project_kv")
        self.exit_state = self._function(handle, "exeunt_exit_state")
        self.exit_gate = self._function(handle, "exeunt_exit_gate")
        self.gate_confidence = self._function(handle, "exeunt_gate_confidence")
        self.draw = self._function(handle, "exeunt_draw")
        self.write_kv = self._function(handle, "exeunt_write_kv")
        self.paged_attention = self._function(handle, "exeunt_paged_attention")
        self.rms_norm = self._function(handle, "exeunt_rms_norm")

    @staticmethod
    def _function(
        handle: ctypes.CDLL, name: str, returned: type[ctypes.c_int] | None = None
    ) -> Callable[..., Any]:
        function = getattr(handle, name)
        function.argtypes = _SIGNATURES[name]
        function.restype = returned
        return function  # type: ignore[no-any-return]


def native_library() -> NativeLibrary | None:
    """Return the native kernels, compiling them on this machine's first use (seconds); None where there are none.

    Why there are none is logged once.
    """
    if not _loaded:  # the first calls only: this is asked for every operation
        with _loading:
            if not _loaded:
                _loaded.append(_load())
    return _loaded[0]


def is_compiled() -> bool:
    """Whether `native_library` returns at once: compiled on this machine before, or never to be."""
    compiler = find_compiler()
    if _loaded or not _wanted() or compiler is None:
        return True
    try:
        return any(is_cached(compiler, flags) for flags in FLAG_CHOICES)
    except OSError:  # a compiler that does not run, a cache that cannot be read: `native_library` says so
        return True


def _wanted() -> bool:
    return os.environ.get("EXEUNT_NATIVE", "1") != "0"


def _load() -> NativeLibrary | None:
    if not _wanted():
        logger.warning("EXEUNT_NATIVE is 0: the kernels run in plain PyTorch, several times slower")
        return None
    compiler = find_compiler()
    if compiler is None:
        logger.warning("no C++ compiler found: the kernels run in plain PyTorch, several times slower")
        return None
    failures = []
    for flags in FLAG_CHOICES:
        try:
            return _open(compiler, flags)
        except (NativeBuildError, OSError, AttributeError) as error:
            failures.append(str(error))
    logger.warning(
        "the native kernels could not be built, the kernels run in plain PyTorch, several times slower: %s",
        failures[0],
    )
    return None


def _open(compiler: str, flags: tuple[str, ...]) -> NativeLibrary:
    path = cached_library(compiler, flags)
    try:
        return NativeLibrary(path)
    except (OSError, AttributeError):  # a damaged file in the cache: once more from the sources
        path.unlink(missing_ok=True)
        return NativeLibrary(cached_library(compiler, flags))
