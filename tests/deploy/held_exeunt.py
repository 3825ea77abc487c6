"""`exeunt` with a tiny packaged model, held in one phase of calibration until a file appears: run as a module.

`python -m tests.deploy.held_exeunt MODEL PHASE FILE ARGUMENT...`, where MODEL is the folder of the packaged model.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from exeunt.calibration import options, progress
from exeunt.calibration.exit_training import HeadTraining
from exeunt.calibration.gate_training import ProbeTraining
from exeunt.deploy import cli, packaged_model

SMALL: dict[str, Any] = {
    "tokens": 6000,
    "exits": (0, 2),
    "risk": (0.3,),
    "nll_risk": (),
    "weights": "int4",  # one format and no linear block: certified, written and compared once, not eight times
    "kv_cache": "full",
    "linear_block": "none",
    "row_tokens": 64,
    "batch_tokens": 512,
    "evaluation_tokens": 500,
    "least_tokens": 3000,
    "head": HeadTraining(visits=1000, evaluations=2),
    "probe": ProbeTraining(units=8, steps=20, evaluations=2),
}


def held(form: type[Any], phase: str, file: Path) -> None:
    """Make the progress `form` wait for `file` at the first advance of `phase`, after saying so."""
    original = form.phase

    @contextmanager
    def waiting(self: object, title: str, total: int) -> Iterator[Callable[[int], None]]:
        with original(self, title, total) as advance:

            def wait(units: int) -> None:
                if title.endswith(phase) and not file.exists():
                    print(f"held in {phase}", file=sys.stderr, flush=True)
                    while not file.exists():
                        time.sleep(0.02)
                advance(units)

            yield wait

    form.phase = waiting


def main(model: str, phase: str, file: str, *arguments: str) -> None:
    """Run the command line as described above."""
    packaged_model.path = lambda: Path(model)
    import_module(
        "exeunt.calibration.pipeline"
    )  # what calibrates has the real class already, in annotations too
    real = options.CalibrationOptions
    options.CalibrationOptions = lambda **given: real(**{**given, **SMALL})  # type: ignore[misc, assignment]
    for form in (progress.TerminalProgress, progress.LineProgress):
        held(form, phase, Path(file))
    cli.main(arguments)


if __name__ == "__main__":
    main(*sys.argv[1:])
