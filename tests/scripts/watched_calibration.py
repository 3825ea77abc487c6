"""A calibration of three small steps, one of which holds 64 MiB, watched in a process of its own; JSON on its output.

In a process of many tests memory comes and goes for other reasons.
"""

import json
from pathlib import Path
from typing import Final

import numpy as np

from exeunt.calibration.options import CalibrationOptions
from exeunt.calibration.presets import PRESETS
from exeunt.calibration.progress import ProgressReport
from scripts.bench_calibration import point
from scripts.bench_calibration.point import Point, measured

MIB: Final = 2**20


def main() -> None:
    """Measure it, and print what was asked of it and what was found."""
    asked: list[CalibrationOptions] = []

    def calibrates(options: CalibrationOptions, progress: ProgressReport) -> Path:
        asked.append(options)
        with progress.phase("step 1 of 3: Small", 1) as advance:
            advance(1)
        with progress.phase("step 2 of 3: Large", 1):
            held = np.ones(64 * MIB, dtype=np.uint8)
        if held[-1] != 1:  # still there when the phase ends, and looked at then at the latest
            raise RuntimeError("what was written is not there")
        del held
        with progress.phase("step 3 of 3: Small again", 1):
            pass
        options.out.mkdir()
        (options.out / "weights").write_bytes(b"1234")
        return options.out

    vars(point)["calibrate"] = calibrates
    found = measured(
        Point("model", "text", 3000, 2000, 128, 512, stream_weights=True, journal=True, brief=True)
    )
    (options,) = asked
    told = {
        "options": [options.tokens, options.stream_weights, options.batch_tokens],
        "work": options.work is not None,
        "quick": options.head == PRESETS["quick"]["head"],
        "found": found,
    }
    print(json.dumps(told))


if __name__ == "__main__":
    main()
