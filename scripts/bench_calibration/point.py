"""One calibration in a process of its own: what it took, as JSON on standard output.

`python -m scripts.bench_calibration.point '{"model": …}'`, with the fields of `Point`.
"""

import json
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from exeunt.calibration.options import CalibrationOptions
from exeunt.calibration.pipeline import calibrate
from exeunt.calibration.presets import PRESETS, StudySizes
from exeunt.calibration.progress import Advance
from exeunt.kernels.native.library import native_library

STATUS: Final = Path("/proc/self/status")
EVERY_S: Final = 0.005
ANONYMOUS: Final = "RssAnon"
BRIEF_STUDIES: Final = StudySizes(weights=1_000, kv=1_000, losses=0, ranks=False, generation=None)
KINDS: Final = {ANONYMOUS: "anonymous", "RssFile": "mapped_files", "RssShmem": "shared", "VmRSS": "resident"}


@dataclass(frozen=True, slots=True)
class Point:
    """A calibration to measure. `stream_weights` None leaves that to the free memory, as `exeunt calibrate` does.

    `journal` keeps finished steps in files, as `exeunt calibrate` does for large models. `brief` trains for a short
    time and compares on little text: what is in memory is the same.
    """

    model: str
    data: str
    tokens: int
    least_tokens: int
    row_tokens: int
    batch_tokens: int
    stream_weights: bool | None
    journal: bool
    brief: bool


def measured(point: Point) -> dict[str, Any]:
    """Seconds and peak bytes of calibrating `point`, in all and by phase."""
    native_library()  # compiled once on a machine: no part of what is measured
    with tempfile.TemporaryDirectory(prefix="exeunt-bench-") as folder:
        options = options_of(point, Path(folder))
        with MemoryWatch() as watch:
            began = time.perf_counter()
            calibrate(options, WatchedPhases(watch))
            seconds = time.perf_counter() - began
        bundle_bytes = sum(file.stat().st_size for file in options.out.iterdir())
    return {
        "seconds": seconds,
        "before": watch.phases[1]["begins_with"],  # imported, text read, kernels compiled
        "peak": watch.peak(),
        "peak_resident_by_kernel": memory({"VmHWM": "bytes"})["bytes"],
        "phases": watch.phases,
        "bundle_bytes": bundle_bytes,
    }


def options_of(point: Point, folder: Path) -> CalibrationOptions:
    """The calibration of `point`, which writes into `folder`; every time is measured there and then."""
    asked: dict[str, Any] = {**PRESETS["quick"], "studies": BRIEF_STUDIES} if point.brief else {}
    asked |= {
        "model": point.model,
        "data": point.data,
        "out": folder / "bundle",
        "tokens": point.tokens,
        "least_tokens": point.least_tokens,
        "row_tokens": point.row_tokens,
        "batch_tokens": point.batch_tokens,
        "stream_weights": point.stream_weights,
        "device": "cpu",
        "work": folder / "work" if point.journal else None,
        "costs": "now",
    }
    return CalibrationOptions(**asked)


def memory(kinds: Mapping[str, str] = KINDS) -> dict[str, int]:
    """Bytes of this process now, by kind, as the kernel counts them."""
    lines = (line.split() for line in STATUS.read_text(encoding="ascii").splitlines())
    return {kinds[words[0][:-1]]: int(words[1]) * 1024 for words in lines if words and words[0][:-1] in kinds}


class MemoryWatch:
    """A thread that looks at this process's memory all the time; `phases` has each phase's seconds and peaks."""

    def __init__(self) -> None:
        self.phases: list[dict[str, Any]] = []
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> "MemoryWatch":
        self.begin("beginning")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def begin(self, phase: str) -> None:
        """From now on it is `phase`."""
        now = memory()
        for earlier in self.phases[-1:]:
            _raise_to(earlier["peak"], now)
        self.phases.append({"phase": phase, "seconds": 0.0, "begins_with": now, "peak": dict(now)})

    def peak(self) -> dict[str, int]:
        """The largest of each kind."""
        return {kind: max(phase["peak"][kind] for phase in self.phases) for kind in KINDS.values()}

    def _look(self) -> None:
        last = time.perf_counter()
        while not self._done.is_set():
            phase = self.phases[-1]
            _raise_to(phase["peak"], memory())
            now = time.perf_counter()
            phase["seconds"] += now - last
            last = now
            self._done.wait(EVERY_S)


def _raise_to(peak: dict[str, int], now: Mapping[str, int]) -> None:
    for kind, size in now.items():
        peak[kind] = max(peak[kind], size)


class WatchedPhases:
    """A progress report that tells the watch which phase it is."""

    def __init__(self, watch: MemoryWatch) -> None:
        self._watch = watch

    @contextmanager
    def phase(self, title: str, total: int) -> Iterator[Advance]:
        """A phase by its name without its number; what comes behind it is a phase of its own."""
        name = title.split(": ", 1)[-1]
        self._watch.begin(name)
        yield lambda _units: None
        self._watch.begin(f"after {name[:1].lower()}{name[1:]}")

    def note(self, message: str) -> None:
        """Written to standard error, where a person may follow."""
        print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    print(json.dumps(measured(Point(**json.loads(sys.argv[1])))))
