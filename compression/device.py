"""The devices that models run on, by the names that people give."""

import re
from typing import Final

import torch

NAMES: Final = "auto, cpu, cuda or cuda:N"
_NAME: Final = re.compile(r"auto|cpu|cuda(:(?P<index>\d{1,4}))?")


class DeviceError(ValueError):
    """A device that is not there; the message is the second half of a sentence that begins with its name."""


def find_device(name: str) -> torch.device:
    """The device called `name`; "auto" is a CUDA device where there is one. Raises DeviceError.

    A CUDA device becomes this thread's current one: Triton launches kernels there, whatever their tensors say.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise DeviceError(f"it must be {NAMES}")
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda" if found else "cpu")
    if name == "cpu":
        return torch.device("cpu")
    if int(match["index"] or 0) >= found:
        count = (
            f"{found} CUDA device{'' if found == 1 else 's'}, counted from 0" if found else "no CUDA device"
        )
        raise DeviceError(
            f"PyTorch finds {count} on this machine, use {'one of those' if found else 'cpu or auto'}"
        )
    if match["index"] is not None:
        torch.cuda.set_device(int(match["index"]))
    return torch.device(name)
