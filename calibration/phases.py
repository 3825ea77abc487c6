"""How many phases a calibration has: known before it begins, so that each can say which of how many it is."""

import torch

from exeunt.calibration.kernel_compilation import must_compile
from exeunt.calibration.options import CalibrationOptions, drafting_blocks, exit_blocks
from exeunt.compression.architecture import Architecture


def planned_phases(options: CalibrationOptions, spec: Architecture, device: torch.device) -> int:
    """The phases of a calibration of `spec` on `device`, from now on."""
    certified = bool(exit_blocks(spec, options.exits))
    fitted = certified or bool(drafting_blocks(spec, options.exits, options.drafting_exit))
    return sum(
        (
            must_compile(device),
            options.weights != "full",  # quantising
            3,  # loading, collecting activations, asking the full model
            options.linear_block != "none",  # comparing linear blocks
            3,  # where heads start, heads, gates
            fitted,  # asking the gates
            fitted and options.exits == "auto",  # choosing exits
            2 * certified,  # certifying, looking for a looser threshold
            3,  # evaluating, hashing, writing
        )
    )
