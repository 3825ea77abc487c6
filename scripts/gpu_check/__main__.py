"""The command line: which sections, for how long, where the JSON goes.

Every section has its share of the time, is written down when it ends, and its errors end nothing but itself. Where one
hangs, or leaves the GPU in a state that no later call survives, this process replaces itself by a fresh one that goes
on with the sections that are left.
"""

import faulthandler
import importlib
import os
import shutil
import sys
import tempfile
import threading
import time
import traceback
from argparse import SUPPRESS, ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from scripts.gpu_check.source_tree import make_importable

_BEGAN = time.monotonic()  # what is imported below takes its time too
make_importable()

import torch  # noqa: E402 - what stands above says where `exeunt` is

from exeunt.kernels.tuned.files import slug  # noqa: E402
from scripts.gpu_check.needs import BUNDLE, METRICS, TESTS, missing  # noqa: E402
from scripts.gpu_check.report import Clock, Context, Report  # noqa: E402
from scripts.gpu_check.room import give_back  # noqa: E402
from scripts.gpu_check.table import table  # noqa: E402
from scripts.gpu_check.warming import EXITS, GROUPS, PACKAGED, Warmers  # noqa: E402

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
_GRACE = 20.0  # seconds beyond its time after which a section counts as hanging
_LAST_GRACE = 8.0  # seconds beyond the time of all, after which any does
_END = 16.0  # seconds beyond the time of all, after which the process is ended, whatever it does
_LATE = 10.0  # seconds left under which nothing is begun behind a section that was broken off


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the run: its function as "module:name", and the seconds that are kept for it."""

    function: str
    seconds: float
    least: float  # seconds under which it is not begun
    needs: tuple[str, ...] = ()  # modules beside those of a bare machine
    extra: bool = False  # run only where it is named


SECTIONS = {
    "machine": Section("machine:run", 3, 0),
    "memory": Section("memory:run", 8, 0),
    "correctness": Section("correctness:run", 35, 5),
    "exit_answers": Section("exit_answers:run", 18, 5),
    "tests": Section("kernel_tests:run", 85, 10, TESTS),
    "decode": Section("decode_speeds:run", 24, 8),
    "kernels": Section("kernel_speeds:run", 20, 5),
    "end_to_end": Section("end_to_end:run", 104, 8),
    "long_contexts": Section("long_contexts:run", 22, 12),
    "exits": Section("exits:run", 13, 12),
    "host": Section("host_times:run", 8, 6),
    "compiled": Section("compiled:run", 75, 30),
    "float32": Section("correctness:float32", 60, 10, extra=True),
    "tuning": Section("tuning:run", 45, 10, extra=True),
    "grid": Section("grid:run", 420, 20, extra=True),
}
"""What must hold comes first, then speeds in the order of what they are worth. Each has its seconds for certain, and
what the sections before it did not need: the shares of the first are a little more than they took on an H200."""
DEFAULT = tuple(name for name, section in SECTIONS.items() if not section.extra)
COMPILING = 45.0  # seconds kept for kernels that must stand compiled before the first answer
SECONDS = COMPILING + sum(SECTIONS[name].seconds for name in DEFAULT)
# their kernels are compiled beside what comes first
_WARMED = (
    *("correctness", "exit_answers", "decode", "kernels"),
    *("end_to_end", "long_contexts", "host", "exits"),
)
# answers may be computed while other processes compile: these wait for what they need; nothing is timed beside them
_AWAITED = {"correctness": PACKAGED, "exit_answers": (*PACKAGED, EXITS)}
_FIRST = ("machine", "memory")  # done before anything runs beside


def main(arguments: Sequence[str] | None = None, began: float | None = None) -> int:
    """Check and measure on a GPU; exit status 1 where a check failed, or no time was left for the checks.

    `began` is since when the seconds count (monotonic), None: from now on.
    """
    asked = _asked(arguments)
    until = asked.until or (time.monotonic() if began is None else began) + asked.seconds
    place = torch.device(asked.device)
    if place.type == "cuda" and not torch.cuda.is_available():
        said = "There is no CUDA device that PyTorch can use; --device cpu --quick tries the script itself."
        print(said, file=sys.stderr)
        return 2
    bundle = _bundle(asked.bundle, asked.quick)
    if asked.warm is not None:
        _warm(place, asked.quick, Clock.until(until), asked.warm, bundle)
        return 0
    name = torch.cuda.get_device_name(place) if place.type == "cuda" else str(place)
    path = asked.out or RESULTS / f"gpu-check-{slug(name)}.json"
    report = Report(path, resume=asked.resume)
    context = Context(place, asked.quick, report, Clock.until(until), bundle)
    if not asked.resume:
        lacking = missing(METRICS)
        report.data |= {
            "started": time.strftime("%Y-%m-%dT%H:%M:%S"),
            "seconds_given": asked.seconds,
            "quick": asked.quick,
            "metrics": f"not counted: {', '.join(lacking)} is not installed" if lacking else "counted",
        }
    faulthandler.dump_traceback_later(max(1.0, context.clock.left() + _END), exit=True)
    try:
        with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
            names = [name for name in SECTIONS if name in asked.sections]
            _Run(context, names, Path(folder), resumed=asked.resume).all()
    finally:
        faulthandler.cancel_dump_traceback_later()
    report.data["seconds"] = report.data["seconds_given"] - context.clock.left()
    report.save()
    print(f"written to {path}")
    print(table(report))  # what was not tested is its last line
    return 1 if report.failures else 0


def _asked(arguments: Sequence[str] | None) -> Namespace:
    """The command line. By `argparse`: what typer brings along is not on every machine."""
    parser = ArgumentParser(prog="python -m scripts.gpu_check", description=main.__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--sections", type=_sections, default=DEFAULT, help="which, separated by commas")
    parser.add_argument("--seconds", type=_seconds, default=SECONDS, help="for all of them")
    parser.add_argument("--quick", action="store_true", help="toy sizes, to try the script itself")
    parser.add_argument("--out", type=Path, help="the JSON, else by the GPU's name in benchmarks/results")
    parser.add_argument(
        "--bundle", type=Path, help="of the packaged model, else the cached one, if any and not --quick"
    )
    parser.add_argument("--resume", action="store_true", help=SUPPRESS)
    parser.add_argument("--until", type=float, help=SUPPRESS)
    parser.add_argument("--warm", help=SUPPRESS)
    return parser.parse_args(arguments)


def _sections(said: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in said.split(",") if name.strip())
    if unknown := [name for name in names if name not in SECTIONS]:
        raise ArgumentTypeError(f"there is no section {unknown[0]}; there are {', '.join(SECTIONS)}")
    return names


def _seconds(said: str) -> float:
    with suppress(ValueError):
        if (seconds := float(said)) >= 1:
            return seconds
    raise ArgumentTypeError(f"{said} is not a number of at least 1")


class _Run:
    """The sections in order."""

    def __init__(self, context: Context, names: Sequence[str], folder: Path, *, resumed: bool) -> None:
        self._context, self._names, self._folder, self._resumed = context, list(names), folder, resumed
        self._warmers: Warmers | None = None

    def all(self) -> None:
        """Run them all, each within its time."""
        try:
            while self._names:
                name = self._names.pop(0)
                if name not in _FIRST:
                    self._wait_for_warmers(name)
                found = self._context.report.section(name)
                if lacking := missing(SECTIONS[name].needs):
                    found |= {"status": "needs", "needs": lacking}
                    continue
                if not self._context.fits(SECTIONS[name].least, name, found):
                    found["status"] = "left out"
                    continue
                self._one(name)
        finally:
            if self._warmers is not None:
                self._warmers.stop()

    def _wait_for_warmers(self, name: str) -> None:
        """Start compiling where no section before did; wait for what this section needs compiled, or gone."""
        if self._warmers is None:
            wanted = not self._resumed and bool({name, *self._names}.intersection(_WARMED))
            groups = GROUPS if wanted and self._context.cuda else ()
            self._warmers = Warmers(self._context, self._folder, groups)
        self._warmers.wait(_AWAITED.get(name), self._context.report)

    def _one(self, name: str) -> None:
        section, report = SECTIONS[name], self._context.report
        within = self._context.within(self._seconds(section))
        found = report.section(name)
        found["status"] = "running"
        report.save()
        print(f"[{self._context.clock.left():.0f} s left] {name}", file=sys.stderr)
        patience = min(
            max(1.0, within.clock.left()) + _GRACE, max(1.0, self._context.clock.left()) + _LAST_GRACE
        )
        guard = threading.Timer(patience, self._hung, (name,))
        guard.daemon = True
        guard.start()
        began = time.monotonic()
        try:
            module, attribute = section.function.split(":")
            getattr(importlib.import_module(f"scripts.gpu_check.{module}"), attribute)(within, found)
            found["status"] = "done"
        except torch.OutOfMemoryError as error:
            found["status"] = "left out"
            found.setdefault("skipped", []).append(f"{name}: {error}".partition("\n")[0][:300])
        except Exception as error:  # noqa: BLE001 - the sections behind it are worth having all the same
            traceback.print_exc()
            found |= {"status": "failed", "error": f"{type(error).__name__}: {error}"[:500]}
            found["traceback"] = traceback.format_exc().splitlines()[-8:]
        finally:
            guard.cancel()
            found["seconds"] = round(time.monotonic() - began, 2)
            report.save()
        if found["status"] == "left out":
            give_back(self._context)
        if found["status"] == "failed" and not _device_answers(self._context.device):
            self._go_on_afresh()

    def _seconds(self, section: Section) -> float:
        """What a section may take: its own seconds, or more where those behind it have theirs all the same."""
        kept = sum(SECTIONS[name].seconds for name in self._names)
        return self._context.share(section.seconds, kept)

    def _hung(self, name: str) -> None:
        """From a timer's thread: whatever the section waits for, it is not waited for any longer."""
        found = self._context.report.section(name)
        found |= {"status": "failed", "error": "took too long and was broken off"}
        faulthandler.dump_traceback(all_threads=True)
        self._go_on_afresh()

    def _go_on_afresh(self) -> None:
        """Replace this process by one that runs the sections left."""
        if self._warmers is not None:
            self._warmers.stop()
        report, clock = self._context.report, self._context.clock
        if clock.left() < _LATE:
            for name in self._names:
                report.section(name)["status"] = "left out"
            self._names.clear()
        report.save()
        shutil.rmtree(self._folder, ignore_errors=True)  # nobody comes back to it
        said = [sys.executable, "-m", "scripts.gpu_check", "--device", str(self._context.device), "--resume"]
        said += ["--out", str(self._context.report.path), "--sections", ",".join(self._names)]
        said += ["--until", str(clock.end), *(["--quick"] if self._context.quick else [])]
        said += ["--bundle", str(self._context.bundle)] if self._context.bundle else []
        sys.stdout.flush()
        for descriptor in Path("/proc/self/fd").iterdir():  # the GPU's too: they keep its memory
            with suppress(OSError):
                os.set_inheritable(int(descriptor.name), int(descriptor.name) <= 2)
        os.execv(sys.executable, said)


