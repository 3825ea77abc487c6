"""What captured CUDA graphs share: one pool of memory, one stream to be captured on, and limits.

Graphs of one pool must not run at the same time: what one leaves in the pool's memory, beside its results, the next one
overwrites. A server's graphs all run one after the other, on the stream of the thread that runs ticks.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

import torch

from exeunt.kernels.gpu import check_answers

ROWS: Final = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128)
"""Numbers of rows that graphs of row-wise functions are captured for."""
TOKENS: Final = (*ROWS, 192, 256, 320, 384, 448, 512)
"""Numbers of tokens that graphs of blocks are captured for: a batch takes the next one up, a larger batch none.

Beyond that a pass keeps the device busy for about as long as the host takes to launch it operation by operation.
"""
SPARE_MEMORY: Final = 0.02
"""The share of the device's memory that captures leave free: passes without graphs need room too."""

MOST_MEMORY: Final = 0.1
"""The share of the device's memory that graphs may take: they keep it, whether they are met again or not."""
ASKED_AGAIN: Final = 256
"""Captures that are refused unseen after one for which there was no memory: asking the driver costs more than many a
pass."""

Result = TypeVar("Result")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Captured(Generic[Result]):
    """A captured run: `replay` does it again, over the same tensors, and leaves it in the same `result`."""

    replay: Callable[[], None]
    result: Result
    nbytes: int  # of device memory that the pool grew by


def size_for(tokens: int, sizes: Sequence[int] = TOKENS) -> int | None:
    """The number of tokens, of ascending `sizes`, that a graph for so many is captured for; None for none and for too
    many."""
    return next((size for size in sizes if size >= tokens), None) if tokens > 0 else None


