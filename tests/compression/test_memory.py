"""Free memory: the machine's within its container's limit."""

from pathlib import Path

import pytest
import torch

from exeunt.compression import memory

CPU = torch.device("cpu")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    (tmp_path / "meminfo").write_text("MemFree: 1 kB\nMemAvailable:   1000 kB\nSwapFree: 5 kB\n")
    return tmp_path


def container(folder: Path, limit: str) -> None:
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text("600000\n")
    (folder / "memory.stat").write_text("anon 500000\ninactive_file 50000\n")


def test_what_the_kernel_could_give_counts(machine: Path) -> None:
    assert memory.free_bytes(CPU) == 1_024_000


@pytest.mark.parametrize(("limit", "free"), [("max", 1_024_000), ("800000", 250_000), ("500000", 0)])
def test_a_container_limits_it(machine: Path, limit: str, free: int) -> None:
    container(machine, limit)
    assert memory.free_bytes(CPU) == free


def test_a_system_without_the_kernels_files_has_memory_too(machine: Path) -> None:
    (machine / "meminfo").unlink()
    assert memory.free_bytes(CPU) > 0
