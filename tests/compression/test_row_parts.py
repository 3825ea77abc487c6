"""Passes that threads cut between rows (kernels/native/row_parts.h): where they are cut, and that no bit shows it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

import exeunt.compression.native_blocks
import exeunt.kernels.blocks.native
from exeunt.compression.decoder import Decoder
from exeunt.compression.variant import KVFormat
from exeunt.kernels.blocks import NativeBlocks
from exeunt.kernels.native.descriptors import Matrix
from exeunt.kernels.native.library import native_library
from tests.compression.paged_generation import Sequences
from tests.compression.staged_pass import ALL, STEP, compared
from tests.compression.test_native_blocks import a_decoder, load_other

pytestmark = pytest.mark.skipif(
    native_library() is None, reason="needs the native kernels (a C++ compiler, and EXEUNT_NATIVE not 0)"
)

DECODE = (1, 1, 1, 1, 1)  # tokens by row
LONG = (6, 1, 1, 1, 1, 1)
LATE = (1, 1, 6, 1, 1, 1)
TWO = (9, 7)
MANY = (1, 3, 1, 1, 2, 1, 1, 5, 1, 1, 1)


@pytest.fixture(autouse=True)
def parts_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes of these small models are cut as those of larger ones are."""
    monkeypatch.setattr(exeunt.compression.native_blocks, "OWN_ROWS_WORK", 0)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """So many threads in the native kernels."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def passed(
    decoder: Decoder, lengths: Sequence[int], count: int = 1, format: KVFormat = "full"
) -> tuple[Tensor, Tensor]:
    """States [tokens, hidden] behind all blocks of rows that each have a past, and the arena of their pages.

    `lengths` are the rows' tokens in the pass, which `count` threads make.
    """
    held = Sequences(decoder, rows=len(lengths), max_tokens=110, format=format)
    pasts = [3 + 4 * row for row in range(len(lengths))]
    spans = [range(past, past + length) for past, length in zip(pasts, lengths, strict=True)]
    for its_threads, rows in ((1, [range(past) for past in pasts]), (count, spans)):
        batch = held.batch(rows)
        hidden = decoder.embed(torch.arange(batch.tokens) % 120, batch.positions)
        with threads(its_threads):
            states = decoder.run_blocks(hidden, batch, held.pages, 0, decoder.spec.blocks)
    return states, held.pages.arena


def every_thread_count(decoder: Decoder, format: KVFormat) -> None:
    """Hold passes of several threads to those of one: states, and all bytes of the pages."""
    for lengths in (DECODE, LONG, LATE, TWO, MANY):
        states, arena = passed(decoder, lengths, 1, format)
        assert states.isfinite().all()
        for count in (2, 3, 4, 7):
            got, pages = passed(decoder, lengths, count, format)
            assert torch.equal(got, states)
            assert torch.equal(pages, arena)


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral"])
@pytest.mark.parametrize("format", ["full", "int4"])
@pytest.mark.parametrize("int4", [False, True])
def test_any_number_of_threads_gives_the_same_bits(
    name: str, format: KVFormat, int4: bool, tmp_path: Path
) -> None:
    every_thread_count(a_decoder(name, tmp_path, torch.float32, int4, linear_block=True), format)


@pytest.mark.parametrize("format", ["full", "int4"])
def test_any_number_of_threads_gives_the_same_bits_in_bfloat16(format: KVFormat, tmp_path: Path) -> None:
    every_thread_count(a_decoder("qwen3", tmp_path, torch.bfloat16, False, linear_block=False), format)


@pytest.mark.parametrize("format", ["full", "int4"])
def test_a_whole_pass_of_several_threads_has_the_bits_of_its_stages(format: KVFormat, tmp_path: Path) -> None:
    decoder = a_decoder("llama", tmp_path, torch.float32, False, linear_block=True)
    for cases in (STEP, ALL):
        with threads(3):
            several = compared(decoder, format, cases)
        alone = compared(decoder, format, cases)
        assert torch.equal(several.states, alone.states)
        assert torch.equal(several.logits, alone.logits)


@pytest.fixture
def scratch(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What native passes have worked in since, NaN where they wrote nothing."""
    made: list[Tensor] = []
    room = NativeBlocks.scratch

    def kept(blocks: NativeBlocks, tokens: int) -> Tensor:
        made.append(room(blocks, tokens).fill_(torch.nan))
        return made[-1]

    monkeypatch.setattr(NativeBlocks, "scratch", kept)
    return made


