"""Where exits are trained: what was asked for by name and, where calibration chooses, what screening found."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from exeunt.calibration.drafting_choice import PassCosts
from exeunt.calibration.exit_choice import ExitCosts
from exeunt.calibration.exit_fit import ExitData
from exeunt.calibration.exit_screen import ExitScreen, ScreenSize, kept_blocks, screen_exits, screen_work
from exeunt.calibration.gate_training import TOPS
from exeunt.calibration.progress import ProgressReport
from exeunt.calibration.teacher_forcing import ForcedModel
from exeunt.compression.architecture import Architecture
from exeunt.compression.exits import ExitHead, ExitJudge, ExitNorm, ExitProbe

Exits = Literal["auto"] | tuple[int, ...]
"""The blocks that certified exits follow, or that calibration chooses them."""
DraftingExit = Literal["auto", "none"] | int
"""The block that the drafting exit follows, that calibration chooses it, or that there is none."""


def named_blocks(exits: Exits, drafting: DraftingExit) -> tuple[int, ...]:
    """The blocks that were asked for by name, ascending."""
    certified = () if exits == "auto" else exits
    drafts = (drafting,) if isinstance(drafting, int) else ()
    return tuple(sorted({*certified, *drafts}))


def is_screened(exits: Exits, drafting: DraftingExit) -> bool:
    """Whether anything is left for calibration to choose."""
    return exits == "auto" or drafting == "auto"


def state_blocks(
    spec: Architecture, exits: Exits, drafting: DraftingExit, tokens: int, itemsize: int
) -> tuple[int, ...]:
    """The blocks behind which the states of `tokens` tokens are to be kept, ascending; `itemsize` is in bytes."""
    named = named_blocks(exits, drafting)
    if not is_screened(exits, drafting):
        return named
    return tuple(sorted({*named, *kept_blocks(spec.blocks, tokens, spec.hidden_size, itemsize)}))


def untrained_exit(norm: ExitNorm, block: int, units: int) -> ExitHead:
    """The model's own head behind `block`, with a gate that knows nothing: as large as a trained one, to be timed.

    `units` are the probe's.
    """
    hidden, device = int(norm.weight.shape[0]), norm.weight.device

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float32, device=device)

    probe = ExitProbe(zeros(units, hidden), zeros(units), zeros(units), zeros())
    judge = ExitJudge(zeros(TOPS, units), zeros(units), zeros(units), zeros())
    return ExitHead(block, norm, zeros(hidden, hidden), probe, zeros(4), 0.5, judge)


def place_exits(
    model: ForcedModel,
    norm: ExitNorm,
    data: ExitData,
    rows: Sequence[Tensor],
    exits: Exits,
    drafting: DraftingExit,
    costs: ExitCosts,
    passes: PassCosts | None,
    risks: Sequence[float],
    size: ScreenSize,
    progress: ProgressReport,
) -> ExitScreen:
    """The screen of the blocks of `data`, and behind which of them exits are to be trained.

    `model` is the deployed variant, `rows` are the select split's; `passes` may be None where nothing drafts.
    """
    with progress.phase("Screening exits", screen_work(data, rows, size)) as advance:
        screen = screen_exits(
            model.decoder.project_exit,
            norm,
            data,
            rows,
            model.blocks,
            costs,
            passes if drafting == "auto" else None,
            risks,
            size,
            named_blocks(exits, drafting),
            certify=exits == "auto",
            advance=advance,
        )
    shown = ", ".join(f"block_{each.block} ({each.reason})" for each in screen.exits if each.trained)
    progress.note(f"exits to be trained, of {len(screen.exits)} looked at: {shown}")
    return screen
