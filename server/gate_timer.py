"""How long a gate takes: on a CPU by the clock, on a GPU from where the device begins with it.

On a GPU the blocks in front of a gate still run when the host asks it: what the host waits for their sake is theirs.
"""

from collections.abc import Callable

import torch


class GateTimer:
    """Times one gate, from its making to `seconds`."""

    def __init__(
        self, device: torch.device, clock: Callable[[], float], captured: Callable[[], float]
    ) -> None:
        """`clock` gives seconds and stands still while CUDA graphs are captured, `captured` the seconds that took."""
        self._clock, self._captured = clock, captured
        self._began, self._captured_before = clock(), captured()
        self._device = device
        self._start = _mark(device)

    def seconds(self) -> float:
        """Seconds since the timer was made; on a GPU all that was asked of it must be done."""
        end = _mark(self._device)
        if self._start is None or end is None:
            return self._clock() - self._began
        end.synchronize()
        taken = float(self._start.elapsed_time(end)) / 1e3
        return max(0.0, taken - (self._captured() - self._captured_before))


def _mark(device: torch.device) -> torch.cuda.Event | None:
    """An event on the device's stream, None on a CPU."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call] # torch does not annotate it
    event.record(torch.cuda.current_stream(device))
    return event
