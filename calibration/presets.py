"""How much a calibration looks at: three presets, from a look to as long as it pays.

A budget is in tokens unless it says otherwise. None of them changes what a certificate means, only how much text stands
behind it, how many alternatives were tried, and which comparisons the report holds.
"""

from dataclasses import dataclass, field
from typing import Any, Final, Literal

from exeunt.calibration.certificates import NllEffort
from exeunt.calibration.exit_screen import ScreenSize
from exeunt.calibration.exit_training import HeadTraining
from exeunt.calibration.gate_training import ProbeTraining
from exeunt.calibration.generation import GenerationSize

PresetName = Literal["quick", "default", "thorough"]
EVERY_TOKEN: Final = 2**40
"""More than any text has."""


@dataclass(frozen=True, slots=True)
class StudySizes:
    """What the comparisons in the report are made on; 0 or None leaves one out."""

    weights: int = 2_000  # roundings of weights compared, tokens of the select split
    kv: int = 2_000  # forms of keys and values, tokens of the select split
    losses: int | None = 1  # exits whose heads are trained by both losses; None: all that are trained
    ranks: bool = True  # the linear block in other sizes
    generation: GenerationSize | None = field(default_factory=GenerationSize)
    temperatures: tuple[float, ...] = (1.0,)  # that modes write at


PRESETS: Final[dict[PresetName, dict[str, Any]]] = {
    "quick": {
        "tokens": 24_000,
        "evaluation_tokens": 2_000,
        "hessian_tokens": 4_000,
        "block_candidates": 2,
        "screen": ScreenSize(tokens=2_048, trained=3),
        "head": HeadTraining(visits=16_000),
        "probe": ProbeTraining(steps=300, evaluations=6),
        "nll_effort": NllEffort("none"),
        "studies": StudySizes(weights=0, kv=0, losses=0, ranks=False, generation=None),
    },
    "default": {},
    "thorough": {
        "tokens": EVERY_TOKEN,
        "evaluation_tokens": 60_000,
        "hessian_tokens": 64_000,
        "nll_effort": NllEffort("all", 1),
        "block_candidates": None,
        "screen": ScreenSize(tokens=32_768, trained=8),
        "head": HeadTraining(visits=2_000_000, evaluations=60, select_tokens=16_000, most_epochs=20.0),
        "probe": ProbeTraining(steps=4_000, evaluations=40),
        "studies": StudySizes(
            weights=30_000,
            kv=30_000,
            losses=2,
            generation=GenerationSize(texts=64, prompt_tokens=32, new_tokens=128),
            temperatures=(0.0, 1.0),
        ),
    },
}
"""What a preset sets of `CalibrationOptions`; the default preset is its defaults."""
