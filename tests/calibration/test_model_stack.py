"""The variants of a model: streamed or resident, and what they share."""

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import exeunt.compression.streamed_blocks
from exeunt.calibration import memory_plan
from exeunt.calibration.kv_forward import FULL_READING, states_behind
from exeunt.calibration.memory_plan import (
    BATCH_BLOCKS,
    RESIDENT_SHARE,
    batch_token_bytes,
    block_bytes,
    full_batch_tokens,
    streams,
)
from exeunt.calibration.model_stack import ModelStack
from exeunt.calibration.sequence_batch import SequenceBatch, batches
from exeunt.calibration.teacher_forcing import ForcedModel
from exeunt.calibration.weights_int4 import Int4Weights
from exeunt.compression.block import Block
from exeunt.compression.block_weights import read_block
from exeunt.compression.checkpoint import Checkpoint, open_checkpoint
from exeunt.compression.checkpoint_names import linear_names
from exeunt.compression.kv_format import kv_layout, page_bytes_for
from exeunt.compression.linear import FullLinear
from exeunt.compression.linear_block import LinearBlock
from exeunt.compression.variant import Variant
from exeunt.kernels.int4_linear import Int4Weight, quantize
from exeunt.kernels.native.library import native_library
from tests.calibration.conftest import HIDDEN, VOCAB, random_exit
from tests.compression.specs import tiny_spec

CPU = torch.device("cpu")
ROWS = [torch.randint(0, VOCAB, (40,), generator=torch.Generator().manual_seed(row)) for row in range(5)]


@pytest.fixture(scope="module")
def opened(checkpoint: Path) -> Checkpoint:
    return open_checkpoint(checkpoint)


def int4_of(opened: Checkpoint) -> Int4Weights:
    weights, spec = opened.weights(), opened.spec
    packed: dict[tuple[int, str], Int4Weight] = {
        (block, name): quantize(weights.block(block)[f"{name}.weight"], 16)
        for block in range(spec.blocks)
        for name in linear_names(spec)
    }
    errors = dict.fromkeys(packed, 0.0)
    return Int4Weights(packed, quantize(weights.shared()["output.weight"], 16), 16, errors)


def stack_of(opened: Checkpoint, streamed: bool | None) -> ModelStack:
    stack = ModelStack.build(opened, int4_of(opened), "int4", CPU, torch.float32, streamed=streamed)
    hidden = torch.Generator().manual_seed(1)
    down, up = (torch.randn(2, HIDDEN, generator=hidden) / 6 for _ in range(2))
    return stack.with_linear_block(LinearBlock(2, down, up.T.contiguous(), torch.zeros(HIDDEN)))


def is_streamed(model: ForcedModel) -> bool:
    return model.decoder.streamed


def everything(model: ForcedModel, batch: SequenceBatch) -> list[Tensor]:
    """Logits at full depth, and those of every token where it leaves, in the order of the tokens."""
    states, final = model.full_depth_at_exits(batch)
    with torch.inference_mode():
        full = model.decoder.head(final)
    left = torch.full((batch.tokens, VOCAB), torch.nan)

    def note(number: int, tokens: Tensor, logits: Tensor) -> None:
        left[tokens] = logits

    model.with_exits(batch, 0.3, states[0], note)
    return [full, left]


@pytest.mark.skipif(
    native_library() is None, reason="needs the native kernels (a C++ compiler, and EXEUNT_NATIVE not 0)"
)
def test_every_variant_says_the_same_streamed_and_resident(opened: Checkpoint) -> None:
    exits = [random_exit(0, 3), random_exit(2, 4)]
    resident, streamed = stack_of(opened, False), stack_of(opened, True)
    assert len(resident.variants) == 8
    for variant in resident.variants:
        models = [stack.forced(variant, exits) for stack in (resident, streamed)]
        assert [is_streamed(model) for model in models] == [False, variant.weights == "full"]
        for batch in batches(ROWS, 120):
            for one, other in zip(*(everything(model, batch) for model in models), strict=True):
                assert not one.isnan().any()
                assert torch.equal(one, other)
    held = streamed.full.resident_bytes()["full"] - streamed.full.output.nbytes
    assert held * opened.spec.blocks == resident.full.resident_bytes()["full"] - resident.full.output.nbytes


