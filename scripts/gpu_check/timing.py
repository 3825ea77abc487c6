"""The time of calls on a device, taken as the search for fast launches takes it."""

from exeunt.kernels.timing import L2_BYTES, Calls, Timing, between_events, copies, timed

__all__ = ["L2_BYTES", "Calls", "Timing", "between_events", "copies", "timed"]
