"""How many processes a machine has room for: by its cores, its free memory and the free memory of its GPU."""

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch

from exeunt.compression.memory import free_bytes
from scripts.gpu_check.report import Context

_CPU_MAX: Final = Path("/sys/fs/cgroup/cpu.max")  # of a container: microseconds of cores in each period


@dataclass(frozen=True, slots=True)
class Bound:
    """So many processes at once, and of what there were so many."""

    at_once: int
    cores: int
    host_free_bytes: int
    gpu_free_bytes: int | None

    def as_dict(self) -> dict[str, Any]:
        """For the JSON."""
        return asdict(self)


def bound(context: Context, wanted: int, host_bytes: float, gpu_bytes: float) -> Bound:
    """At most `wanted` processes, each of which takes a core and so many bytes; at least one."""
    cores, host = usable_cores(), free_bytes(torch.device("cpu"))
    fit = [wanted, cores, int(host / host_bytes)]
    gpu = free_bytes(context.device) if context.cuda else None
    if gpu is not None:
        fit.append(int(gpu / gpu_bytes))
    return Bound(max(1, min(fit)), cores, host, gpu)


def usable_cores() -> int:
    """Cores that this process may use at once, within its container's limit."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = _CPU_MAX.read_text(encoding="ascii").split()
        return max(1, min(cores, round(int(quota) / int(period))))
    except (OSError, ValueError):  # no such file, or "max"
        return cores