def test_a_walk_from_block_to_block_holds_one_of_them(
    opened: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    stack, read, alive = stack_of(opened, True), list[weakref.ref[Tensor]](), list[int]()

    def watched(*args: Any, **options: Any) -> Block:
        alive.append(sum(reference() is not None for reference in read))
        block = read_block(*args, **options)
        assert isinstance(block.down, FullLinear)
        read.append(weakref.ref(block.down.weight))
        return block

    monkeypatch.setattr(exeunt.compression.streamed_blocks, "read_block", watched)
    with torch.inference_mode():
        states_behind(stack.full, list(batches(ROWS, 120)), [FULL_READING])
    assert alive == [0] * opened.spec.blocks


def test_streamed_full_weights_have_the_output_matrix_that_heads_train_through(opened: Checkpoint) -> None:
    stack = stack_of(opened, True)
    state = torch.randn(3, HIDDEN, requires_grad=True)
    stack.full.project(state).sum().backward()
    assert state.grad is not None
    assert state.grad.abs().sum() > 0
    assert stack.int4 is not None
    assert stack.full.project_exit.linear is stack.int4.output


@pytest.mark.parametrize("asked", [True, False])
def test_what_is_asked_for_is_done_whatever_memory_there_is(
    opened: Checkpoint, asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_plan, "free_bytes", lambda _: 2**50 if asked else 0)
    assert is_streamed(stack_of(opened, asked).forced(Variant("full", "full", False), ())) == asked


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_are_streamed_where_they_would_crowd_the_memory(
    opened: Checkpoint, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, seen = opened.spec, list[torch.device]()
    needed = spec.blocks * spec.block_parameters * dtype.itemsize
    for free, expected in ((needed / RESIDENT_SHARE + 1, False), (needed / RESIDENT_SHARE - 1, True)):

        def had(device: torch.device, free: float = free) -> float:
            seen.append(device)
            return free

        monkeypatch.setattr(memory_plan, "free_bytes", had)
        assert streams(spec, CPU, dtype) == expected
        stack = ModelStack.build(opened, None, "full", CPU, dtype)
        assert is_streamed(stack.forced(stack.deployed, ())) == expected
    assert set(seen) == {CPU}


def test_a_batch_through_full_weights_takes_the_memory_of_two_blocks(opened: Checkpoint) -> None:
    spec = tiny_spec(hidden_size=4096, intermediate_size=14336, heads=32, kv_heads=8, head_dim=128, blocks=32)
    wide = full_batch_tokens(spec, torch.float32, 16)
    room = BATCH_BLOCKS * block_bytes(spec, torch.float32)
    assert wide * batch_token_bytes(spec, torch.float32) <= room
    assert (wide + 1) * batch_token_bytes(spec, torch.float32) > room
    layout = kv_layout(spec, "full", torch.float32, page_bytes_for(spec, torch.float32))
    assert batch_token_bytes(spec, torch.float32) > layout.bytes_per_token
    assert full_batch_tokens(spec, torch.float32, 10**9) == 10**9
    stacks = [stack_of(opened, streamed) for streamed in (True, False)]
    assert len({stack.batch_tokens("full", 16) for stack in stacks}) == 1
    assert stacks[0].batch_tokens("int4", 16) == 16


def test_all_variants_keep_their_pages_in_one_arena(opened: Checkpoint) -> None:
    stack = stack_of(opened, False)
    small, large = (next(batches(rows, 10**6)) for rows in (ROWS[:1], ROWS))
    for variant in stack.variants:
        for batch in (small, large, small):
            stack.forced(variant, ()).pages(batch)
    pages = [stack.forced(variant, ()).pages(large) for variant in stack.variants]
    assert len({each.arena.data_ptr() for each in pages}) == 1
    needed = max(large.pages(each.layout.page_tokens) * each.layout.page_bytes for each in pages)
    assert pages[0].arena.untyped_storage().nbytes() == needed


def test_a_variant_does_not_mind_what_another_left_in_the_arena(opened: Checkpoint) -> None:
    exits = [random_exit(0, 3), random_exit(2, 4)]
    shared = stack_of(opened, False)
    (batch,) = batches(ROWS, 10**6)
    models = {variant: shared.forced(variant, exits) for variant in shared.variants}
    for variant, model in models.items():
        alone = ForcedModel(model.decoder, variant.kv_cache, exits)
        for one, other in zip(everything(model, batch), everything(alone, batch), strict=True):
            assert torch.equal(one, other)
