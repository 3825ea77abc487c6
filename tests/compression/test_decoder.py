"""What the decoder promises besides parity: ranges compose, projected KV is right, INT4 stays packed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import exeunt.compression.resident_blocks
from exeunt.compression.checkpoint_names import linear_shapes
from exeunt.compression.decoder import Decoder
from exeunt.compression.linear import FullLinear, Int4Linear, Linear
from exeunt.compression.linear_block import LinearBlock
from exeunt.kernels.int4_linear import quantize
from exeunt.kernels.native.library import native_library
from tests.compression.decoder_twin import block_linears, twin
from tests.compression.paged_generation import Sequences, assert_same_kv, chunked_logits, kv_tensors, written
from tests.compression.reference_models import build_model, save

FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "llama": {"attention_bias": True},
    "mistral": {"sliding_window": 6},
    "qwen2": {},
    "qwen3": {"head_dim": 14},
}
GROUP = 16
ROW_INVARIANT = native_library() is not None  # plain PyTorch's products depend on the shape they are part of


def _decoder(family: str, directory: Path, dtype: torch.dtype = torch.float32) -> Decoder:
    return Decoder.load(save(build_model(family, dtype, **FAMILIES[family]), directory), dtype=dtype)


def _quantised(decoder: Decoder) -> Decoder:
    """A twin whose linears are INT4."""
    quantised: dict[int, dict[str, Linear]] = {}
    for block in range(decoder.spec.blocks):
        linears = block_linears(decoder, block)
        assert {
            name: (each.out_features, each.in_features) for name, each in linears.items()
        } == linear_shapes(decoder.spec)
        quantised[block] = {}
        for name, linear in linears.items():
            assert isinstance(linear, FullLinear)
            quantised[block][name] = Int4Linear(quantize(linear.weight, GROUP), linear.bias)
    return twin(decoder, quantised)


def _linear_block(decoder: Decoder, index: int) -> LinearBlock:
    hidden, seed = decoder.spec.hidden_size, torch.Generator().manual_seed(7)
    down, up = torch.randn(3, hidden, generator=seed) / 7, torch.randn(hidden, 3, generator=seed)
    return LinearBlock(
        index, down.to(decoder.dtype), up.to(decoder.dtype), torch.ones(hidden, dtype=decoder.dtype)
    )


def _tokens(count: int) -> Tensor:
    return torch.randint(0, 131, (count,), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("family", FAMILIES)
def test_block_ranges_compose_to_the_bit(family: str, tmp_path: Path) -> None:
    decoder = _decoder(family, tmp_path)
    ids, blocks = _tokens(23), decoder.spec.blocks
    whole, parts = Sequences(decoder), Sequences(decoder)
    batch = whole.batch([range(23)])
    hidden = decoder.embed(ids, batch.positions)
    kept = hidden.clone()
    full = decoder.run_blocks(hidden, batch, whole.pages, 0, blocks)
    first = decoder.run_blocks(hidden, batch, parts.pages, 0, 2)
    second = decoder.run_blocks(first, batch, parts.pages, 2, blocks)
    assert torch.equal(full, second)
    assert torch.equal(hidden, kept), "the caller's state must survive, a backfill needs it"
    assert torch.equal(whole.pages.arena, parts.pages.arena)
    assert decoder.block_calls.calls == [2] * blocks
    assert decoder.block_calls.tokens == [2 * 23] * blocks


@pytest.mark.parametrize("weights", ["full", "int4"])
@pytest.mark.parametrize("format", ["full", "int4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_projected_kv_is_what_each_block_makes_of_the_exit_state(
    family: str, format: str, weights: str, tmp_path: Path
) -> None:
    decoder = _decoder(family, tmp_path)
    if weights == "int4":
        decoder = _quantised(decoder)
    ids, blocks = _tokens(11), decoder.spec.blocks
    together, own = (Sequences(decoder, format=format, max_tokens=40) for _ in range(2))  # type: ignore[arg-type]
    batch = together.batch([range(20, 31)])
    exit_state = decoder.embed(ids, batch.positions) * 3
    decoder.project_kv(exit_state, batch, together.pages, 1, blocks)
    for block in range(1, blocks):
        # A block writes its keys and values before it attends, so running it writes the same ones.
        own.pages.arena.copy_(together.pages.arena)
        for tensor in kv_tensors(own, block):
            tensor.zero_()
        decoder.run_blocks(exit_state, batch, own.pages, block, block + 1)
        for projected, expected in zip(kv_tensors(together, block), kv_tensors(own, block), strict=True):
            assert_same_kv(projected, expected, batch.slots, exact=ROW_INVARIANT)
    untouched = Sequences(decoder, format=format, max_tokens=40)  # type: ignore[arg-type]
    for tensor, blank in zip(kv_tensors(together, 0), kv_tensors(untouched, 0), strict=True):
        assert torch.equal(tensor.contiguous().view(torch.uint8), blank.contiguous().view(torch.uint8))


def test_stacked_kv_is_the_same_from_any_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        exeunt.compression.resident_blocks, "native_blocks", lambda *_: None
    )  # which needs no stack
    decoder = _decoder("qwen3", tmp_path)
    ids, blocks = _tokens(9), decoder.spec.blocks
    reference = Sequences(decoder)
    batch = reference.batch([range(9)])
    hidden = decoder.embed(ids, batch.positions)
    decoder.project_kv(hidden, batch, reference.pages, 1, blocks)
    for order in ([3, 2, 1], [1, 2, 3]):
        fresh, pages = twin(decoder), Sequences(decoder)
        for block in order:
            fresh.project_kv(hidden, batch, pages.pages, block, block + 1)
        for block in range(1, blocks):
            for got, expected in zip(kv_tensors(pages, block), kv_tensors(reference, block), strict=True):
                assert_same_kv(got, expected, batch.slots, exact=False)
        rows = 2 * decoder.spec.kv_size * (blocks - 1)
        assert fresh.resident_bytes()["kv_projection"] == rows * decoder.spec.hidden_size * 4


def test_bfloat16_projection_stays_near_the_blocks_own(tmp_path: Path) -> None:
    decoder = _decoder("llama", tmp_path, torch.bfloat16)
    together, own = Sequences(decoder), Sequences(decoder)
    batch = together.batch([range(17)])
    hidden = decoder.embed(_tokens(17), batch.positions)
    decoder.project_kv(hidden, batch, together.pages, 2, 4)
    for block in (2, 3):
        decoder.run_blocks(hidden, batch, own.pages, block, block + 1)
        for got, expected in zip(kv_tensors(together, block), kv_tensors(own, block), strict=True):
            got, expected = (written(t, batch.slots).float() for t in (got, expected))
            assert (got - expected).square().mean() < 1e-4 * expected.square().mean()


@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_the_linear_block_stands_in_for_its_block(family: str, tmp_path: Path) -> None:
    decoder = _decoder(family, tmp_path)
    linear = _linear_block(decoder, 2)
    replaced = decoder.with_linear_block(linear)
    pages = Sequences(replaced)
    assert pages.pages.layout.blocks == (0, 1, 3)
    batch = pages.batch([range(13)])
    hidden = decoder.embed(_tokens(13), batch.positions)
    other = Sequences(decoder)
    whole = other.batch([range(13)])  # the same tokens, fewer to the page: block 2 has its share of it
    before = decoder.run_blocks(hidden, whole, other.pages, 0, 2)
    expected = decoder.run_blocks(linear.apply(before), whole, other.pages, 3, 4)
    assert torch.equal(replaced.run_blocks(hidden, batch, pages.pages, 0, 4), expected)
    assert replaced.block_calls.calls == [1, 1, 1, 1]

    replaced.project_kv(before, batch, pages.pages, 1, 4)  # skips block 2, which has no pages
    decoder.project_kv(before, whole, other.pages, 1, 4)
    for block in (1, 3):
        for got, wanted in zip(kv_tensors(pages, block), kv_tensors(other, block), strict=True):
            torch.testing.assert_close(written(got, batch.slots), written(wanted, whole.slots))
    with pytest.raises(ValueError, match="no block 4"):
        decoder.with_linear_block(_linear_block(decoder, 4))


@pytest.mark.parametrize("family", FAMILIES)
def test_int4_weights_stay_packed_and_share_the_rest(family: str, tmp_path: Path) -> None:
    decoder = _decoder(family, tmp_path)
    int4 = _quantised(decoder)
    sizes, full = int4.resident_bytes(), decoder.resident_bytes()
    assert sizes["full"] == (
        0 if decoder.spec.tied else 4 * decoder.spec.vocab_size * decoder.spec.hidden_size
    )
    weights = decoder.spec.blocks * sum(out * into for out, into in linear_shapes(decoder.spec).values())
    output = 0 if decoder.spec.tied else 4 * decoder.spec.vocab_size * decoder.spec.hidden_size
    assert full["full"] == 4 * weights + output
    # half a byte a weight and two float16 for every group; panels of 16 outputs and steps of 8 inputs are padded
    assert weights * (0.5 + 4 / GROUP) <= sizes["int4"] <= 1.5 * weights * (0.5 + 4 / GROUP)
    assert sizes["embedding"] == full["embedding"]
    assert sizes["norms"] == full["norms"]
    assert int4._embedding is decoder._embedding
    assert full["int4"] == 0, "quantising the twin must not touch the decoder it came from"
    logits, exact = (chunked_logits(each, _tokens(30), [30]) for each in (int4, decoder))
    assert 0 < (logits - exact).square().mean() < 0.2 * exact.square().mean()


def test_an_int4_layer_cut_out_of_a_packed_one_gives_its_bits() -> None:
    seed = torch.Generator().manual_seed(0)
    layer = Int4Linear(quantize(torch.randn(75, 50, generator=seed), GROUP), torch.randn(75, generator=seed))
    x = torch.randn(7, 50, generator=seed)
    whole = layer(x)
    for start, stop in ((0, 75), (0, 5), (3, 40), (16, 48), (33, 75), (74, 75)):
        part = layer.rows(start, stop)
        assert part.out_features == stop - start
        tolerance: dict[str, Any] = {"rtol": 0, "atol": 0} if ROW_INVARIANT else {}
        torch.testing.assert_close(part(x), whole[:, start:stop], **tolerance)
        torch.testing.assert_close(part.rows(0, 1)(x), whole[:, start : start + 1], **tolerance)


@pytest.mark.skipif(
    not ROW_INVARIANT, reason="needs the native kernels (a C++ compiler, and EXEUNT_NATIVE not 0)"
)
@pytest.mark.parametrize("format", ["full", "int4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_int4_states_are_the_same_bits_however_the_text_is_cut(
    family: str, format: str, tmp_path: Path
) -> None:
    decoder = _quantised(_decoder(family, tmp_path))
    ids = _tokens(33)
    whole = Sequences(decoder, format=format).run(ids, 0)  # type: ignore[arg-type]
    cut = Sequences(decoder, format=format)  # type: ignore[arg-type]
    spans = ((0, 1), (1, 8), (8, 9), (9, 10), (10, 33))
    assert torch.equal(torch.cat([cut.run(ids[start:stop], start) for start, stop in spans]), whole)
    crowd = Sequences(decoder, rows=3, format=format)  # type: ignore[arg-type]
    batch = crowd.batch([range(33), range(20), range(7)])
    hidden = decoder.embed(torch.cat([ids, ids[3:23], ids[5:12]]), batch.positions)
    assert torch.equal(decoder.run_blocks(hidden, batch, crowd.pages, 0, decoder.spec.blocks)[:33], whole)
