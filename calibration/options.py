"""What a calibration is asked for: plain data, checked against the model before any work."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

import torch

from exeunt.calibration.block_choice import CANDIDATES
from exeunt.calibration.certificates import NllEffort
from exeunt.calibration.corpus import LEAST_TOKENS
from exeunt.calibration.errors import OptionError
from exeunt.calibration.exit_screen import ScreenSize
from exeunt.calibration.exit_training import HeadTraining
from exeunt.calibration.gate_training import ProbeTraining
from exeunt.calibration.journal import check_no_other
from exeunt.calibration.nll_risk import CLIP
from exeunt.calibration.option_limits import check_names, check_seed
from exeunt.calibration.presets import StudySizes
from exeunt.calibration.scratch_folder import check_work_can_stand
from exeunt.calibration.weights_int4 import Rounding, check_even
from exeunt.compression.architecture import Architecture
from exeunt.compression.device import DeviceError, find_device
from exeunt.compression.model import WeightChoice
from exeunt.compression.variant import KVFormat

TARGETS: Final = (0.01, 0.02, 0.05, 0.1)
"""Shares of early tokens that may differ from full depth, and increases of the mean NLL in nats per token."""
LARGE: Final = 200_000_000
"""Parameters from which on a calibration takes so long that an interrupted one should not be begun anew."""


@dataclass(frozen=True, slots=True)
class CalibrationOptions:
    """A calibration to make. Lengths are tokens; exits are named by the numbers of the blocks they follow.

    `exits` are those that are certified, and `drafting_exit` is the one that drafts for the verified mode: named,
    "auto" for calibration to choose among all blocks, or "none". `risk` and `nll_risk` are the targets of the two
    certified risks; of the second there may be none.

    `work` is the folder in which unfinished work is kept, to go on from; None keeps nothing, "auto" keeps it beside
    `out` where the model has at least `LARGE` parameters. `costs` says which times decide what pays: "remembered" are
    those measured before on this machine for this shape of model, where there are any; "anew" measures, and remembers
    that; "now" measures and remembers nothing.

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
    nll_risk: tuple[float, ...] = TARGETS
    confidence: float = 0.95
    device: str = "auto"
    dtype: torch.dtype | None = None  # None: float32 on a CPU, the checkpoint's own elsewhere
    seed: int = 0
    group_size: int = 32  # inputs that share an INT4 scale
    rounding: Rounding = "gptq"
    hessian_tokens: int = 8_000  # of the fit split that GPTQ sees
    block_tokens: int = 4_000  # of the select split that linear blocks are compared on
    block_candidates: int | None = CANDIDATES  # blocks to replace that are tried; None: all
    nll_effort: NllEffort = field(default_factory=NllEffort)
    screen: ScreenSize = field(default_factory=ScreenSize)
    studies: StudySizes = field(default_factory=StudySizes)
    row_tokens: int = 512
    batch_tokens: int = 4096
    stream_weights: bool | None = None  # read full-precision blocks as they are run; None: by the free memory
    evaluation_tokens: int = 5_000  # of the certify split
    least_tokens: int = LEAST_TOKENS
    origin: str | None = None  # where the text comes from, for the manifest
    work: Path | Literal["auto"] | None = "auto"
    costs: Literal["remembered", "anew", "now"] = "remembered"
    head: HeadTraining = field(default_factory=HeadTraining)
    probe: ProbeTraining = field(default_factory=ProbeTraining)

    def __post_init__(self) -> None:
        work = self.work if isinstance(self.work, Path) else None
        check_names({"MODEL": self.model, "--out": self.out, "--data": self.data, "--work": work})
        check_seed(self.seed)
        if self.tokens < self.least_tokens:
            raise OptionError(f"--tokens is {self.tokens}; a calibration needs at least {self.least_tokens}.")
        for target in self.risk:
            if not 0.0 < target < 1.0:
                raise OptionError(f"The risk target {target} must be above 0 and below 1 (0.05 is 5 %).")
        if not self.risk:
            raise OptionError("Give at least one risk target, 0.05 for 5 %.")
        for target in self.nll_risk:
            if not 0.0 < target < CLIP:
                raise OptionError(
                    f"The NLL risk target {target} must be above 0 and below {CLIP:g} nats per token (0.05 lets "
                    "perplexity rise by 5 %)."
                )
        check_even(self.group_size)
        if not 0.5 < self.confidence < 1.0:
            raise OptionError(f"The confidence is {self.confidence}; it must be above 0.5 and below 1.")
        if self.row_tokens < 16 or self.batch_tokens < self.row_tokens:
            raise OptionError(
                f"Rows of {self.row_tokens} tokens in batches of {self.batch_tokens} cannot be run; rows need at "
                "least 16 tokens and batches at least one row."
            )

    @property
    def targets(self) -> tuple[float, ...]:
        """The risk targets, ascending, each once."""
        return tuple(sorted(set(self.risk)))

    @property
    def nll_targets(self) -> tuple[float, ...]:
        """The targets of the NLL increase, ascending, each once; in nats per token."""
        return tuple(sorted(set(self.nll_risk)))


