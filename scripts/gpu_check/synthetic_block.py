"""A linear block for models that no calibration has looked at: random numbers, of the rank that one would choose.

What it computes says nothing; what a step with it costs does.
"""

from dataclasses import replace
from typing import Final

import torch

from exeunt.calibration.block_fitter import REDUCTION
from exeunt.calibration.ranked_map import rank_within
from exeunt.compression.architecture import Architecture
from exeunt.compression.linear_block import LinearBlock
from exeunt.compression.model import LoadedModel

_SMALL: Final = 1e-3  # of what it adds: the blocks behind it see states as large as without it


def synthetic_block(spec: Architecture, device: torch.device) -> LinearBlock:
    """In the place of the block behind the middle, in bfloat16."""
    hidden, drawn = spec.hidden_size, torch.Generator().manual_seed(4)
    rank = rank_within(spec.block_parameters / REDUCTION, hidden)
    down = torch.randn(rank, hidden, generator=drawn) / hidden**0.5
    up = torch.randn(hidden, rank, generator=drawn) * _SMALL / rank**0.5
    return LinearBlock(spec.blocks // 2, down, up, torch.zeros(hidden)).to(device, torch.bfloat16)


def with_linear_block(model: LoadedModel) -> LoadedModel:
    """The model with the linear block in its INT4 weights too: its own, or a synthetic one."""
    if ("int4", True) in model.decoders or ("int4", False) not in model.decoders:
        return model
    block = synthetic_block(model.spec, model.device)
    decoders = dict(model.decoders)
    decoders["int4", True] = decoders["int4", False].with_linear_block(block)
    return replace(model, decoders=decoders)
