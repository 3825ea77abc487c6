"""Blocks in one native call against the same blocks one operation at a time."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import exeunt.compression.resident_blocks
import exeunt.kernels.blocks.native
from exeunt.compression.decoder import Decoder
from exeunt.compression.linear import FullLinear, Int4Linear, Linear
from exeunt.compression.linear_block import LinearBlock
from exeunt.compression.variant import KVFormat
from exeunt.kernels.int4_linear import quantize
from exeunt.kernels.native.library import native_library
from tests.compression.decoder_twin import block_linears, native_of, twin
from tests.compression.paged_generation import Sequences, assert_same_kv, kv_tensors
from tests.compression.reference_models import build_model, save

pytestmark = pytest.mark.skipif(
    native_library() is None, reason="needs the native kernels (a C++ compiler, and EXEUNT_NATIVE not 0)"
)

# Sizes and pieces that take different ways through the native code.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {}),  # layer norm, biases, learned positions, GELU's tanh form, no gate
    "gpt2-exact-gelu": ("gpt2", {"activation_function": "gelu"}),
    "gpt2-relu": ("gpt2", {"activation_function": "relu"}),
    "llama": ("llama", {}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-gelu": ("llama", {"hidden_act": "gelu_pytorch_tanh"}),
    "mistral": ("mistral", {"sliding_window": 6}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 14}),  # head norms; query rows that end inside a panel
}


def of_every_kind(test: Callable[..., None]) -> Callable[..., None]:
    """Run `test` for every model, format of pages, form of weights, and with a linear block and without."""
    kinds: dict[str, Iterable[object]] = {
        "name": MODELS,
        "format": ("full", "int4"),
        "int4": (False, True),
        "linear_block": (False, True),
    }
    for argument, values in kinds.items():
        test = pytest.mark.parametrize(argument, values)(test)
    return test


def a_decoder(name: str, directory: Path, dtype: torch.dtype, int4: bool, linear_block: bool) -> Decoder:
    family, changes = MODELS[name]
    decoder = Decoder.load(save(build_model(family, dtype, **changes), directory), dtype=dtype)
    if int4:
        linears: dict[int, dict[str, Linear]] = {block: {} for block in range(decoder.spec.blocks)}
        for block, packed in linears.items():
            for part, linear in block_linears(decoder, block).items():
                assert isinstance(linear, FullLinear)
                packed[part] = Int4Linear(quantize(linear.weight, 16), linear.bias)
        decoder = twin(decoder, linears)
    if linear_block:
        hidden = decoder.spec.hidden_size
        down, up = torch.randn(3, hidden) / 7, torch.randn(hidden, 3)
        decoder = decoder.with_linear_block(
            LinearBlock(2, *(t.to(dtype) for t in (down, up, torch.ones(hidden))))
        )
    return decoder


def _piecewise(monkeypatch: pytest.MonkeyPatch, decoder: Decoder) -> Decoder:
    """The same decoder without the native call."""
    with monkeypatch.context() as patch:
        patch.setattr(exeunt.compression.resident_blocks, "native_blocks", lambda *_: None)
        other = twin(decoder)
        assert native_of(other) is None  # asked once, and remembered
    return other


@of_every_kind
def test_one_call_does_what_the_operations_do(
    name: str,
    format: KVFormat,
    int4: bool,
    linear_block: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    decoder = a_decoder(name, tmp_path, torch.float32, int4, linear_block)
    reference = _piecewise(monkeypatch, decoder)
    tokens, blocks = 21, decoder.spec.blocks
    fast, slow = (Sequences(each, rows=2, max_tokens=60, format=format) for each in (decoder, reference))
    for spans in ([range(13), range(8)], [range(13, 14), range(8, 28)]):
        batch = fast.batch(spans)
        hidden = decoder.embed(torch.arange(tokens) + 3, batch.positions)
        got = decoder.run_blocks(hidden, batch, fast.pages, 0, blocks)
        expected = reference.run_blocks(hidden, batch, slow.pages, 0, blocks)
        if format == "full" and not int4:
            torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-5)
        # INT4 and INT8 round: what falls on an edge between two codes may fall to either side and move the state a bit
        assert float((got - expected).norm() / expected.norm()) < 0.03
        decoder.project_kv(hidden, batch, fast.pages, 1, blocks)
        reference.project_kv(hidden, batch, slow.pages, 1, blocks)
        for block in fast.pages.layout.blocks[1:]:
            for projected, wanted in zip(kv_tensors(fast, block), kv_tensors(slow, block), strict=True):
                assert_same_kv(projected, wanted, batch.slots, exact=False)
    assert native_of(decoder) is not None


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3"])
def test_bfloat16_rounds_where_the_operations_do(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = a_decoder(name, tmp_path, torch.bfloat16, False, False)
    reference = _piecewise(monkeypatch, decoder)
    fast, slow = Sequences(decoder), Sequences(reference)
    batch = fast.batch([range(30)])
    hidden = decoder.embed(torch.arange(30) + 3, batch.positions)
    got = decoder.run_blocks(hidden, batch, fast.pages, 0, decoder.spec.blocks)
    expected = reference.run_blocks(hidden, batch, slow.pages, 0, decoder.spec.blocks)
    assert got.dtype == torch.bfloat16
    error = (got.float() - expected.float()).norm() / expected.float().norm()
    assert float(error) < 0.01


@of_every_kind
def test_a_token_has_the_same_bits_in_any_company(
    name: str, format: KVFormat, int4: bool, linear_block: bool, tmp_path: Path
) -> None:
    decoder = a_decoder(name, tmp_path, torch.float32, int4, linear_block)
    blocks = decoder.spec.blocks
    crowd, alone = (Sequences(decoder, rows=3, max_tokens=40, format=format) for _ in range(2))
    ids = torch.arange(39) + 5
    spans = [range(17), range(9), range(13)]
    batch = crowd.batch(spans)
    together = decoder.run_blocks(decoder.embed(ids, batch.positions), batch, crowd.pages, 0, blocks)
    for cut in (
        [range(4), range(0), range(0)],
        [range(4, 16), range(0), range(0)],
        [range(16, 17), range(0), range(0)],
    ):
        part = alone.batch(cut)
        span = slice(cut[0].start, cut[0].stop)
        got = decoder.run_blocks(decoder.embed(ids[span], part.positions), part, alone.pages, 0, blocks)
        assert torch.equal(got, together[span])


@of_every_kind
def test_tiles_of_any_size_give_the_same_bits(
    name: str,
    format: KVFormat,
    int4: bool,
    linear_block: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Tiles end inside rows: a token attends to keys that another tile wrote."""
    decoder = a_decoder(name, tmp_path, torch.float32, int4, linear_block)
    blocks, ids = decoder.spec.blocks, torch.arange(39) + 5
    found = []
    for tile in (256, 1, 7):
        monkeypatch.setattr(exeunt.kernels.blocks.native, "TILE_TOKENS", tile)
        held = Sequences(decoder, rows=3, max_tokens=40, format=format)
        batch = held.batch([range(17), range(9), range(13)])
        states = decoder.run_blocks(decoder.embed(ids, batch.positions), batch, held.pages, 0, blocks)
        decoder.project_kv(states, batch, held.pages, 1, blocks)
        found.append((states, [kv_tensors(held, block) for block in held.pages.layout.blocks]))
    for states, pages in found[1:]:
        assert torch.equal(states, found[0][0])
        for got, expected in zip(pages, found[0][1], strict=True):
            for mine, theirs in zip(got, expected, strict=True):
                assert_same_kv(mine, theirs, batch.slots, exact=True)


