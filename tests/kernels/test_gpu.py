"""When the Triton kernels run on a GPU, and the line that says why where they do not: no GPU is needed to see it."""

import contextlib
import logging
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from exeunt.kernels import gpu

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
TOLD = "The Triton kernels are not used on cuda:0, PyTorch runs instead: "
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _asked_anew() -> Iterator[None]:
    """What was found of one test's devices is no other test's."""
    gpu._runs_on.cache_clear()
    yield
    gpu._runs_on.cache_clear()


@pytest.fixture
def fitting(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A GPU on which nothing keeps the kernels from running; tests take one thing away."""
    pytest.importorskip("triton")
    monkeypatch.delenv("EXEUNT_TRITON", raising=False)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(gpu, "_trial_is_right", lambda device: True)
    return monkeypatch


def _raising(error: Exception) -> Callable[..., Any]:
    def fail(*_: object) -> Any:
        raise error

    return fail


def _reason(caplog: pytest.LogCaptureFixture) -> str:
    """What the one warning says, that the kernels do not run; asked twice, since it is said once."""
    assert not gpu.triton_runs(CUDA)
    assert not gpu.triton_runs(CUDA)
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith(TOLD)
    return record.getMessage().removeprefix(TOLD)


def test_a_cpu_has_kernels_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not gpu.triton_runs(CPU)
    assert not gpu.triton_runs(torch.device("meta"))
    monkeypatch.setattr(gpu, "interpreted", True)
    assert gpu.triton_runs(CPU)


def test_where_nothing_is_missing_they_run(
    fitting: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert gpu.triton_runs(CUDA)
    assert gpu.triton_runs(torch.device("cuda"))
    assert not caplog.messages


def test_each_gpu_is_tried_once_and_as_the_current_one(fitting: pytest.MonkeyPatch) -> None:
    current: list[int] = []
    tried: list[tuple[str, list[int]]] = []

    @contextlib.contextmanager
    def entered(index: int) -> Iterator[None]:
        current.append(index)
        yield
        current.pop()

    def trial(device: torch.device) -> bool:
        tried.append((str(device), list(current)))
        return True

    fitting.setattr(torch.cuda, "device", entered)
    fitting.setattr(gpu, "_trial_is_right", trial)
    for index in (0, 1, 1, 0):
        assert gpu.triton_runs(torch.device("cuda", index))
    assert tried == [("cuda:0", [0]), ("cuda:1", [1])]


def test_they_can_be_turned_off_without_a_word(
    fitting: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fitting.setenv("EXEUNT_TRITON", "0")
    fitting.setattr(gpu, "_trial_is_right", _raising(AssertionError("launched")))
    assert not gpu.triton_runs(CUDA)
    assert not caplog.messages


def test_other_makers_gpus(fitting: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    fitting.setattr(torch.version, "hip", "6.4")
    assert _reason(caplog) == "they are written for NVIDIA GPUs"


def test_gpus_that_are_too_old(fitting: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    fitting.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    assert _reason(caplog) == "GPU 0 has compute capability 7.5, they need 8.0"


def test_no_triton(fitting: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    fitting.setattr("importlib.util.find_spec", lambda name: None)
    assert _reason(caplog) == "the package triton is not installed"


@pytest.mark.parametrize("version", ["3.5.1", "2.1.0", "3.5.0+git1234"])
def test_a_triton_that_is_too_old(
    fitting: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, version: str
) -> None:
    fitting.setattr("triton.__version__", version)
    assert _reason(caplog) == f"the package triton is {version}, they need 3.6 or newer"


def test_a_triton_that_does_not_say_its_version(
    fitting: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fitting.setattr("triton.__version__", "main")
    assert _reason(caplog) == "the package triton is of no version that is known, they need 3.6 or newer"


@pytest.mark.parametrize("version", ["3.6.0", "3.10.0+git1234", "4.0.0"])
def test_newer_tritons_are_tried(fitting: pytest.MonkeyPatch, version: str) -> None:
    fitting.setattr("triton.__version__", version)
    assert gpu.triton_runs(CUDA)


def test_the_oldest_triton_is_the_one_that_the_package_asks_for() -> None:
    bounds = set(re.findall(r'"triton>=([\d.]+);', (ROOT / "pyproject.toml").read_text(encoding="utf-8")))
    assert bounds == {".".join(str(part) for part in gpu.OLDEST_TRITON)}


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            RuntimeError("Failed to find C compiler. Please specify via CC environment variable."),
            "RuntimeError: Failed to find C compiler. Please specify via CC environment variable.",
        ),
        (
            RuntimeError("Triton Error [CUDA]: device kernel image is invalid\nmore"),
            "RuntimeError: Triton Error [CUDA]: device kernel image is invalid",
        ),
        (
            subprocess.CalledProcessError(1, ["gcc", "main.c"]),
            "CalledProcessError: Command '['gcc', 'main.c']' returned non-zero exit status 1.",
        ),
        (AssertionError("libcuda.so cannot found!\nhints"), "AssertionError: libcuda.so cannot found!"),
        (ImportError("libtriton.so"), "ImportError: libtriton.so"),
        (PermissionError(13, "Permission denied", "/cache"), "PermissionError: [Errno 13] Permission denied: '/cache'"),
        (ValueError(), "ValueError"),
        (ValueError("x" * 1000), f"ValueError: {'x' * 300}"),
    ],
)  # fmt: skip
def test_a_first_launch_that_fails(
    fitting: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception, said: str
) -> None:
    fitting.setattr(gpu, "_trial_is_right", _raising(error))
    fitting.setattr(gpu, "check_answers", lambda device: None)
    with caplog.at_level(logging.DEBUG):
        assert _reason(caplog) == f"a first launch failed ({said})"
    (traceback,) = [record for record in caplog.records if record.levelno == logging.DEBUG]
    assert traceback.exc_info is not None


def test_a_triton_that_cannot_be_imported(
    fitting: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fitting.setattr("importlib.util.find_spec", lambda name: object())
    fitting.setitem(sys.modules, "triton", None)
    fitting.setattr(gpu, "check_answers", lambda device: None)
    assert _reason(caplog).startswith("a first launch failed (ModuleNotFoundError: import of triton halted")


def test_a_first_launch_that_computes_nonsense(
    fitting: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fitting.setattr(gpu, "_trial_is_right", lambda device: False)
    assert _reason(caplog) == "a first launch computed something else than PyTorch does"


def test_a_gpu_that_answers_nobody_is_no_fallback(fitting: pytest.MonkeyPatch) -> None:
    lost = RuntimeError("CUDA error: an illegal memory access was encountered")
    fitting.setattr(gpu, "_trial_is_right", _raising(RuntimeError("Triton Error [CUDA]")))
    fitting.setattr(torch.cuda, "synchronize", _raising(lost))
    for _ in range(2):  # not remembered as if it had been found out
        with pytest.raises(RuntimeError, match="illegal memory access"):
            gpu.triton_runs(CUDA)


def test_the_trial_itself_under_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("on a GPU it is run there")
    from exeunt.kernels.rows import triton as rows
    from tests.kernels.triton.on_gpu import patch_language_once

    patch_language_once(monkeypatch)
    assert gpu._launch_failure(CPU) is None
    right = rows.rms_norm_triton
    monkeypatch.setattr(rows, "rms_norm_triton", lambda *given: right(*given) * 1.001)
    assert gpu._launch_failure(CPU) == "a first launch computed something else than PyTorch does"
    monkeypatch.setattr(rows, "rms_norm_triton", lambda *given: right(*given) * float("nan"))
    assert gpu._launch_failure(CPU) == "a first launch computed something else than PyTorch does"
    monkeypatch.setattr(rows, "rms_norm_triton", _raising(RuntimeError("no compiler")))
    assert gpu._launch_failure(CPU) == "a first launch failed (RuntimeError: no compiler)"


@pytest.mark.gpu
def test_the_kernels_run_on_the_gpu_that_is_here() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    assert gpu._missing(0) is None


def test_a_device_that_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu.check_answers(CPU)
    monkeypatch.setattr(torch, "ones", lambda *size, device: torch.zeros(*size, device=device))
    with pytest.raises(RuntimeError, match=r"^cpu adds eight ones up to 0\.0: the device or its driver"):
        gpu.check_answers(CPU)


def test_tensors_of_several_devices() -> None:
    here, there = torch.zeros(2), torch.zeros(2, device="meta")
    gpu.check_one_device("a and b", here, here)
    gpu.check_one_device("a and b", there, there)
    with pytest.raises(ValueError, match=r"^a, b and c are on cpu, cpu, meta, expected one device$"):
        gpu.check_one_device("a, b and c", here, here, there)
