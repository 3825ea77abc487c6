"""What a calibration is asked for: plain data, checked against the model before any work."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

import torch

from exeunt.calibration.corpus import LEAST_TOKENS
from exeunt.calibration.errors import OptionError
from exeunt.calibration.exit_training import HeadTraining
from exeunt.calibration.gate_training import ProbeTraining
from exeunt.compression.architecture import Architecture
from exeunt.compression.device import DeviceError, find_device
from exeunt.compression.model import WeightChoice
from exeunt.compression.variant import KVFormat

TARGETS: Final = (0.01, 0.02, 0.05, 0.1)
EXIT_DEPTHS: Final = (1 / 4, 1 / 2, 2 / 3, 5 / 6)
"""Where exits that may be certified stand unless asked otherwise, as a share of the depth."""
DRAFT_DEPTHS: Final = (1 / 6, 1 / 4, 1 / 3)
"""Where else the exit that drafts may stand: a wrong draft costs a shallow pass, so that shallow ones may do best."""


LARGE: Final = 200_000_000
"""Parameters from which on a calibration takes so long that an interrupted one should not be begun anew."""


@dataclass(frozen=True, slots=True)
class CalibrationOptions:
    """A calibration to make. Lengths are tokens; exits are named by the numbers of the blocks they follow.

    `exits` are those that are certified. The one that drafts for the verified mode is chosen among these and some
    early ones, or `drafting_exit`, or with "none" none is chosen.

    `work` is the folder in which unfinished work is kept, to go on from; None keeps nothing, "auto" keeps it beside
    `out` where the model has at least `LARGE` parameters. `costs` are the times that decide which exits pay: those
    measured before on this machine for this shape of model, where there are any, or measured anew.

    `weights` "both" puts INT4 weights beside the full ones, "int4" in their place (no full-precision copy of what is
    INT4), "full" leaves them out; `kv_cache` "int4" adds the INT4 cache, "full" does not. Exits are trained on the
    most compressed stack of those.
    """

    model: str  # a local directory or a Hugging Face id
    out: Path
    data: str  # see `exeunt.calibration.corpus.read_corpus`
    tokens: int = 48_000
    exits: Literal["auto"] | tuple[int, ...] = "auto"
    drafting_exit: Literal["auto", "none"] | int = "auto"
    linear_block: Literal["auto", "none"] | int = "auto"
    weights: WeightChoice = "both"
    kv_cache: KVFormat = "int4"
    risk: tuple[float, ...] = TARGETS
    confidence: float = 0.95
    device: str = "auto"
    dtype: torch.dtype | None = None  # None: float32 on a CPU, the checkpoint's own elsewhere
    seed: int = 0
    group_size: int = 32  # inputs that share an INT4 scale
    row_tokens: int = 512
    batch_tokens: int = 4096
    stream_weights: bool | None = None  # read full-precision blocks as they are run; None: by the free memory
    evaluation_tokens: int = 6_000  # of the certify split
    least_tokens: int = LEAST_TOKENS
    origin: str | None = None  # where the text comes from, for the manifest
    work: Path | None | Literal["auto"] = "auto"
    costs: Literal["remembered", "measured"] = "remembered"
    head: HeadTraining = field(default_factory=HeadTraining)
    probe: ProbeTraining = field(default_factory=ProbeTraining)

    def __post_init__(self) -> None:
        if self.tokens < self.least_tokens:
            raise OptionError(
                f"Calibration was allowed {self.tokens:,} tokens; it needs at least {self.least_tokens:,}."
            )
        for target in self.risk:
            if not 0.0 < target < 1.0:
                raise OptionError(f"The risk target {target} must be above 0 and below 1 (0.05 is 5 %).")
        if not self.risk:
            raise OptionError("Give at least one risk target, 0.05 for 5 %.")
        if not 0.5 <= self.confidence < 1.0:
            raise OptionError(f"The confidence is {self.confidence}; it must be at least 0.5 and below 1.")
        if self.row_tokens < 16 or self.batch_tokens < self.row_tokens:
            raise OptionError(
                f"Rows of {self.row_tokens} tokens in batches of {self.batch_tokens} cannot be run; rows need at "
                "least 16 tokens and batches at least one row."
            )

    @property
    def targets(self) -> tuple[float, ...]:
        """The risk targets, ascending, each once."""
        return tuple(sorted(set(self.risk)))


def work_folder(options: CalibrationOptions, spec: Architecture) -> Path | None:
    """The folder in which unfinished work is kept; None where it is not."""
    if options.work != "auto":
        return options.work
    if spec.parameters < LARGE:
        return None
    return options.out.with_name(f".{options.out.name}.unfinished")


def exit_blocks(spec: Architecture, asked: Literal["auto"] | tuple[int, ...]) -> tuple[int, ...]:
    """The blocks that exits may be certified behind, ascending. Raises OptionError for any that cannot be."""
    if asked == "auto":
        return _blocks_at(spec, EXIT_DEPTHS)
    last = spec.blocks - 2
    wrong = [block for block in asked if not 0 <= block <= last]
    if wrong:
        raise OptionError(
            f"There can be no exit after block {wrong[0]}: the model's {spec.blocks} blocks are counted from 0, and "
            f"the last block is followed by the model's own head; give blocks 0 to {last}."
        )
    return tuple(sorted(set(asked)))


def drafting_blocks(
    spec: Architecture,
    exits: Literal["auto"] | tuple[int, ...],
    asked: Literal["auto", "none"] | int,
) -> tuple[int, ...]:
    """The blocks that the drafting exit may follow, ascending. Raises OptionError for any that cannot be."""
    if asked == "none":
        return ()
    if asked == "auto":
        return tuple(sorted({*exit_blocks(spec, exits), *_blocks_at(spec, DRAFT_DEPTHS)}))
    return exit_blocks(spec, (asked,))


def _blocks_at(spec: Architecture, shares: Sequence[float]) -> tuple[int, ...]:
    """The blocks at some shares of the depth, ascending: none in a model of one block."""
    last = spec.blocks - 2
    return tuple(sorted({min(max(round(share * spec.blocks) - 1, 0), last) for share in shares} - {-1}))


def wanted_linear_block(spec: Architecture, asked: Literal["auto", "none"] | int) -> int | None:
    """The block asked for; None where calibration chooses. Raises OptionError for one that there is not."""
    if isinstance(asked, str):
        return None
    if not 0 <= asked < spec.blocks:
        raise OptionError(
            f"There is no block {asked} to replace by a linear map: the model's {spec.blocks} blocks are counted "
            "from 0."
        )
    return asked


def resolve_device(name: str) -> torch.device:
    """The device to calibrate on; "auto" is a CUDA device where there is one. Raises OptionError."""
    try:
        return find_device(name)
    except DeviceError as error:
        raise OptionError(f"The device is {name!r}; {error}.") from error
