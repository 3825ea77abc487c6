"""Small tensors on their way between host and device: sent without waiting, fetched with one wait.

Copies wait for nothing where the host's side is pinned. PyTorch's allocator of pinned memory notes on which stream a
tensor was last copied, and gives its memory to nobody else before that copy is done: a tensor may be dropped at once,
but not be written again.
"""

import numpy as np
import torch
from torch import Tensor


def staged(values: np.ndarray, device: torch.device) -> Tensor:
    """The values on the host, from where a copy to `device` waits for nothing."""
    host = torch.from_numpy(values)
    return host.pin_memory() if device.type == "cuda" else host


def sent(values: np.ndarray, device: torch.device) -> Tensor:
    """The values on `device`, without waiting for it."""
    return staged(values, device).to(device, non_blocking=True)


def integers_on_host(count: int, device: torch.device) -> Tensor:
    """`count` zeros of int64 on the host, to be filled and then sent to `device`."""
    return torch.zeros(count, dtype=torch.int64, pin_memory=device.type == "cuda")


class Fetch:
    """A tensor's copy on its way to the host: begun when this is made, behind all that its device was asked before."""

    def __init__(self, tensor: Tensor) -> None:
        self._there: torch.cuda.Event | None = None
        if tensor.device.type != "cuda":
            self._host = tensor.clone()
            return
        self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._host.copy_(tensor, non_blocking=True)
        self._there = torch.cuda.Event()  # type: ignore[no-untyped-call] # torch does not annotate it
        self._there.record(torch.cuda.current_stream(tensor.device))

    def wait(self) -> Tensor:
        """The copy, waited for; not for what the device was asked since."""
        if self._there is not None:
            self._there.synchronize()
        return self._host


def fetched(tensor: Tensor) -> Tensor:
    """A copy of `tensor` on the host; the device is waited for once."""
    return Fetch(tensor).wait()
