"""What stays in memory after real generation: INT4 weights and keys and values are never kept in full precision."""

import gc

import pytest
import torch
from torch import Tensor

from exeunt.compression.checkpoint_names import linear_shapes
from exeunt.compression.model import LoadedModel, load_bundle
from exeunt.compression.variant import Variant
from exeunt.server.pages import PagePool
from exeunt.server.request import ExitPolicy
from tests.compression.small_bundles import small_bundle, small_checkpoint
from tests.server.conftest import VOCAB, byte_tokenizer
from tests.server.engine_bench import OFF, Bench, running

PAGES = 40
LEAVE_AT_ONCE = ExitPolicy("approximate", threshold=0.0)
PROMPT = tuple(b"Exit, pursued by a bear. " * 4)


@pytest.fixture(scope="module")
def packed_model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """A bundle that holds both precisions, loaded with INT4 weights alone."""
    folder = tmp_path_factory.mktemp("packed")
    # heads wider than the model, so that no linear has the shape of an exit's adapter
    checkpoint = small_checkpoint(
        folder / "checkpoint", vocab_size=VOCAB, head_dim=10, max_position_embeddings=512
    )
    byte_tokenizer().save_pretrained(checkpoint)
    return load_bundle(small_bundle(folder / "bundle", checkpoint).path, weights="int4")


def alive() -> list[Tensor]:
    gc.collect()
    return [each for each in gc.get_objects() if issubclass(type(each), Tensor)]


def storages(tensors: list[Tensor]) -> dict[int, int]:
    """Bytes by address, what several tensors view counted once."""
    found = [tensor.untyped_storage() for tensor in tensors]
    return {storage.data_ptr(): storage.nbytes() for storage in found}


def generate_on_every_variant(bench: Bench, model: LoadedModel) -> None:
    asked = [
        bench.ask(prompt=PROMPT, variant=variant, exits=exits, max_new_tokens=20)
        for variant in model.variants
        for exits in (OFF, LEAVE_AT_ONCE)
    ]
    for heard in asked:
        assert len(heard.wait().ids()) == 20


def test_packed_weights_stay_packed_while_they_are_used(packed_model: LoadedModel) -> None:
    model = packed_model
    assert {variant.weights for variant in model.variants} == {"int4"}
    assert len(model.variants) == 4
    shapes = set(linear_shapes(model.spec).values())
    before = model.resident_bytes()
    others = {id(tensor): tensor for tensor in alive()}
    with running(model, pages=PAGES) as bench:
        generate_on_every_variant(bench, model)
        after = model.resident_bytes()
        new = [tensor for tensor in alive() if id(tensor) not in others]
        arenas = {pages.arena.data_ptr() for pages in bench.engine._runner._pages.values()}
        kept = {at: size for at, size in storages(new).items() if at not in storages(list(others.values()))}
        snapshot = bench.engine.snapshot()
    assert after["full"] == before["full"] == 0
    assert after["int4"] == before["int4"] > 0
    assert after["kv_projection"] == 0  # the stack of full-precision rows is for full weights
    assert {k: v for k, v in after.items() if k != "rope"} == {k: v for k, v in before.items() if k != "rope"}
    assert not [t for t in new if t.is_floating_point() and {tuple(t.shape), tuple(t.shape)[::-1]} & shapes]
    # one arena for all formats, of the size it was given; beside it tables of positions and nothing of a linear's size
    (arena,) = arenas
    assert kept.pop(arena) == PAGES * snapshot.page_bytes
    smallest = 4 * min(out * fan_in for out, fan_in in shapes)
    assert sum(kept.values()) < after["rope"] - before["rope"] + smallest


@pytest.mark.parametrize("linear_block", [False, True])
def test_int4_keys_and_values_take_int4_pages(
    packed_model: LoadedModel, monkeypatch: pytest.MonkeyPatch, linear_block: bool
) -> None:
    """While it runs, a sequence holds as many pages as its format needs, which for INT4 is a fraction."""
    used: list[int] = []
    allocate = PagePool.allocate

    def watched(pool: PagePool, count: int) -> list[int]:
        pages = allocate(pool, count)
        used.append(pool.used)
        return pages

    monkeypatch.setattr(PagePool, "allocate", watched)
    held: dict[str, int] = {}
    for kv in ("int4", "full"):
        variant = Variant("int4", kv, linear_block)
        with running(packed_model, pages=PAGES) as bench:
            used.clear()
            bench.answer(prompt=PROMPT, variant=variant, max_new_tokens=200)
            layout = bench.engine._runner._pages[variant].layout
            tokens = len(PROMPT) + 200 - 1  # the last token's keys and values are never needed
            held[kv] = max(used)
            assert held[kv] == -(-tokens // layout.page_tokens)
            for block in layout.blocks:
                views = bench.engine._runner._pages[variant].block(block)
                assert views.keys.dtype == (torch.uint8 if kv == "int4" else packed_model.dtype)
    head = packed_model.spec.head_dim
    assert held["int4"] <= held["full"] * (head / 2 + 4) / (head * 4) + 1
