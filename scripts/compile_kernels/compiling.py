"""Runs the kernels' own launch code over tensors without data, and compiles what it would launch for a GPU.

Which constants, types and alignments a kernel is compiled with is thus what the wrappers say, and nothing that a list
beside them repeats. Registers and spills are what `ptxas` prints.
"""

import contextlib
import io
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import triton
from torch import Tensor
from torch._library.custom_ops import CustomOpDef
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction, MockTensor

from exeunt.kernels.tuned.launches import TunedLaunch, forced

_PREFIX = "exeunt.kernels."
_SAID = {
    "registers": re.compile(r"Used (\d+) registers"),
    "stack_bytes": re.compile(r"(\d+) bytes stack frame"),
    "spill_store_bytes": re.compile(r"(\d+) bytes spill stores"),
    "spill_load_bytes": re.compile(r"(\d+) bytes spill loads"),
}


@dataclass(frozen=True, slots=True)
class Compiled:
    """One kernel as it was compiled: what a thread of it takes, and the shared memory of a program."""

    kernel: str  # module behind `exeunt.kernels.`, and name
    warps: int
    registers: int
    stack_bytes: int
    spill_store_bytes: int
    spill_load_bytes: int
    shared_bytes: int


def compile_launches(
    call: Callable[[], object], capability: int, launch: TunedLaunch | None = None
) -> list[Compiled]:
    """Compile what `call` would launch on a GPU, for its compute capability (90 is 9.0); it runs under fake tensors.

    Linear layers run with `launch`, None: by the rule. Raises RuntimeError where Triton interprets.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("nothing is compiled under Triton's interpreter: unset TRITON_INTERPRET")
    compiled: list[Compiled] = []

    def launched(kernel: JITFunction[Any], grid: object) -> Callable[..., None]:
        def compile_it(*args: object, **options: object) -> None:
            kernel.device_caches.clear()  # what another call compiled alike counts for this one too
            with contextlib.redirect_stdout(io.StringIO()) as said:
                code = kernel.run(*map(_mocked, args), grid=grid, warmup=True, **options)
            compiled.append(_read(kernel, code, said.getvalue()))

        return compile_it

    with (
        _no_device(capability),
        mock.patch.object(JITFunction, "__getitem__", launched),
        forced(launch),  # what was measured on a GPU that is here is not what another is compiled for
        FakeTensorMode(),
    ):
        call()
    return compiled


@contextlib.contextmanager
def _no_device(capability: int) -> Iterator[None]:
    """Triton and the wrappers take a GPU of that capability for there, and nothing asks the driver."""
    target = GPUTarget("cuda", capability, 32)
    driver = SimpleNamespace(
        get_current_target=lambda: target,
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
    )
    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(driver)
    try:
        with (
            mock.patch.object(triton.knobs.nvidia, "dump_ptxas_log", True),
            mock.patch.object(triton.knobs.compilation, "always_compile", True),
            # a PyTorch without CUDA makes no views of its tensors, not even of fake ones: they say they were some
            mock.patch.object(FakeTensor, "is_cuda", True, create=True),
            mock.patch.object(FakeTensor, "data_ptr", return_value=0, create=True),
            mock.patch.object(CustomOpDef, "__call__", lambda op, *args: op._init_fn(*args)),
        ):
            yield
    finally:
        triton.runtime.driver.set_active(before)


def _mocked(argument: object) -> object:
    return MockTensor(argument.dtype, argument.shape) if isinstance(argument, Tensor) else argument


def _read(kernel: JITFunction[Any], code: Any, log: str) -> Compiled:
    found = {name: int(pattern.findall(log)[-1]) for name, pattern in _SAID.items()}
    name = f"{kernel.fn.__module__.removeprefix(_PREFIX)}.{kernel.fn.__name__}"
    return Compiled(name, warps=code.metadata.num_warps, shared_bytes=code.metadata.shared, **found)