def work_folder(options: CalibrationOptions, spec: Architecture) -> Path | None:
    """The folder in which unfinished work is kept; None where it is not."""
    if options.work is None or (options.work == "auto" and spec.parameters < LARGE):
        return None
    return work_place(options)


def work_place(options: CalibrationOptions) -> Path:
    """The folder in which unfinished work is kept if it is kept."""
    if isinstance(options.work, Path):
        return options.work
    out = Path(os.path.abspath(options.out))  # "." has no name
    return out.with_name(f".{out.name}.unfinished")


def checked_work_folder(options: CalibrationOptions, spec: Architecture) -> Path | None:
    """What `work_folder` returns, a place that can be written, as an absolute path: with `--out .` the folder that one
    stands in is replaced, and relative ones then lead nowhere. Raises OptionError for one that cannot be used.
    """
    folder = work_folder(options, spec)
    if folder is None:
        return None
    check_apart(options.out, folder)
    there = next(place for place in (folder, *folder.absolute().parents) if os.path.lexists(place))
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        raise OptionError(
            f"Unfinished work is to be kept in {folder}, and nothing can be written in {there}; give another folder as "
            "--work, or none."
        )
    if folder.is_dir():
        check_no_other(folder)
    check_work_can_stand(folder)
    return Path(os.path.abspath(folder))


def check_apart(out: Path, work: Path) -> None:
    """Raise OptionError where the bundle would lie in the folder of unfinished work, or that in the bundle."""
    target, kept = out.resolve(), work.resolve()
    if target == kept or target in kept.parents or kept in target.parents:
        raise OptionError(
            f"--out is {out} and --work is {work}, one inside the other; give folders that lie apart."
        )


def exit_blocks(spec: Architecture, asked: Literal["auto"] | tuple[int, ...]) -> tuple[int, ...]:
    """The blocks that exits may stand behind, ascending: with "auto" all but the last, else those named.

    Raises OptionError for any that cannot be.
    """
    last = spec.blocks - 2
    if asked == "auto":
        return tuple(range(last + 1))
    wrong = [block for block in asked if not 0 <= block <= last]
    if wrong:
        if last < 0:
            raise OptionError(
                f"There can be no exit after block {wrong[0]}: the model has one block, which its own head follows."
            )
        raise OptionError(
            f"There can be no exit after block {wrong[0]}: the model's {spec.blocks} blocks are counted from 0, and "
            f"the last block is followed by the model's own head; give blocks 0 to {last}."
        )
    return tuple(sorted(set(asked)))


def drafting_blocks(spec: Architecture, asked: Literal["auto", "none"] | int) -> tuple[int, ...]:
    """The blocks that the drafting exit may follow, ascending; none with "none". Raises as `exit_blocks`."""
    if asked == "none":
        return ()
    return exit_blocks(spec, asked if asked == "auto" else (asked,))


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
