"""The page allocator against a model of it: no page is lost, doubled or handed to two holders."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from exeunt.server.pages import OutOfPagesError, PageOwnershipError, PagePool, PageTable


class PagesMachine(RuleBasedStateMachine):
    """Random growth, roll-back and clearing of several tables (of two layouts) over one pool."""

    @initialize(num_pages=st.integers(0, 24), page_tokens=st.lists(st.integers(1, 9), min_size=1, max_size=4))
    def start(self, num_pages: int, page_tokens: list[int]) -> None:
        self.pool = PagePool(num_pages)
        self.tables = [PageTable(self.pool, tokens) for tokens in page_tokens]

    @rule(which=st.integers(0, 3), tokens=st.integers(0, 80))
    def ensure(self, which: int, tokens: int) -> None:
        table = self.tables[which % len(self.tables)]
        before, free = list(table.pages), self.pool.free
        wanted = max(0, -(-tokens // table.page_tokens) - len(before))
        assert table.missing(tokens) == wanted
        if wanted > free:
            with pytest.raises(OutOfPagesError) as error:
                table.ensure(tokens)
            assert (error.value.wanted, error.value.free) == (wanted, free)
            assert table.pages == before
            assert self.pool.free == free
        else:
            table.ensure(tokens)
            assert table.capacity >= tokens
            assert table.pages[: len(before)] == before
            assert self.pool.free == free - wanted

    @rule(which=st.integers(0, 3), tokens=st.integers(0, 80))
    def truncate(self, which: int, tokens: int) -> None:
        table = self.tables[which % len(self.tables)]
        before, free = list(table.pages), self.pool.free
        table.truncate(tokens)
        keep = min(len(before), -(-tokens // table.page_tokens))
        assert table.pages == before[:keep]
        assert self.pool.free == free + len(before) - keep

    @rule(which=st.integers(0, 3))
    def clear(self, which: int) -> None:
        table = self.tables[which % len(self.tables)]
        table.clear()
        assert table.pages == []
        assert table.capacity == 0

    @precondition(lambda self: any(table.pages for table in self.tables))
    @rule()
    def positions_have_slots_of_their_own(self) -> None:
        slots = [(t.page_tokens, s) for t in self.tables for s in t.slots(0, t.capacity)]
        bytes_used = {(s // tokens, s % tokens) for tokens, s in slots}
        assert len(bytes_used) == len(slots)

    @invariant()
    def numbers_are_the_pages(self) -> None:
        for table in self.tables:
            assert table.numbers.dtype == np.int32
            assert table.numbers.tolist() == table.pages

    @invariant()
    def books_add_up(self) -> None:
        self.pool.check_integrity(self.tables)
        assert self.pool.used == sum(len(table.pages) for table in self.tables)
        assert self.pool.free + self.pool.used == self.pool.num_pages


TestPages = PagesMachine.TestCase
TestPages.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


@given(counts=st.lists(st.integers(0, 6), max_size=12))
def test_pages_are_distinct_and_in_range(counts: list[int]) -> None:
    pool = PagePool(32)
    held: list[int] = []
    for count in counts:
        if count > pool.free:
            with pytest.raises(OutOfPagesError):
                pool.allocate(count)
        else:
            held += pool.allocate(count)
    assert len(set(held)) == len(held)
    assert all(0 <= page < 32 for page in held)
    pool.release(held)
    assert pool.free == 32
    assert sorted(pool.allocate(32)) == list(range(32))


def test_slot_is_page_times_page_tokens_plus_offset() -> None:
    pool = PagePool(8)
    pool.allocate(3)
    table = PageTable(pool, page_tokens=4)
    table.ensure(9)
    assert table.slots(3, 9) == [
        table.pages[0] * 4 + 3,
        *(table.pages[1] * 4 + offset for offset in range(4)),
        table.pages[2] * 4,
    ]
    with pytest.raises(IndexError):
        table.slot(12)


@pytest.mark.parametrize("wrong", [[0, 0], [0, 5], [0, 99], [0, -1]], ids=str)
def test_a_wrong_release_is_refused_whole(wrong: list[int]) -> None:
    pool = PagePool(6)
    assert pool.allocate(3) == [0, 1, 2]
    with pytest.raises(PageOwnershipError):
        pool.release(wrong)
    assert pool.used == 3
    pool.check_integrity()
    pool.release([0, 1, 2])
    assert pool.free == 6


def test_a_leak_and_a_shared_page_are_found() -> None:
    pool = PagePool(4)
    table, other = PageTable(pool, 2), PageTable(pool, 2)
    table.ensure(4)
    leaked = pool.allocate(1)
    with pytest.raises(PageOwnershipError, match="3 pages are held but 2 stand"):
        pool.check_integrity([table, other])
    pool.release(leaked)
    other.pages.append(table.pages[0])
    with pytest.raises(PageOwnershipError, match="two page tables"):
        pool.check_integrity([table, other])


@pytest.mark.parametrize("call", [lambda: PagePool(-1), lambda: PageTable(PagePool(1), 0)])
def test_sizes_below_the_least_are_refused(call: object) -> None:
    assert callable(call)
    with pytest.raises(ValueError, match=r"it must be|at least"):
        call()


def test_negative_counts_are_refused() -> None:
    pool = PagePool(4)
    with pytest.raises(ValueError, match="-1 pages"):
        pool.allocate(-1)
    with pytest.raises(ValueError, match="-2 tokens"):
        PageTable(pool, 4).truncate(-2)


def test_the_module_does_not_import_torch() -> None:
    code = "import sys, exeunt.server.pages; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