class _Recording(FullLinear):
    """A linear that notes what it is given."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.seen = x
        return super().__call__(x)

    __slots__ = ("seen",)


def test_a_linear_of_another_kind_is_called(tmp_path: Path) -> None:
    decoder = a_decoder("llama", tmp_path, torch.float32, False, False)
    up = block_linears(decoder, 1)["gate_up"]
    assert isinstance(up, FullLinear)
    recording = _Recording(up.weight, up.bias)
    Sequences(twin(decoder, {1: {"gate_up": recording}})).run(torch.arange(6), 0)
    assert recording.seen.shape == (6, 48)


def test_pages_of_another_layout_are_refused(tmp_path: Path) -> None:
    decoder = a_decoder("llama", tmp_path, torch.float32, False, False)
    replaced = decoder.with_linear_block(
        LinearBlock(1, torch.zeros(1, 48), torch.zeros(48, 1), torch.zeros(48))
    )
    blocks, sparse = decoder.spec.blocks, Sequences(replaced)
    batch = sparse.batch([range(3)])
    hidden = decoder.embed(torch.arange(3), batch.positions)
    for call in (decoder.run_blocks, decoder.project_kv):
        with pytest.raises(ValueError, match="block 1 needs keys and values, the pages hold none"):
            call(hidden, batch, sparse.pages, 0, blocks)
    replaced.run_blocks(hidden, batch, sparse.pages, 0, blocks)
    other = load_other(tmp_path / "other", head_dim=20)
    wide = Sequences(other)
    with pytest.raises(ValueError, match=r"the pages have .* the blocks"):
        decoder.run_blocks(hidden, wide.batch([range(3)]), wide.pages, 0, blocks)


def load_other(directory: Path, **changes: Any) -> Decoder:
    return Decoder.load(save(build_model("llama", torch.float32, **changes), directory), dtype=torch.float32)


def test_what_does_not_fit_the_blocks_is_refused(tmp_path: Path) -> None:
    decoder = a_decoder("llama", tmp_path, torch.float32, False, False)
    blocks, sequence = decoder.spec.blocks, Sequences(decoder)
    batch, pages = sequence.batch([range(3)]), sequence.pages
    hidden = decoder.embed(torch.arange(3), batch.positions)
    for call in (decoder.run_blocks, decoder.project_kv):
        with pytest.raises(ValueError, match=f"the decoder has 0 to {blocks - 1}"):
            call(hidden, batch, pages, 0, blocks + 1)
        with pytest.raises(ValueError, match=f"the decoder has 0 to {blocks - 1}"):
            call(hidden, batch, pages, -1, 1)
        with pytest.raises(ValueError, match="expected dense"):
            call(hidden[:, :40], batch, pages, 0, blocks)
        with pytest.raises(ValueError, match=r"3 tokens and .* slots, expected 2 tokens"):
            call(hidden[:2], batch, pages, 0, blocks)
        with pytest.raises(ValueError, match=r"3 tokens and \[2\] .* slots"):
            call(hidden, replace(batch, slots=batch.slots[:2]), pages, 0, blocks)
    native, places = native_of(decoder), pages.native(0, blocks)
    assert decoder._rope is not None
    table = decoder._rope.table(batch.max_context)
    assert native is not None
    assert places is not None
    for bad in (
        table[:2],
        table.double(),
        table[:, :1].contiguous(),
        table[..., :4].contiguous(),
        table[::2],
    ):
        with pytest.raises(ValueError, match="the rotation is"):
            native.run(hidden, batch, places, bad, 0)
    half = Sequences(a_decoder("llama", tmp_path / "half", torch.bfloat16, False, False)).pages.native(
        0, blocks
    )
    assert half is not None
    with pytest.raises(ValueError, match="the pages hold"):
        native.run(hidden, batch, half, table, 0)
    with pytest.raises(ValueError, match="query_starts are"):
        decoder.run_blocks(hidden, replace(batch, query_starts=batch.query_starts[:1]), pages, 0, blocks)


def test_matrices_of_other_sizes_are_refused(tmp_path: Path) -> None:
    decoder = a_decoder("llama", tmp_path, torch.float32, False, False)
    sequence = Sequences(decoder)
    batch = sequence.batch([range(2)])
    hidden = decoder.embed(torch.arange(2), batch.positions)
    odd = twin(decoder, {1: {"down": FullLinear(torch.zeros(96, decoder.spec.intermediate_size))}})
    with pytest.raises(ValueError, match=r"block 1: down has .* 96 outputs, expected"):
        odd.run_blocks(hidden, batch, sequence.pages, 0, 2)
