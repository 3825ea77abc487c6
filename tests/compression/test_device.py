"""Which device a name means, and what is said where there is no GPU that PyTorch can use."""

import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from exeunt.compression import device
from exeunt.compression.device import DeviceError, find_device

TOO_OLD = (
    "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver by downloading "
    "and installing a new version from the URL: http://www.nvidia.com/Download/index.aspx Alternatively, go to: "
    "https://pytorch.org to install a PyTorch version that has been compiled with your version of the CUDA driver."
)


@pytest.fixture(autouse=True)
def _told_anew() -> Iterator[None]:
    device._tell_unused.cache_clear()
    yield
    device._tell_unused.cache_clear()


def _no_gpu(monkeypatch: pytest.MonkeyPatch, built_for: str | None, said: str | None) -> None:
    """A PyTorch for that CUDA which finds no device; `said` is why."""

    def available() -> bool:
        warnings.warn("CUDA initialization: " + (said or ""), stacklevel=2)
        return False

    def init() -> None:
        if said is not None:
            raise RuntimeError(said)

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.version, "cuda", built_for)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", available)
    monkeypatch.setattr(torch.cuda, "init", init)


def _gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> list[int]:
    """So many devices; what comes back will hold those that were made the current one."""
    current: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    return current


def test_names(monkeypatch: pytest.MonkeyPatch) -> None:
    current = _gpus(monkeypatch, 2)
    assert find_device("auto") == find_device("cuda") == torch.device("cuda")
    assert find_device("cpu") == torch.device("cpu")
    assert find_device("cuda:1") == torch.device("cuda", 1)
    assert current == [1]


@pytest.mark.parametrize(("count", "words"), [(1, "1 CUDA device, counted"), (2, "2 CUDA devices, counted")])
def test_a_number_beyond_the_last(monkeypatch: pytest.MonkeyPatch, count: int, words: str) -> None:
    _gpus(monkeypatch, count)
    with pytest.raises(
        DeviceError, match=f"^PyTorch finds {words} from 0 on this machine, use one of those$"
    ):
        find_device("cuda:7")


def test_what_is_no_name() -> None:
    with pytest.raises(DeviceError, match=r"^it must be auto, cpu, cuda or cuda:N$"):
        find_device("gpu")


@pytest.mark.parametrize(
    ("built_for", "said", "reason"),
    [
        (None, None, " (it is built without CUDA)"),
        (
            "13.0",
            TOO_OLD,
            " (it is built for CUDA 13.0: The NVIDIA driver on your system is too old (found version 11040))",
        ),
        (
            "13.0",
            "Error 804: forward compatibility was attempted\non non supported HW",
            " (it is built for CUDA 13.0: Error 804: forward compatibility was attempted on non supported HW)",
        ),
        ("13.0", "", " (it is built for CUDA 13.0: RuntimeError)"),
        ("13.0", None, ""),
    ],
)
@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_a_gpu_that_is_asked_for_and_not_there(
    monkeypatch: pytest.MonkeyPatch, name: str, built_for: str | None, said: str | None, reason: str
) -> None:
    _no_gpu(monkeypatch, built_for, said)
    with pytest.raises(DeviceError) as caught:
        find_device(name)
    assert str(caught.value) == f"PyTorch finds no CUDA device on this machine{reason}, use cpu or auto"


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder that stands for what an NVIDIA driver leaves in the file system; it is there."""
    sign = tmp_path / "nvidia"
    sign.mkdir()
    monkeypatch.setattr(device, "_NVIDIA_SIGNS", (tmp_path / "nothing", sign))
    return sign


def test_a_gpu_that_auto_passes_over_is_named_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, driver: Path
) -> None:
    _no_gpu(monkeypatch, "13.0", TOO_OLD)
    assert find_device("auto") == find_device("auto") == torch.device("cpu")
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage() == (
        "The CPU is used though there seems to be an NVIDIA GPU: PyTorch finds no CUDA device (it is built for CUDA "
        "13.0: The NVIDIA driver on your system is too old (found version 11040)); give --device cpu where that is "
        "meant."
    )


def test_a_cpu_that_was_meant_is_no_news(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, driver: Path
) -> None:
    _no_gpu(monkeypatch, "13.0", TOO_OLD)
    assert find_device("cpu") == torch.device("cpu")
    for hidden in ("", "-1", "none", "NoDevFiles", "-1,0"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert find_device("auto") == torch.device("cpu")
        device._tell_unused.cache_clear()
    _no_gpu(monkeypatch, None, None)  # a PyTorch for CPUs
    assert find_device("auto") == torch.device("cpu")
    device._tell_unused.cache_clear()
    driver.rmdir()  # a machine without a GPU
    _no_gpu(monkeypatch, "13.0", "Found no NVIDIA driver on your system. Please check that you have one")
    assert find_device("auto") == torch.device("cpu")
    assert not caplog.records
