"""How many phases a calibration has: known before it begins, so that each can say which of how many it is."""

import torch

from exeunt.calibration.exit_placement import is_screened
from exeunt.calibration.kernel_compilation import must_compile
from exeunt.calibration.options import CalibrationOptions, drafting_blocks, exit_blocks
from exeunt.compression.architecture import Architecture


def planned_phases(options: CalibrationOptions, spec: Architecture, device: torch.device) -> int:
    """The phases of a calibration of `spec` on `device`, from now on."""
    studies = options.studies
    certified = bool(exit_blocks(spec, options.exits))
    fitted = certified or bool(drafting_blocks(spec, options.drafting_exit))
    replaces = options.linear_block != "none"
    return sum(
        (
            must_compile(device),
            4,  # checking weights, collecting activations, loading, asking the full model
            replaces,  # comparing linear blocks
            replaces and studies.ranks,  # other sizes of it
            fitted and is_screened(options.exits, options.drafting_exit),  # screening
            3,  # where heads start, heads, gates
            fitted,  # asking the gates
            fitted and options.exits == "auto",  # choosing exits
            2 * certified,  # certifying, looking for looser thresholds
            1,  # evaluating
            studies.generation is not None,
            options.weights != "full" and studies.weights > 0,
            options.kv_cache != "full" and studies.kv > 0,
            2,  # hashing, writing
        )
    )
