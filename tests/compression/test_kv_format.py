"""Pages of every layout: equal bytes, disjoint regions, the tokens they promise."""

import pytest
import torch

from exeunt.compression.kv_format import KVLayout, KVLayoutError, KVPages, page_bytes_for
from exeunt.compression.variant import KVFormat
from tests.compression.specs import tiny_spec


def _layout(format: KVFormat, blocks: tuple[int, ...] = (0, 1, 2), **changes: object) -> KVLayout:
    settings = {"kv_heads": 3, "head_dim": 10, "dtype": torch.bfloat16, "page_bytes": 6400, **changes}
    return KVLayout(format, blocks, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("format", ["full", "int4"])
@pytest.mark.parametrize("blocks", [(0, 1, 2), (0, 2), (5,)])
@pytest.mark.parametrize("offset", [0, 64])
def test_regions_are_disjoint_and_inside_their_page(
    format: KVFormat, blocks: tuple[int, ...], offset: int
) -> None:
    layout = _layout(format, blocks)
    arena = torch.zeros(offset + 4 * layout.page_bytes, dtype=torch.uint8)[offset:]
    pages = KVPages(layout, arena)
    assert pages.num_pages == 4
    page = 2
    for block in blocks:
        kv = pages.block(block)
        assert kv.page_tokens == layout.page_tokens
        for tensor in (kv.keys, kv.values, kv.key_params, kv.value_params):
            if tensor is None:
                assert format == "full"
                continue
            before = arena.clone()
            assert not tensor[page].contiguous().view(torch.uint8).any(), "two regions share bytes"
            tensor[page] = 1
            assert not arena[: page * layout.page_bytes].any()
            assert not arena[(page + 1) * layout.page_bytes :].any()
            assert not torch.equal(arena, before)
    held = len(blocks) * layout.page_tokens * layout.bytes_per_token // len(blocks)
    assert held <= layout.page_bytes


def test_what_a_layout_saves_is_more_tokens_to_the_page() -> None:
    full, int4 = _layout("full"), _layout("int4")
    assert full.bytes_per_token == 3 * 2 * 3 * 10 * 2
    assert int4.bytes_per_token == 3 * 2 * 3 * (5 + 4)
    assert full.page_tokens == 17  # 6400 // 3 is 2133, 2112 in whole cache lines, 120 bytes a token
    assert int4.page_tokens == 39
    assert _layout("full", (0, 2)).page_tokens == 26
    assert _layout("full", (0, 2)).slot_of(2) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_common_page_holds_the_asked_tokens_of_every_block(dtype: torch.dtype) -> None:
    spec = tiny_spec(blocks=5, kv_heads=3, head_dim=14)
    size = page_bytes_for(spec, dtype, page_tokens=16)
    layout = KVLayout("full", tuple(range(5)), 3, 14, dtype, size)
    assert size % 64 == 0
    assert layout.page_tokens == 16
    int4 = KVLayout("int4", tuple(range(5)), 3, 14, dtype, size)
    assert int4.page_tokens >= 16 * layout.bytes_per_token // int4.bytes_per_token


def test_impossible_layouts_are_refused_with_the_reason() -> None:
    with pytest.raises(KVLayoutError, match="even head size; this model's is 9"):
        _layout("int4", head_dim=9)
    with pytest.raises(KVLayoutError, match="multiple of 64"):
        _layout("full", page_bytes=6401)
    with pytest.raises(KVLayoutError, match="360 bytes in 3 blocks; a page has only 192"):
        _layout("full", page_bytes=192)
    layout = _layout("full", (0, 2))
    with pytest.raises(KVLayoutError, match="Block 1 holds no keys"):
        layout.slot_of(1)
    with pytest.raises(KVLayoutError, match="multiple of 6400 bytes"):
        KVPages(layout, torch.zeros(6401, dtype=torch.uint8))
    pages = KVPages(layout, torch.zeros(6400, dtype=torch.uint8))
    with pytest.raises(KVLayoutError, match="Block 1 holds no keys"):
        pages.block(1)