def _warm(device: torch.device, quick: bool, clock: Clock, group: str, bundle: Path | None) -> None:
    """Compile one group of kernels."""
    from scripts.gpu_check.warming import warm

    with tempfile.TemporaryDirectory() as folder:
        said = warm(Context(device, quick, Report(Path(folder) / "none.json"), clock, bundle), group)
    print(f"{said}, {clock.left():.0f} s left")


def _device_answers(device: torch.device) -> bool:
    """Whether the device still runs anything after an error."""
    try:
        return int(torch.ones(2, device=device).sum()) == 2
    except Exception:  # noqa: BLE001 - that is the answer
        return False


def _bundle(given: Path | None, quick: bool) -> Path | None:
    """The packaged model's bundle, else the cached one, if any; none where what opens one is not installed.

    Where the script itself is tried, it does not depend on what this machine has cached.
    """
    if lacking := missing(BUNDLE):
        print(f"No bundle is opened: {', '.join(lacking)} is not installed.", file=sys.stderr)
        return None
    return given or (None if quick else _cached_bundle())


def _cached_bundle() -> Path | None:
    """The packaged model's bundle, where it was made on this machine or brought along."""
    try:
        from exeunt.deploy.packaged import bundle_folder

        folder = bundle_folder()
    except (ImportError, OSError):
        return None
    return folder if (folder / "manifest.json").is_file() else None


if __name__ == "__main__":
    sys.exit(main(began=_BEGAN))
