"""The memory that batches of teacher-forced passes keep their keys and values in."""

import torch
from torch import Tensor

from exeunt.compression.kv_format import KVLayout, KVPages


class PageArena:
    """Pages for one batch at a time, in one piece of memory that models take turns with.

    Every run of blocks over a batch writes what it attends to before it attends, so that nobody minds what another
    model left there. As many arenas as variants would be the largest thing that an evaluation holds.
    """

    def __init__(self) -> None:
        self._bytes: Tensor | None = None
        self._pages: dict[KVLayout, KVPages] = {}  # the same bytes as each layout sees them

    def pages(self, layout: KVLayout, count: int, device: torch.device) -> KVPages:
        """At least `count` pages of `layout` on `device`, whatever they hold."""
        size = count * layout.page_bytes
        if self._bytes is None or self._bytes.numel() < size or self._bytes.device != device:
            self._pages.clear()
            self._bytes = None  # the old memory goes before the new one comes
            with torch.inference_mode(False):
                self._bytes = torch.zeros(size, dtype=torch.uint8, device=device)
        if layout not in self._pages:
            whole = self._bytes.numel() // layout.page_bytes * layout.page_bytes
            self._pages[layout] = KVPages(layout, self._bytes[:whole])
        return self._pages[layout]
