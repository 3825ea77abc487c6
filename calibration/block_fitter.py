"""The visitor that fits an affine map to every block that passes by."""

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from exeunt.calibration.activations import Scratch, digest
from exeunt.calibration.block_fit import Moments, choose_ridge
from exeunt.calibration.journal import Entry
from exeunt.calibration.ranked_map import RankedMap, rank_within
from exeunt.compression.linear_block import LinearBlock

REDUCTION: Final = 34.0
"""A linear block holds at most one parameter for so many of the block it replaces (arXiv 2604.20682, block 31)."""


@dataclass(frozen=True, slots=True)
class BlockFit:
    """How well an affine map stands in for one block, R² measured on the select split.

    `r2` is of the map of full rank, `r2_cut` of `map`, the one within the size budget. `missed` is the mean squared
    error of `map` over the mean square of the states behind the block: what is known of the harm it may do before it is
    tried.
    """

    block: int
    r2: float
    r2_cut: float
    missed: float
    map: LinearBlock


@dataclass(frozen=True, slots=True)
class RankedFit:
    """One block's map in every rank, on the CPU and in a file, and R² of each on the select split, from rank 0 on."""

    block: int
    map: RankedMap
    r2: tuple[float, ...]  # [H + 1]


class BlockFitter:
    """Fits each block's residual as it passes by. Only one block's moments are in memory at a time.

    What it keeps of each block is its map in every rank, in a file of the scratch folder (8 H² bytes), because which
    block is chosen is known when all have passed.
    """

    def __init__(
        self,
        hidden: int,
        block_parameters: int,
        fit_tokens: int,
        device: torch.device,
        scratch: Scratch,
        reduction: float = REDUCTION,
    ) -> None:
        """The first `fit_tokens` tokens of the stream are fitted on, the others judge."""
        self.fits: list[BlockFit] = []
        self.ranked: list[RankedFit] = []
        self._hidden, self._fit_tokens, self._device, self._scratch = hidden, fit_tokens, device, scratch
        self._rank = rank_within(block_parameters / reduction, hidden)
        self._begin()

    def see(self, block: int, tokens: slice, before: Tensor, after: Tensor) -> None:
        """Count the block's inputs and what it adds to them."""
        cut = min(max(self._fit_tokens - tokens.start, 0), len(before))
        residual = after.double() - before.double()
        if cut > 0:
            self._fit.add(before[:cut], residual[:cut])
        if cut < len(before):
            self._select.add(before[cut:], residual[cut:])
            self._behind += after[cut:].double().square().sum()

    def finish(self, block: int) -> None:
        """Solve for the block's map and forget its moments."""
        ranked = RankedMap.of(self._fit, choose_ridge(self._fit, self._select))
        r2 = ranked.r2_by_rank(self._select)
        held = self._array(block)
        held.copy_(ranked.packed())
        left = float(1 - r2[self._rank]) * self._select.variance_y
        self._keep(block, held, r2, left / max(float(self._behind) / self._select.count, 1e-300))
        self._begin()

    def record(self, block: int) -> Entry:
        """What was found of the finished `block`; its map is on the disk when this returns."""
        self._scratch.sync(_name(block))
        r2 = torch.tensor(self.ranked[block].r2, dtype=torch.float64)
        return {"r2": r2}, {"missed": self.fits[block].missed, "map": digest(self._array(block))}

    def restore(self, block: int, entry: Entry) -> bool:
        """Take over what was found of `block`, the next in turn; False where its map is not in the scratch folder."""
        tensors, record = entry
        held = self._array(block)
        if block != len(self.fits) or digest(held) != record["map"]:
            return False
        self._keep(block, held, tensors["r2"], float(record["missed"]))
        return True

    def forget(self) -> None:
        """Know of no block: the pass begins anew."""
        self.fits.clear()
        self.ranked.clear()
        self._begin()

    def _begin(self) -> None:
        """No tokens of the next block seen."""
        self._fit = Moments.zeros(self._hidden, self._hidden, self._device)
        self._select = Moments.zeros(self._hidden, self._hidden, self._device)
        self._behind = torch.zeros((), dtype=torch.float64, device=self._device)

    def _keep(self, block: int, held: Tensor, r2: Tensor, missed: float) -> None:
        ranked = RankedFit(block, RankedMap.unpacked(held), tuple(r2.tolist()))
        stand_in = ranked.map.linear_block(block, self._rank)
        self.ranked.append(ranked)
        self.fits.append(BlockFit(block, ranked.r2[-1], ranked.r2[self._rank], missed, stand_in))

    def _array(self, block: int) -> Tensor:
        return self._scratch.array(2 * self._hidden + 2, self._hidden, torch.float32, _name(block))


def _name(block: int) -> str:
    return f"linear-map-{block}"
