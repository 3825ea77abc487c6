"""Writing keys and values: the rotation, the quantiser's bound, the packed layout, native against reference."""

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from exeunt.kernels.int4_linear.weight import unpack_nibbles
from exeunt.kernels.native.library import native_library
from exeunt.kernels.paged_batch import KVBlock
from exeunt.kernels.write_kv import hadamard_block, rotate, write_kv
from exeunt.kernels.write_kv.reference import quantize_heads, write_kv_reference

Make = Callable[..., KVBlock]


def copy_of(block: KVBlock) -> KVBlock:
    return replace(
        block,
        keys=block.keys.clone(),
        values=block.values.clone(),
        key_params=None if block.key_params is None else block.key_params.clone(),
        value_params=None if block.value_params is None else block.value_params.clone(),
    )


def bits_of(block: KVBlock) -> list[torch.Tensor]:
    tensors = (block.keys, block.values, block.key_params, block.value_params)
    return [tensor.contiguous().view(torch.uint8) for tensor in tensors if tensor is not None]


@pytest.mark.parametrize(
    ("head_dim", "block"), [(64, 64), (80, 16), (96, 32), (2, 2), (5, 1), (128, 128), (24, 8)]
)
def test_rotation_is_orthonormal_within_blocks(seed: int, head_dim: int, block: int) -> None:
    assert hadamard_block(head_dim) == block
    matrix = rotate(torch.eye(head_dim))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(head_dim), atol=1e-6, rtol=0)
    inside = torch.block_diag(*[torch.ones(block, block)] * (head_dim // block))
    assert torch.equal(matrix != 0, inside != 0)
    queries, keys = torch.randn(7, head_dim), torch.randn(9, head_dim)
    torch.testing.assert_close(rotate(queries) @ rotate(keys).T, queries @ keys.T, atol=1e-4, rtol=1e-4)


def test_rotation_tames_an_outlier_channel(seed: int) -> None:
    keys = torch.randn(50, 64)
    keys[:, 3] += 40.0

    def error(x: torch.Tensor) -> float:
        codes, params = quantize_heads(x)
        restored = unpack_nibbles(codes) * params[:, :1].float() + params[:, 1:].float()
        return float((restored - x).square().mean())

    assert error(rotate(keys)) < error(keys) / 4


def test_quantised_heads_stay_within_the_bound(seed: int) -> None:
    x = torch.randn(40, 3, 96) * torch.logspace(-3, 3, 40)[:, None, None]
    codes, params = quantize_heads(x)
    assert codes.shape == (40, 3, 48)
    assert params.dtype == torch.float16
    scale, minimum = params[..., :1].float(), params[..., 1:].float()
    error = (unpack_nibbles(codes) * scale + minimum - x).abs()
    assert bool((error <= scale / 2 + 2**-11 * (minimum.abs() + 15 * scale) + 1e-6).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("int4", [False, True])
@pytest.mark.parametrize(
    ("kv_heads", "head_dim", "page_tokens"), [(2, 16, 16), (1, 80, 57), (3, 24, 5), (1, 128, 1)]
)
def test_native_and_reference_write_the_same_bits(
    seed: int, new_block: Make, dtype: torch.dtype, int4: bool, kv_heads: int, head_dim: int, page_tokens: int
) -> None:
    block = new_block(40, kv_heads, page_tokens, head_dim, dtype, int4)
    expected = copy_of(block)
    for tokens in (0, 1, 33):
        slots = torch.randperm(40 * page_tokens)[:tokens]
        fused = (
            torch.randn(tokens, 3 * kv_heads * head_dim).to(dtype) * 5
        )  # as a fused projection hands them over
        keys, values = (part.reshape(tokens, kv_heads, head_dim) for part in fused.chunk(3, dim=1)[1:])
        write_kv(keys, values, slots, block)
        write_kv_reference(keys, values, slots, expected)
    for ours, theirs in zip(bits_of(block), bits_of(expected), strict=True):
        assert torch.equal(ours, theirs)


def test_each_token_lands_in_its_slot_whatever_comes_with_it(seed: int, new_block: Make) -> None:
    together, apart = (new_block(5, 2, 16, 32, torch.float32, True) for _ in range(2))
    keys, values, slots = torch.randn(20, 2, 32), torch.randn(20, 2, 32), torch.randperm(80)[:20]
    write_kv(keys, values, slots, together)
    for token in torch.randperm(20).tolist():
        write_kv(keys[token : token + 1], values[token : token + 1], slots[token : token + 1], apart)
    for left, right in zip(bits_of(together), bits_of(apart), strict=True):
        assert torch.equal(left, right)


def test_int4_pages_hold_four_bits_a_value(new_block: Make) -> None:
    block = new_block(4, 2, 16, 64, torch.float32, True)
    assert block.is_int4
    assert block.key_params is not None
    assert block.keys.numel() + block.key_params.numel() * 2 == 4 * 2 * 16 * (64 // 2 + 4)


@pytest.mark.skipif(
    native_library() is None, reason="needs the native kernels (a C++ compiler, and EXEUNT_NATIVE not 0)"
)
def test_a_value_that_is_not_finite_spoils_its_own_head_only(seed: int, new_block: Make) -> None:
    keys, values = torch.randn(3, 2, 32), torch.randn(3, 2, 32)
    values[1, 0, 5] = float("nan")
    block = new_block(1, 2, 16, 32, torch.float32, True)
    write_kv(keys, values, torch.arange(3), block)
    assert block.value_params is not None
    spoiled = block.value_params[0, :, :3].isnan().any(-1)
    assert spoiled.tolist() == [[False, True, False], [False, False, False]]


@pytest.mark.parametrize("int4", [False, True])
def test_shapes_that_do_not_fit_are_refused(new_block: Make, int4: bool) -> None:
    block, slots = new_block(1, 2, 4, 8, torch.float32, int4), torch.arange(2)
    good = torch.ones(2, 2, 8)
    for keys, values in (
        (good, good[:1]),
        (good, torch.ones(2, 2, 4)),
        (good[:, :1], good[:, :1]),
        (torch.ones(2, 2, 4), torch.ones(2, 2, 4)),
    ):
        with pytest.raises(ValueError, match=r"the pages take \[2, 2, 8\]"):
            write_kv(keys, values, slots, block)
    with pytest.raises(ValueError, match=r"slots are \[3\], expected one for each of 2 tokens"):
        write_kv(good, good, torch.arange(3), block)


def test_a_deep_copy_is_written_to_itself(new_block: Make) -> None:
    block, ones = new_block(1, 1, 4, 8, torch.float32, False), torch.ones(1, 1, 8)
    write_kv(ones, ones, torch.tensor([0]), block)
    copied = copy.deepcopy(block)
    write_kv(2 * ones, 2 * ones, torch.tensor([0]), copied)
    assert float(copied.keys[0, 0, 0, 0]) == 2
    assert float(block.keys[0, 0, 0, 0]) == 1
