"""How much memory can still be had: what sizes the KV cache, decides what is streamed, and refuses what cannot be."""

import os
from pathlib import Path
from typing import Final

import torch

_MEMINFO: Final = Path("/proc/meminfo")
_CGROUP: Final = Path("/sys/fs/cgroup")  # of a container: version 2, the container's own at the root


def free_bytes(device: torch.device) -> int:
    """Bytes that can be had on `device` now: of a GPU, or of the machine within its container's limit."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    limits = [_machine_bytes(), _container_bytes()]
    return min(limit for limit in limits if limit is not None)


def _machine_bytes() -> int:
    """What the kernel expects to be able to give, caches that it would drop included."""
    try:
        for line in _MEMINFO.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _container_bytes() -> int | None:
    """What is left of the container's limit; None where there is none."""
    try:
        limit = int((_CGROUP / "memory.max").read_text(encoding="ascii"))
        used = int((_CGROUP / "memory.current").read_text(encoding="ascii"))
        pairs = (line.split() for line in (_CGROUP / "memory.stat").read_text(encoding="ascii").splitlines())
        droppable = next((int(value) for name, value in pairs if name == "inactive_file"), 0)
    except (OSError, ValueError):  # no such file, or "max"
        return None
    return max(0, limit - used + droppable)


def named(device: torch.device) -> str:
    """Whose memory that is, in a sentence."""
    return "this machine" if device.type == "cpu" else str(device)