def parts(decoder: Decoder, lengths: Sequence[int], count: int, scratch: list[Tensor]) -> list[int]:
    """The first tokens of the parts into which a pass of `count` threads is cut.

    Each part works in a piece of the scratch as long as its share of the tokens, and keeps queries, keys and values at
    the front of it: where those of a token lie says whether a part begins with it.
    """
    spec, tokens = decoder.spec, sum(lengths)
    width = (spec.heads + 2 * spec.kv_heads) * spec.head_dim
    passed(decoder, lengths)
    rows = scratch[-1][: tokens * width].view(tokens, width)
    passed(decoder, lengths, count)
    found, share = [0], len(scratch[-1]) // tokens
    for token in range(1, tokens):
        before = found[-1] * share + (token - found[-1]) * width
        at_front, behind = (scratch[-1][at : at + width] for at in (token * share, before))
        if torch.equal(at_front, rows[token]):
            found.append(token)
        else:
            assert torch.equal(behind, rows[token])
    return found


@pytest.mark.parametrize(
    ("lengths", "count", "firsts"),
    [
        (DECODE, 1, [0]),
        (DECODE, 2, [0, 3]),  # the longer a context the dearer
        (DECODE, 3, [0, 2, 3]),
        (DECODE, 4, [0, 1, 3, 4]),
        (DECODE, 7, [0, 1, 2, 3, 4]),
        (LONG, 2, [0, 6]),
        (LONG, 3, [0, 6, 7]),
        (LATE, 2, [0]),  # 8 tokens or 9 of 11 in one part
        (LATE, 3, [0, 2, 8]),
        (TWO, 2, [0, 9]),
        (TWO, 7, [0, 9]),
        (MANY, 4, [0, 5, 9, 15]),
        ((9, 4), 2, [0]),
        ((40, 1, 1, 1), 2, [0]),
        ((5,), 2, [0]),
    ],
)
def test_short_passes_are_cut_between_rows(
    lengths: tuple[int, ...], count: int, firsts: list[int], scratch: list[Tensor], tmp_path: Path
) -> None:
    decoder = a_decoder("llama", tmp_path, torch.float32, False, linear_block=True)
    assert parts(decoder, lengths, count, scratch) == firsts


def test_long_passes_are_cut_where_all_threads_get_as_much(scratch: list[Tensor], tmp_path: Path) -> None:
    """For 120 tokens threads can share products of these full weights, and none yet of the INT4 ones."""
    full, int4 = (
        a_decoder("llama", tmp_path, torch.float32, int4, linear_block=False) for int4 in (False, True)
    )
    assert parts(full, (60, 60), 2, scratch) == [0, 60]
    assert parts(full, (60, 60), 3, scratch) == [0]
    assert parts(full, (90, 30), 2, scratch) == [0]
    assert parts(int4, (60, 60), 3, scratch) == [0, 60]
    assert parts(int4, (70, 50), 2, scratch) == [0, 70]
    assert parts(int4, (90, 30), 2, scratch) == [0]


def test_passes_that_are_over_at_once_are_not_cut(
    scratch: list[Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = 2 * sum(block.inputs * block.outputs for block in _matrices(load_other(tmp_path / "any")))
    for least, firsts in ((work, [0, 1]), (work + 1, [0])):
        monkeypatch.setattr(exeunt.compression.native_blocks, "OWN_ROWS_WORK", least)
        assert parts(load_other(tmp_path / str(least)), (1, 1), 2, scratch) == firsts


def _matrices(decoder: Decoder) -> list[Matrix]:
    blocks = decoder.native_blocks
    assert blocks is not None
    return [matrix for part in blocks.parts for matrix in (part.qkv, part.out, part.up, part.down)]


def test_passes_of_several_tiles_are_not_cut(
    scratch: list[Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = a_decoder("llama", tmp_path, torch.float32, False, linear_block=False)
    monkeypatch.setattr(exeunt.kernels.blocks.native, "TILE_TOKENS", 4)
    states, arena = passed(decoder, DECODE)
    got, pages = passed(decoder, DECODE, 2)
    assert torch.equal(got, states)
    assert torch.equal(pages, arena)
    assert torch.equal(scratch[-1].nan_to_num(), scratch[1].nan_to_num())


def test_blocks_that_do_not_fit_the_caches_are_not_cut(scratch: list[Tensor], tmp_path: Path) -> None:
    small, large = (load_other(tmp_path / str(n), intermediate_size=n) for n in (7000, 7500))
    assert parts(small, (1, 1), 2, scratch) == [0, 1]
    assert parts(large, (1, 1), 2, scratch) == [0]