class GraphPool:
    """Captures runs on one GPU, and counts what that took."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream: Any = None  # a torch.cuda.Stream: memory is shared among captures on one stream
        self._handle: Any = None  # what `torch.cuda.graph_pool_handle` gives
        self._told = False  # that no more graphs are captured
        self._broken = False  # a capture was cut off, and PyTorch's allocator may not take another
        self._cut_off: list[Any] = []  # torch.cuda.CUDAGraph: the allocator may still point at them
        self._refused = 0  # captures that are refused unseen
        self._segments = 0  # bytes of the allocator's memory that no pass without a graph gets
        self._count = 0
        self._nbytes = 0
        self._seconds = 0.0

    @property
    def count(self) -> int:
        """Graphs captured so far."""
        return self._count

    @property
    def nbytes(self) -> int:
        """Bytes of device memory that graphs take, with the tensors that they read and leave."""
        return self._nbytes

    @property
    def seconds(self) -> float:
        """Seconds that captures have taken so far, the compiling of kernels that were new to them included."""
        return self._seconds

    def forget(self) -> None:
        """What was captured so far is let go of: what comes now counts anew, in memory of its own."""
        self._stream = self._handle = None
        self._told, self._count, self._nbytes = self._broken, 0, 0
        self._refused = self._segments = 0

    def note(self, nbytes: int) -> None:
        """Count tensors that graphs read or leave, made outside of a capture."""
        self._nbytes += nbytes

    def may_capture(self, kept: int, most: int) -> bool:
        """Whether whoever keeps `kept` graphs of at most `most` may have one more; a warning says when that is over."""
        if self._broken:
            return False
        if kept >= most:
            self._tell(f"no more than {most} of a kind are kept")
            return False
        if self._refused:
            self._refused -= 1
            return False
        lacking = self._lacking()
        if lacking is not None:
            self._refused = ASKED_AGAIN
            self._tell(lacking)
        return lacking is None

    def _lacking(self) -> str | None:
        """Why there is no memory for one more graph, None where there is."""
        free, total = self._memory()
        if self._nbytes >= MOST_MEMORY * total:
            return f"they take {self._nbytes} of {total} bytes"
        return f"{free} of {total} bytes are free" if free < SPARE_MEMORY * total else None

    def _tell(self, why: str) -> None:
        """Say once that sizes not yet met run without graphs from now on."""
        if not self._told:
            self._told = True
            _log.warning(
                "%d CUDA graphs are captured and %s: passes of sizes not yet met run without",
                self._count,
                why,
            )

    def capture(
        self, name: str, before: Callable[[], object], run: Callable[[], Result]
    ) -> Captured[Result] | None:
        """`run` captured, after one run of it that compiles what is new; None where that fails, and a line in the log.

        `before` comes first and makes what `run` reads, which must stay where it is. `run` may wait for nothing and
        copy nothing from the host. `name` says in the log what it is. Want of memory, of registers, or of a way to
        capture what `run` does is a warning; what else fails is an error with its traceback, after which the device
        must still answer: raises RuntimeError where it does not. A capture that the driver cuts off is the last: not
        every PyTorch can make another in that process.
        """
        began = time.perf_counter()
        try:
            before()
            captured = self._record(run)
        except _capture_errors() as error:
            cause = _cause(error)
            reason = str(cause).split("\n", 1)[0]
            if _is_want_of_room(cause) or _is_of_capturing(cause):
                _log.warning(
                    "A CUDA graph of %s cannot be captured, such passes run without: %s", name, reason
                )
            else:
                _log.error(
                    "Capturing a CUDA graph of %s met a fault, such passes run without: %s",
                    name,
                    f"{type(cause).__name__}: {reason}",
                    exc_info=error,
                )
                check_answers(self.device)
            if _is_of_capturing(error):
                self._give_up()
            return None
        finally:
            self._seconds += time.perf_counter() - began
        self._count += 1
        self._nbytes += captured.nbytes
        return captured

    def _give_up(self) -> None:
        """Capture no more: what a capture that was cut off left of itself in PyTorch's allocator stays there."""
        self._told, self._broken = False, True
        self._tell("the driver cut one off")
        if self.device.type == "cuda" and self._handle is not None:
            # else passes without graphs would not be given what the allocator keeps when memory runs out
            with torch.cuda.device(self.device):
                index = torch.cuda.current_device()
            try:
                torch._C._cuda_endAllocateToPool(index, self._handle)
            except Exception:  # noqa: BLE001 - a PyTorch that has ended it itself refuses, another may not know the call
                _log.debug("PyTorch's allocator was not told that a capture is over.", exc_info=True)

    def _memory(self) -> tuple[int, int]:
        """Bytes of the device that are free for passes without graphs, what PyTorch keeps for them among it, and all.

        What graphs' memory has free is theirs alone; that is not told apart from what they use of it.
        """
        free, total = torch.cuda.mem_get_info(self.device)
        kept = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return free + max(0, kept - self._segments), total

    def _record(self, run: Callable[[], Result]) -> Captured[Result]:
        """Run once, then once more into a graph, and that once: what a first launch still takes must be there."""
        device = self.device
        with torch.inference_mode(), torch.cuda.device(device):
            if self._stream is None:
                self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call] # torch does not annotate it
                self._handle = torch.cuda.graph_pool_handle()
            current = torch.cuda.current_stream(device)
            self._stream.wait_stream(current)
            # entered here, so that it is left again where a capture fails at its end, which `graph` does not see to
            with torch.cuda.stream(self._stream):
                run()  # compiles what has not run yet, which a capture does not allow
                torch.cuda.synchronize(device)
                torch.cuda.empty_cache()  # a capture does it anyway, and would hide what it takes
                before = torch.cuda.memory_reserved(device)
                graph = torch.cuda.CUDAGraph()
                try:
                    with torch.cuda.graph(
                        graph, pool=self._handle, stream=self._stream, capture_error_mode="thread_local"
                    ):
                        result = run()
                    graph.replay()
                    torch.cuda.synchronize(device)
                except Exception:
                    self._cut_off.append(graph)
                    self._nbytes += self._grown(before)
                    raise
            current.wait_stream(self._stream)
        return Captured(graph.replay, result, self._grown(before))

    def _grown(self, before: int) -> int:
        """Bytes that a capture took, which had so many reserved before: they stay the graphs'."""
        grown = max(0, torch.cuda.memory_reserved(self.device) - before)
        self._segments += grown
        return grown


def _capture_errors() -> tuple[type[Exception], ...]:
    """What a capture fails with: PyTorch's errors and the driver's, and Triton's own where Triton is there."""
    try:
        from triton.errors import TritonError
    except ImportError:
        return (RuntimeError,)
    return RuntimeError, TritonError


def _cause(error: Exception) -> Exception:
    """What broke a capture: its end fails too then, and says no more than that something did before."""
    before = error.__context__
    return before if _is_of_capturing(error) and isinstance(before, Exception) else error


def _is_want_of_room(error: Exception) -> bool:
    """Whether memory ran out, in PyTorch, in Triton or in the driver, or what one program of a kernel may have."""
    if isinstance(error, torch.OutOfMemoryError) or type(error).__name__ == "OutOfResources":
        return True
    first = str(error).split("\n", 1)[0]
    return isinstance(error, RuntimeError) and ("out of memory" in first or "ALLOC_FAILED" in first)


def _is_of_capturing(error: Exception) -> bool:
    """Whether the driver or PyTorch refuses to capture: their messages alone tell, all of which say so."""
    return isinstance(error, RuntimeError) and "captur" in str(error).split("\n", 1)[0]
