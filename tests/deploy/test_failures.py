"""The one line that is said of whatever went wrong, and the status that goes with it."""

import pytest
import torch

from exeunt.deploy.failures import told
from exeunt.deploy.loading import SettingsError

OUT_OF_MEMORY = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 15.77 GiB of which 1.20 GiB is "
    "free. {rest} 13.20 GiB is allocated by PyTorch, and 128.00 MiB is reserved by PyTorch but unallocated. If "
    "reserved but unallocated memory is large try setting PYTORCH_ALLOC_CONF=expandable_segments:True to avoid "
    "fragmentation.  See documentation for Memory Management  (https://pytorch.org/docs/stable/notes/cuda.html)"
)


@pytest.mark.parametrize(
    ("error", "line", "status"),
    [
        (SettingsError("--device is gpu."), "--device is gpu.", 2),
        (OSError("no such port"), "no such port", 1),
        (RuntimeError(), "RuntimeError", 1),
        (KeyError("x"), "KeyError: 'x' (a bug: run again with --log-level debug for the traceback)", 1),
    ],
)
def test_a_line_and_a_status(error: Exception, line: str, status: int) -> None:
    assert told(error, []) == (line, status)


@pytest.mark.parametrize(
    "rest",
    [
        "Including non-PyTorch memory, this process has 14.57 GiB memory in use. Of the allocated memory",
        "Process 17 has 14.57 GiB memory in use. Of the allocated memory",
        "Of the allocated memory",
    ],
)
def test_out_of_memory_keeps_its_numbers_and_loses_pytorchs_advice(rest: str) -> None:
    assert told(torch.OutOfMemoryError(OUT_OF_MEMORY.format(rest=rest)), []) == (
        "CUDA out of memory; Tried to allocate 2.00 GiB; GPU 0 has a total capacity of 15.77 GiB of which 1.20 GiB is "
        "free: free some there, ask for less, or choose another --device.",
        1,
    )


def test_out_of_memory_without_a_word() -> None:
    line = "A device is out of memory: free some there, ask for less, or choose another --device."
    assert told(torch.OutOfMemoryError(), []) == (line, 1)


@pytest.mark.parametrize(
    ("first", "advice"),
    [
        (
            "CUDA error: out of memory",
            "another process may hold the GPU's memory, free some there or choose another",
        ),
        (
            "Triton Error [CUDA]: out of memory",
            "another process may hold the GPU's memory, free some there or choose another",
        ),
        (
            "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling",
            "another process may hold the GPU's memory, free some there or choose another",
        ),
        (
            "CUDA error: all CUDA-capable devices are busy or unavailable",
            "another process has the GPU to itself, end that or choose another",
        ),
    ],
)
def test_a_gpu_that_others_have_is_no_broken_one(first: str, advice: str) -> None:
    error = RuntimeError(f"{first}\nCompile with `TORCH_USE_CUDA_DSA`.\n")
    assert told(error, []) == (f"{first}: {advice} --device.", 1)


@pytest.mark.parametrize(
    "first",
    [
        "CUDA error: no kernel image is available for execution on the device",
        "Triton Error [CUDA]: an illegal memory access was encountered",
    ],
)
def test_a_gpus_fault_is_one_line(first: str) -> None:
    error = RuntimeError(
        f"{first}\nSearch for `cudaErrorX' in the manual\nCompile with `TORCH_USE_CUDA_DSA`.\n"
    )
    assert told(error, []) == (
        f"{first}: the GPU or its driver failed, or this PyTorch has no code for it; `nvidia-smi` and the system's "
        "log may say more, --device cpu does without.",
        1,
    )
