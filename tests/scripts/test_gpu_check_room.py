"""What the GPU check makes of small devices and machines: what has no room is named, and the rest goes on."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from exeunt.deploy.load_driver import LoadError
from scripts.gpu_check import bounds, decode_speeds, end_to_end, engine_speeds, kernel_speeds, machine, room
from scripts.gpu_check.kernel_case import Case
from scripts.gpu_check.models import LLAMA, MISTRAL, TOY
from scripts.gpu_check.parts import Part, run_parts
from scripts.gpu_check.report import Context
from tests.scripts.toy_gpu_check import CPU, toy_context

CUDA = torch.device("cuda", 0)


@contextmanager
def _free(monkeypatch: pytest.MonkeyPatch, nbytes: float) -> Iterator[None]:
    """A GPU with so many bytes free."""
    with monkeypatch.context() as patched:
        patched.setattr(room, "free_bytes", lambda device: int(nbytes))
        patched.setattr(torch.cuda, "empty_cache", lambda: None)
        yield


def _on_gpu(tmp_path: Path) -> Context:
    return replace(toy_context(tmp_path), device=CUDA, quick=False)


def test_weights_are_counted_as_they_are_held() -> None:
    spec = MISTRAL.spec()
    assert room.weight_bytes(spec, "full") == pytest.approx(14.5e9, rel=0.01)
    assert room.weight_bytes(spec, "int4") == pytest.approx(4.7e9, rel=0.05)


@pytest.mark.parametrize(
    ("gigabytes", "held"), [(24, ("full", "int4")), (16, ("int4",)), (8, ("int4",)), (6, ())]
)
def test_a_model_is_held_in_the_formats_that_a_card_has_room_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, gigabytes: float, held: tuple[str, ...]
) -> None:
    context, found = _on_gpu(tmp_path), dict[str, Any]()
    with _free(monkeypatch, gigabytes * 1e9):
        assert room.held_formats(context, MISTRAL.spec(), "mistral-7b", found) == held
        assert room.held_formats(context, LLAMA.spec(), "llama-1.1b", {}) == ("full", "int4")
    skipped = found.get("skipped", [])
    assert len(skipped) == 2 - len(held)
    if skipped:
        assert skipped[0] == f"mistral-7b in full and int4 needs 22.2 GB, {gigabytes:.1f} are free"


def test_steps_of_what_is_too_large_leave_the_smaller_ones(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    built: list[tuple[str, ...]] = []

    def decoders(spec: Any, device: Any, dtype: Any, *, formats: tuple[str, ...]) -> dict[Any, Any]:
        built.append(formats)
        return {(each, False): SimpleNamespace(spec=spec) for each in formats}

    def step(context: Context, decoder: Any, kv: str, sequences: int, tokens: int) -> dict[str, float]:
        if sequences == 16 and kv == "int4":
            raise torch.OutOfMemoryError("CUDA out of memory.\nMore")
        return {"ms": 1.0}

    monkeypatch.setattr(decode_speeds, "random_decoders", decoders)
    monkeypatch.setattr(decode_speeds, "_step", step)
    found: dict[str, Any] = {}
    with _free(monkeypatch, 16e9):
        decode_speeds.run(_on_gpu(tmp_path), found)
    assert built == [("int4",), ("full", "int4")]
    assert {row["weights"] for row in found["steps"] if row["model"] == "mistral-7b"} == {"int4"}
    assert {row["weights"] for row in found["steps"] if row["model"] == "llama-1.1b"} == {"full", "int4"}
    assert "mistral-7b int4/int4 16 x 4096: CUDA out of memory." in found["skipped"]
    assert any(line.startswith("mistral-7b int4/int4 16 x 16384") for line in found["skipped"])


def test_kernels_of_which_the_buffers_do_not_fit_are_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    timed: list[str] = []

    def note(context: Context, case: Case, count: int) -> dict[str, Any]:
        timed.append(case.name)
        return {}

    monkeypatch.setattr(kernel_speeds, "_timed", note)
    monkeypatch.setattr(kernel_speeds, "_choose_freely", lambda context, found: None)
    monkeypatch.setattr(kernel_speeds, "triton_runs", lambda device: False)
    monkeypatch.setattr(kernel_speeds, "cache_bytes", lambda device: 2**26)
    found: dict[str, Any] = {}
    with _free(monkeypatch, 4e9):
        kernel_speeds.run(_on_gpu(tmp_path), found)
    largest = "paged_attention kv=full sequences=64 context=16384"
    assert any(line.startswith(f"{largest} needs 10.1 GB") for line in found["skipped"])
    assert largest not in timed
    assert "paged_attention kv=full sequences=1 context=512" in timed


def test_a_random_model_without_room_is_none_and_one_of_int4_alone_offers_less(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with _free(monkeypatch, 1e9):
        found: dict[str, Any] = {}
        assert end_to_end.random_model(_on_gpu(tmp_path), found, MISTRAL) is None
        assert len(found["skipped"]) == 2
    model = end_to_end.random_model(toy_context(tmp_path), {}, TOY, formats=("int4",))
    assert model is not None
    offered = end_to_end.offered(model, end_to_end.RANDOM_MODES, found)
    assert "int4/int4" in offered
    assert "full/full" not in offered


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory.\nMore"), LoadError("too small")]
)
def test_a_part_that_finds_too_little_memory_is_named_and_not_broken(
    tmp_path: Path, error: Exception
) -> None:
    def lacks(context: Context, found: dict[str, Any]) -> None:
        raise error

    found: dict[str, Any] = {}
    run_parts(toy_context(tmp_path), found, [Part("large", "large", 1.0, 1.0, lacks)])
    assert found["large"]["skipped"] == [f"large: {str(error).splitlines()[0]}"]
    assert "broken" not in found


def test_other_errors_than_of_memory_are_raised(tmp_path: Path) -> None:
    found: dict[str, Any] = {}
    with (
        pytest.raises(ValueError, match="other"),
        room.within_memory(toy_context(tmp_path), "it", found, engine_speeds.NO_ROOM),
    ):
        raise ValueError("other")
    assert found == {}


@pytest.mark.parametrize(
    ("cores", "host", "gpu", "at_once"),
    [
        (64, 256e9, 140e9, 12),
        (4, 256e9, 140e9, 4),
        (64, 8e9, 140e9, 5),
        (64, 256e9, 16e9, 5),
        (1, 1e8, 1e8, 1),
    ],
)
def test_processes_are_as_many_as_cores_and_both_memories_allow(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cores: int, host: float, gpu: float, at_once: int
) -> None:
    monkeypatch.setattr(bounds, "usable_cores", lambda: cores)
    monkeypatch.setattr(bounds, "free_bytes", lambda device: int(gpu if device.type == "cuda" else host))
    found = bounds.bound(_on_gpu(tmp_path), 12, 1.5e9, 3e9)
    assert (found.at_once, found.cores, found.gpu_free_bytes) == (at_once, cores, gpu)
    assert bounds.bound(toy_context(tmp_path), 12, 1.5e9, 3e9).gpu_free_bytes is None


def test_a_containers_share_of_the_cores_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    limit = tmp_path / "cpu.max"
    monkeypatch.setattr(bounds, "_CPU_MAX", limit)
    assert bounds.usable_cores() == 16
    for said, cores in (("max 100000", 16), ("250000 100000", 2), ("10000 100000", 1)):
        limit.write_text(said)
        assert bounds.usable_cores() == cores


def test_buffers_of_the_rates_fit_the_free_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[int] = []

    def arange(count: int, **rest: Any) -> torch.Tensor:
        asked.append(count)
        return torch.zeros(4, dtype=torch.int32)

    monkeypatch.setattr(torch, "arange", arange)
    monkeypatch.setattr(machine, "timed", lambda calls, device: SimpleNamespace(seconds=1.0))
    for gigabytes, count in ((140.0, 10**9), (5.0, 5 * 10**8)):
        with _free(monkeypatch, gigabytes * 1e9):
            monkeypatch.setattr(machine, "room", room.room)
            machine._memory_rates(_on_gpu(tmp_path))
        assert asked.pop() == count


def test_clocks_are_those_of_the_own_device_while_work_is_queued(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    properties = SimpleNamespace(uuid="12ab")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: done.append("waited"))
    monkeypatch.setattr(machine, "_factors", lambda device: (torch.ones(2, 2),) * 3)
    monkeypatch.setattr(torch, "mm", lambda a, b, out: done.append("queued"))

    def run(said: list[str], **rest: Any) -> Any:
        done.append(" ".join(said))
        return SimpleNamespace(stdout="1965 MHz, 3201 MHz\n")

    monkeypatch.setattr(subprocess, "run", run)
    assert machine._clocks_under_load(CUDA, 16 / 0.8 * 3) == "1965 MHz, 3201 MHz"
    asked = "nvidia-smi --query-gpu=clocks.sm,clocks.mem --format=csv,noheader -i GPU-12ab"
    assert done == ["queued"] * 3 + [asked, "waited"]


def test_on_a_cpu_there_is_always_room(tmp_path: Path) -> None:
    found: dict[str, Any] = {}
    context = toy_context(tmp_path)
    assert context.device == CPU
    assert room.has_room(context, 1e18, "all", found)
    assert found == {}
