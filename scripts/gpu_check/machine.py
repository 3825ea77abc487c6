"""The machine: names, versions, which kernels are measured, and the rates that everything else is judged by.

What a kernel could reach at most is the faster of two rates: an elementwise kernel that reads and writes, and a
reduction that only reads, as decoding does. Both are kernels: a copy is left to other engines by some drivers where it
is captured into a graph, and is then slower than any kernel that reads. Clocks are asked for while products are queued:
those of a device that waits say nothing.
"""

import hashlib
import os
import platform
import subprocess
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from exeunt.kernels.timing import timed
from exeunt.kernels.tuned.files import kernels_digest
from scripts.gpu_check.bounds import usable_cores
from scripts.gpu_check.models import GROUP_SIZE
from scripts.gpu_check.report import Context, Found
from scripts.gpu_check.room import room

_ROOT: Final = Path(__file__).resolve().parents[2]
_KERNELS: Final = _ROOT / "kernels"
_SOURCES: Final = (".py", ".cpp", ".h")
_NUMBERS = 10**9  # of four bytes at most: 4 GB read, and as many written
_SHARE = 0.4  # of the free memory that each of both may take
_TRIES = 5
_SIZE = 8192  # of the product
_QUEUED = (0.8, 400)  # seconds of products that are queued while clocks are asked for, and how many at most


def run(context: Context, found: Found) -> None:
    """Fill in what the machine is and how fast it copies and multiplies."""
    found |= {
        "device": str(context.device),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "usable_cores": usable_cores(),
        "python": platform.python_version(),
        **{package: _version(package) for package in ("exeunt", "torch", "triton", "transformers")},
        "commit": _git("rev-parse", "HEAD"),
        "changed": None if (status := _git("status", "--porcelain", "-uno")) is None else bool(status),
        "kernels": sources_digest(_KERNELS),
        "linear_kernels": kernels_digest(),
        "int4_group_size": GROUP_SIZE,
    }
    if context.cuda:
        found |= _gpu(context.device)
    context.report.save()
    found["matmul_bf16_flop_per_s"] = _matmul_rate(context)  # first: it wakes the clocks up
    found |= _memory_rates(context)
    if context.cuda:
        found["clocks_under_load"] = _clocks_under_load(context.device, found["matmul_bf16_flop_per_s"])


def sources_digest(folder: Path) -> str:
    """A digest of all sources in a folder, whatever else lies there: names and contents."""
    digest = hashlib.sha256()
    for path in sorted(each for each in folder.rglob("*") if each.suffix in _SOURCES):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(folder).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:12]


def _git(*asked: str) -> str | None:
    """What git says of this repository; None where there is no git, or this is no repository of its own."""
    if not (_ROOT / ".git").exists():
        return None
    said = ["git", "-C", str(_ROOT), *asked]
    try:
        return subprocess.run(said, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _gpu(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    return {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": getattr(properties, "L2_cache_size", None),
        "driver": _smi("driver_version", device),
        "cuda": torch.version.cuda,
    }


def _smi(asked: str, device: torch.device) -> str:
    """What nvidia-smi says of the device, or why it says nothing."""
    said = ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader"]
    if (own := getattr(torch.cuda.get_device_properties(device), "uuid", None)) is not None:
        said += ["-i", f"GPU-{own}"]  # its numbers are others than PyTorch's
    try:
        found = subprocess.run(said, capture_output=True, text=True, timeout=20, check=True).stdout
        return found.strip().partition("\n")[0]
    except (OSError, subprocess.SubprocessError) as error:
        return f"nvidia-smi: {error}"


def _clocks_under_load(device: torch.device, flops: float) -> str:
    """Clocks of multiprocessors and memory, asked for while products are queued."""
    a, b, out = _factors(device)
    seconds, most = _QUEUED
    for _ in range(max(1, min(most, int(seconds * flops / (2 * len(a) ** 3))))):
        torch.mm(a, b, out=out)
    try:
        return _smi("clocks.sm,clocks.mem", device)
    finally:
        torch.cuda.synchronize(device)


def _memory_rates(context: Context) -> dict[str, float]:
    """Bytes per second, the best of a few tries each: y = x + 1 (read and written), and the largest of x (read)."""
    count = min(_NUMBERS, int(_SHARE * room(context) / 4)) if context.cuda else 10**6
    source = torch.arange(count, dtype=torch.int32, device=context.device)
    target = torch.empty_like(source)

    def best(call: Callable[[], object], nbytes: int) -> float:
        return max(nbytes / timed([call], context.device).seconds for _ in range(_TRIES))

    return {
        "copy_bytes_per_s": best(lambda: torch.add(source, 1, out=target), 2 * source.nbytes),
        "read_bytes_per_s": best(source.amax, source.nbytes),
    }


def _matmul_rate(context: Context) -> float:
    """Floating-point operations per second of a square product of random bfloat16 numbers."""
    a, b, out = _factors(context.device)
    return 2 * len(a) ** 3 / timed([lambda: torch.mm(a, b, out=out)], context.device).seconds


def _factors(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Two square matrices, and room for their product."""
    size = _SIZE if device.type == "cuda" else 256
    a, b = (torch.randn(size, size, device=device).to(torch.bfloat16) for _ in range(2))
    return a, b, torch.empty_like(a)
