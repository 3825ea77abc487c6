"""Who holds which page of KV memory: an allocator and a page table per sequence. No torch.

A page is a number below `num_pages`; what lies in it (format, blocks, how many tokens) is the business of the
layout that a `PageTable` was made for. Tables of different layouts share one pool: KV memory is one budget.
"""

from collections.abc import Iterable
from typing import Final

import numpy as np

_FIRST_PAGES: Final = 8  # a table has room for, before it grows


class OutOfPagesError(Exception):
    """The pool has fewer free pages than were asked for; nothing was allocated."""

    def __init__(self, wanted: int, free: int, total: int) -> None:
        super().__init__(
            f"{wanted} KV pages are wanted and {free} of {total} are free; "
            "wait for running requests to finish, preempt one, or raise --kv-cache-memory"
        )
        self.wanted = wanted
        self.free = free
        self.total = total


class PageOwnershipError(Exception):
    """A page was given back that nobody holds, or the pool's books do not add up: a bug in the caller."""


class PagePool:
    """Hands out page numbers 0 .. num_pages - 1, each to one holder at a time.

    Pages come back in last-in-first-out order, so that memory touched recently (warm in the caches, already
    faulted in) is used again first. Every operation costs O(pages it moves).
    """

    __slots__ = ("_free", "_held", "num_pages")

    def __init__(self, num_pages: int) -> None:
        if num_pages < 0:
            raise ValueError(f"num_pages is {num_pages}; it must be 0 or more")
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._held = bytearray(num_pages)

    @property
    def free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    @property
    def used(self) -> int:
        """Pages that somebody holds."""
        return self.num_pages - len(self._free)

    def allocate(self, count: int) -> list[int]:
        """`count` distinct pages, all or none.

        Raises OutOfPagesError when fewer are free, ValueError for a negative count.
        """
        if count < 0:
            raise ValueError(f"{count} pages were asked for; the count must be 0 or more")
        if count > len(self._free):
            raise OutOfPagesError(count, len(self._free), self.num_pages)
        if count == 0:
            return []
        pages = self._free[: -count - 1 : -1]
        del self._free[-count:]
        for page in pages:
            self._held[page] = 1
        return pages

    def release(self, pages: Iterable[int]) -> None:
        """Takes pages back.

        Raises PageOwnershipError for a page not held (released twice or never allocated); then no page
        of the call is taken back.
        """
        returned = list(pages)
        for index, page in enumerate(returned):
            if not 0 <= page < self.num_pages or not self._held[page]:
                for taken in returned[:index]:
                    self._held[taken] = 1
                raise PageOwnershipError(
                    f"page {page} was released but is not held (pool of {self.num_pages})"
                )
            self._held[page] = 0
        self._free.extend(reversed(returned))

    def check_integrity(self, tables: "Iterable[PageTable] | None" = None) -> None:
        """Raises PageOwnershipError unless every page is free or held, exactly once.

        With `tables` (all that draw on this pool) every held page must also stand in exactly one of them: no
        leak, no page in two sequences. Costs O(num_pages): meant for an idle engine and for tests.
        """
        if len(set(self._free)) != len(self._free):
            raise PageOwnershipError("a page is on the free list twice")
        if any(self._held[page] for page in self._free):
            raise PageOwnershipError("a page is both free and held")
        if len(self._free) + sum(self._held) != self.num_pages:
            raise PageOwnershipError(
                f"{len(self._free)} pages are free and {sum(self._held)} held, of {self.num_pages}"
            )
        if tables is None:
            return
        owned = [page for table in tables for page in table.pages]
        if len(set(owned)) != len(owned):
            raise PageOwnershipError("a page stands in two page tables")
        if len(owned) != self.used:
            raise PageOwnershipError(f"{self.used} pages are held but {len(owned)} stand in page tables")


class PageTable:
    """The pages of one sequence, in the order of its positions: token p lies in page p // page_tokens."""

    __slots__ = ("_numbers", "page_tokens", "pages", "pool")

    def __init__(self, pool: PagePool, page_tokens: int) -> None:
        if page_tokens < 1:
            raise ValueError(f"page_tokens is {page_tokens}; a page holds at least one token")
        self.pool = pool
        self.page_tokens = page_tokens
        self.pages: list[int] = []
        self._numbers = np.empty(_FIRST_PAGES, dtype=np.int32)

    @property
    def numbers(self) -> np.ndarray:
        """`pages` as int32, to be copied at once: a view that the next change of the table makes another's."""
        return self._numbers[: len(self.pages)]

    @property
    def capacity(self) -> int:
        """Tokens that the present pages can hold."""
        return len(self.pages) * self.page_tokens

    def missing(self, tokens: int) -> int:
        """Pages that `ensure(tokens)` would allocate."""
        return max(0, self._pages_for(tokens) - len(self.pages))

    def ensure(self, tokens: int) -> None:
        """Grows the table until it can hold `tokens` tokens; never shrinks it.

        All or nothing: raises OutOfPagesError with the table as it was when the pool has too few pages.
        """
        missing = self.missing(tokens)
        if missing:
            self._append(self.pool.allocate(missing))

    def truncate(self, tokens: int) -> None:
        """Gives back the pages past the first `tokens` tokens: the roll-back of rejected drafts."""
        keep = self._pages_for(tokens)
        if keep < len(self.pages):
            self.pool.release(reversed(self.pages[keep:]))
            del self.pages[keep:]

    def clear(self) -> None:
        """Gives back every page; the table can be used again."""
        self.truncate(0)

    def slot(self, position: int) -> int:
        """Where the token at `position` lies: page × page_tokens + offset. IndexError beyond the capacity."""
        return self.pages[position // self.page_tokens] * self.page_tokens + position % self.page_tokens

    def slots(self, start: int, stop: int) -> list[int]:
        """The slots of positions start .. stop - 1. IndexError beyond the capacity."""
        return [self.slot(position) for position in range(start, stop)]

    def _append(self, pages: list[int]) -> None:
        held = len(self.pages)
        self.pages.extend(pages)
        if len(self.pages) > len(self._numbers):  # twice the room, so that growing costs O(1) a page
            grown = np.empty(max(len(self.pages), 2 * len(self._numbers)), dtype=np.int32)
            grown[:held] = self._numbers[:held]
            self._numbers = grown
        self._numbers[held : len(self.pages)] = pages

    def _pages_for(self, tokens: int) -> int:
        if tokens < 0:
            raise ValueError(f"{tokens} tokens were asked for; the count must be 0 or more")
        return -(-tokens // self.page_tokens)
