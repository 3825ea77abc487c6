"""One block at a time over a batch of rows: how states pass a model whose blocks are never in memory together."""

import torch
from torch import Tensor

from exeunt.calibration.sequence_batch import SequenceBatch
from exeunt.compression.architecture import Architecture
from exeunt.compression.block import Block
from exeunt.compression.kv_format import KVLayout, KVPages, page_bytes_for
from exeunt.compression.resident_blocks import ResidentBlocks
from exeunt.compression.rope import RopeTables
from exeunt.compression.variant import KVFormat


class BlockRunner:
    """Runs single blocks of a model as its decoder would, by the same kernels and to the same bits.

    A batch's keys and values live for one call: pages hold one block's, and every block reuses them.
    """

    def __init__(
        self, spec: Architecture, kv_cache: KVFormat, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.spec, self.kv_cache, self.device, self.dtype = spec, kv_cache, device, dtype
        self._rope = RopeTables(spec.rope, device, dtype) if spec.rope is not None else None
        self._arena = torch.zeros(0, dtype=torch.uint8, device=device)

    @torch.inference_mode()
    def run(self, block: Block, hidden: Tensor, batch: SequenceBatch) -> Tensor:
        """The states behind `block` of `hidden` [tokens, hidden], those in front of it, which stay as they are.

        `batch` says whose tokens they are. Runs natively where the block's linears allow it, else one operation at a
        time.
        """
        index, pages = block.index, self._pages(block.index, batch)
        alone = ResidentBlocks(self.spec, (block,), self._rope, self.device, self.dtype, first=index)
        geometry = batch.geometry(pages.layout.page_tokens)
        return alone.run(hidden.clone(), geometry, pages, index, index + 1)

    def _pages(self, index: int, batch: SequenceBatch) -> KVPages:
        """Pages of one block, which hold as many tokens as a whole model's do."""
        spec = self.spec
        page_bytes = page_bytes_for(spec, self.dtype) // spec.blocks
        layout = KVLayout(self.kv_cache, (index,), spec.kv_heads, spec.head_dim, self.dtype, page_bytes)
        needed = batch.pages(layout.page_tokens) * page_bytes
        if len(self._arena) < needed:
            self._arena = torch.zeros(needed, dtype=torch.uint8, device=self.device)
        return KVPages(layout, self._arena)
