"""The Triton kernels that write keys and values against plain PyTorch, to the bit where the rounding is the same."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from exeunt.kernels.paged_batch import KVBlock
from exeunt.kernels.rows import rms_norm
from exeunt.kernels.write_kv import dequantize_heads, rotate, turn_and_write_kv, write_kv
from exeunt.kernels.write_kv.reference import write_kv_reference
from exeunt.kernels.write_kv.turn import turn_and_write_kv_reference
from tests.kernels.triton.covering import covering
from tests.kernels.triton.paged_pages import bits_of, block_on, error

pytest.importorskip("triton")
kernels = pytest.importorskip("exeunt.kernels.write_kv.triton")

Make = Callable[..., KVBlock]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
pytestmark = pytest.mark.usefixtures("poisoned")
SHAPES = [(2, 16, 16), (1, 80, 57), (3, 96, 5), (8, 128, 3), (3, 64, 60)]  # kv_heads, head_dim, page_tokens


def same_bits(left: KVBlock, right: KVBlock) -> bool:
    return all(torch.equal(a, b) for a, b in zip(bits_of(left), bits_of(right), strict=True))


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("int4", [False, True])
@pytest.mark.parametrize(("kv_heads", "head_dim", "page_tokens"), SHAPES)
def test_writes_the_bits_of_the_reference(
    seed: int,
    new_block: Make,
    device: str,
    dtype: torch.dtype,
    int4: bool,
    kv_heads: int,
    head_dim: int,
    page_tokens: int,
) -> None:
    expected = new_block(12, kv_heads, page_tokens, head_dim, dtype, int4)
    block = block_on(expected, device)
    for tokens in (0, 1, 7):
        slots = torch.randperm(12 * page_tokens)[:tokens]
        fused = torch.randn(tokens, 3 * kv_heads * head_dim).to(dtype) * 5
        keys, values = (part.reshape(tokens, kv_heads, head_dim) for part in fused.chunk(3, dim=1)[1:])
        write_kv_reference(keys, values, slots, expected)
        strided = [part.reshape(tokens, kv_heads, head_dim) for part in fused.to(device).chunk(3, dim=1)[1:]]
        kernels.write_kv_triton(*strided, slots.to(device), block)
    assert same_bits(block, expected)


@pytest.mark.parametrize("int4", [False, True])
def test_values_of_every_size_and_columns_apart(seed: int, new_block: Make, device: str, int4: bool) -> None:
    expected = new_block(4, 2, 16, 32, FP32, int4)
    block = block_on(expected, device)
    scales = torch.logspace(-9, 9, 40)[:, None, None]
    keys, values = torch.randn(40, 2, 32) * scales, torch.randn(40, 2, 32) * scales
    values[3], values[4, 0] = 2.5, 0.0  # a constant head has no step
    slots = torch.randperm(64)[:40]
    write_kv_reference(keys, values, slots, expected)
    apart = [x.to(device).permute(2, 0, 1).contiguous().permute(1, 2, 0) for x in (keys, values)]
    kernels.write_kv_triton(*apart, slots.to(device), block)
    assert same_bits(block, expected)


@pytest.mark.parametrize("int4", [False, True])
def test_padding_writes_nothing(seed: int, new_block: Make, device: str, int4: bool) -> None:
    expected = block_on(new_block(3, 2, 5, 16, FP32, int4), device)
    block = block_on(expected, device)
    keys, values = torch.randn(4, 2, 16, device=device), torch.randn(4, 2, 16, device=device)
    slots = torch.tensor([-1, 7, -1, 2], device=device)
    write_kv_reference(keys[slots >= 0], values[slots >= 0], slots[slots >= 0], expected)
    kernels.write_kv_triton(keys, values, slots, block)
    assert same_bits(block, expected)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter computes with NumPy
def test_a_value_that_is_not_finite_spoils_its_own_head_only(seed: int, new_block: Make, device: str) -> None:
    keys, values = torch.randn(3, 2, 32, device=device), torch.randn(3, 2, 32, device=device)
    values[1, 0, 5] = float("nan")
    block = block_on(new_block(1, 2, 16, 32, FP32, True), device)
    kernels.write_kv_triton(keys, values, torch.arange(3, device=device), block)
    assert block.value_params is not None
    spoiled = block.value_params[0, :, :3].isnan().any(-1)
    assert spoiled.tolist() == [[False, True, False], [False, False, False]]


def turning(tokens: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> dict[str, Any]:
    """Random arguments: three query heads to a KV head."""
    heads = 3 * kv_heads
    return {
        "qkv": torch.randn(tokens, heads + 2 * kv_heads, head_dim).to(dtype),
        "table": torch.randn(50, 2, head_dim).to(dtype),
        "positions": torch.randint(0, 50, (tokens,)),
        "slots": torch.randperm(60)[:tokens],
        "heads": heads,
        "head_norm": torch.rand(heads + kv_heads, head_dim).to(dtype) + 0.5,
        "eps": 1e-6,
    }


def on(arguments: dict[str, Any], device: str, **changed: Any) -> dict[str, Any]:
    moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in arguments.items()}
    return {**moved, **changed}


def held(block: KVBlock, slots: Tensor) -> Tensor:
    """Keys and values [2, tokens, kv_heads, head_dim] float32 at some slots, on the CPU."""
    pages, offsets = slots // block.page_tokens, slots % block.page_tokens
    parts = []
    for x, params in ((block.keys, block.key_params), (block.values, block.value_params)):
        rows = x.cpu()[pages, :, offsets]
        parts.append(
            rows.float() if params is None else dequantize_heads(rows, params.cpu()[pages, :, offsets])
        )
    return torch.stack(parts)


@pytest.mark.parametrize(
    ("kind", "shape", "changed"),
    covering(
        [(dtype, int4) for dtype in (FP32, BF16, FP16) for int4 in (False, True)],
        [(2, 16, 16), (1, 80, 57), (3, 96, 7), (2, 64, 60), (8, 128, 8), (5, 6, 30)],
        [{}, {"head_norm": None}, {"table": None}, {"table": None, "head_norm": None}],
    ),
)
def test_turns_and_writes_as_the_reference(
    seed: int,
    new_block: Make,
    device: str,
    kind: tuple[torch.dtype, bool],
    shape: tuple[int, int, int],
    changed: dict[str, Any],
) -> None:
    (dtype, int4), (kv_heads, head_dim, page_tokens) = kind, shape
    arguments = turning(6 if device == "cuda" else 3, kv_heads, head_dim, dtype)
    exact = dtype != BF16 or device == "cuda"  # the interpreter truncates to bfloat16
    expected = new_block(60 // page_tokens + 1, kv_heads, page_tokens, head_dim, dtype, int4)
    block = block_on(expected, device)
    theirs = turn_and_write_kv_reference(block=expected, **on(arguments, "cpu", **changed))
    ours = kernels.turn_and_write_kv_triton(block=block, **on(arguments, device, **changed))
    assert ours.shape == theirs.shape
    assert ours.dtype == dtype
    assert error(ours, theirs) < {FP32: 1e-6, FP16: 1e-3, BF16: 1e-2 if device == "cuda" else 2e-2}[dtype]
    if exact and changed.get("head_norm", 0) is None:  # no sum whose order could differ
        assert torch.equal(ours.cpu(), theirs)
        assert same_bits(block, expected)
    stored = (held(block, arguments["slots"]), held(expected, arguments["slots"]))
    # a value on the edge between two codes may fall to either side
    bound = 5e-2 if int4 else 1e-2 if dtype == BF16 else 1e-3
    assert error(*stored) < (bound if exact else 2 * bound)


def test_a_normed_head_is_rounded_before_its_weight(seed: int, new_block: Make, device: str) -> None:
    arguments = turning(5, 1, 64, FP16)
    expected = new_block(8, 1, 8, 64, FP16, False)
    block = block_on(expected, device)
    theirs = turn_and_write_kv_reference(block=expected, **on(arguments, "cpu", table=None))
    ours = kernels.turn_and_write_kv_triton(block=block, **on(arguments, device, table=None))
    assert int((ours.cpu() != theirs).sum()) <= 9  # of 960, for another order of summation


@pytest.mark.parametrize("int4", [False, True])
def test_a_token_is_turned_alike_alone_and_in_company(
    seed: int, new_block: Make, device: str, int4: bool
) -> None:
    tokens = 17 if device == "cuda" else 8
    arguments = on(turning(tokens, 2, 64, BF16), device)
    together = block_on(new_block(4, 2, 16, 64, BF16, int4), device)
    apart = block_on(together, device)
    whole = kernels.turn_and_write_kv_triton(block=together, **arguments)
    for part in (slice(0, 1), slice(1, 3), slice(3, tokens)):
        some = {k: arguments[k][part] for k in ("qkv", "positions", "slots")}
        out = kernels.turn_and_write_kv_triton(block=apart, **{**arguments, **some})
        assert torch.equal(out, whole[part])
    assert same_bits(together, apart)


def test_padding_no_tokens_no_queries_and_columns_apart(seed: int, new_block: Make, device: str) -> None:
    arguments = on(turning(5, 2, 32, FP32), device)
    positions, slots = arguments["positions"].clone(), arguments["slots"].clone()
    positions[2], slots[2] = -1, -1
    expected = block_on(new_block(8, 2, 8, 32, FP32, True), device)
    block = block_on(expected, device)
    padded = {**arguments, "positions": positions, "slots": slots}
    theirs = turn_and_write_kv_reference(block=expected, **{**padded, "head_norm": None})
    apart = arguments["qkv"].permute(2, 0, 1).contiguous().permute(1, 2, 0)
    ours = kernels.turn_and_write_kv_triton(block=block, **{**padded, "head_norm": None, "qkv": apart})
    assert torch.equal(ours, theirs)
    assert same_bits(block, expected)
    none = {k: arguments[k][:0] for k in ("qkv", "positions", "slots")}
    assert kernels.turn_and_write_kv_triton(block=block, **{**arguments, **none}).shape == (0, 6, 32)
    # keys and values only, as for a block that a token skips
    norm = arguments["head_norm"][6:].contiguous()
    pairs = {**arguments, "qkv": arguments["qkv"][:, 6:], "heads": 0, "head_norm": norm}
    with_queries = block_on(block, device)
    kernels.turn_and_write_kv_triton(block=with_queries, **arguments)
    assert kernels.turn_and_write_kv_triton(block=block, **pairs).shape == (5, 0, 32)
    assert same_bits(block, with_queries)


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
@pytest.mark.parametrize(("heads", "head_dim"), [(4, 64), (5, 80), (3, 96), (8, 128), (2, 5)])
def test_rotates_as_the_reference(
    seed: int, device: str, dtype: torch.dtype, heads: int, head_dim: int
) -> None:
    x = torch.randn(4, heads + 2, head_dim).to(dtype)[:, :heads]
    expected = rotate(x)
    if dtype == BF16 and device == "cpu":  # the interpreter truncates
        expected = (expected.view(torch.int32) & -(1 << 16)).view(FP32)
    assert torch.equal(kernels.rotate_heads_triton(x.to(device)).cpu(), expected.to(dtype))
    for nothing in (x[:0], x[:, :0]):
        assert kernels.rotate_heads_triton(nothing.to(device)).shape == nothing.shape


@pytest.mark.parametrize("int4", [False, True])
def test_the_public_function_is_the_separate_operations(seed: int, new_block: Make, int4: bool) -> None:
    arguments = turning(6, 2, 32, FP32)
    qkv, table, norm = arguments["qkv"], arguments["table"], arguments["head_norm"]
    expected = new_block(8, 2, 8, 32, FP32, int4)
    block = block_on(expected, "cpu")
    rows = table.index_select(0, arguments["positions"])
    normed = rms_norm(qkv[:, :8], norm, 1e-6)
    turned = normed * rows[:, 0:1] + normed.roll(16, -1) * rows[:, 1:2]
    write_kv(turned[:, 6:], qkv[:, 8:], arguments["slots"], expected)
    queries = turn_and_write_kv(block=block, **arguments)
    assert error(queries, rotate(turned[:, :6]) if int4 else turned[:, :6]) < 1e-6
    assert error(held(block, arguments["slots"]), held(expected, arguments["slots"])) < 1e-2


def test_what_does_not_fit_is_refused_with_the_reason(new_block: Make) -> None:
    block = new_block(8, 2, 8, 32, FP32, True)
    arguments = turning(6, 2, 32, FP32)
    for changed, message in (
        ({"heads": 5}, r"qkv is \[6, 10, 32\], expected \[tokens, 5 \+ 2 × 2, 32\]"),
        ({"slots": arguments["slots"][:5]}, "expected one for each of 6 tokens"),
        ({"head_norm": arguments["head_norm"][:5]}, "head_norm is"),
        ({"table": arguments["table"].half()}, "table is"),
    ):
        with pytest.raises(ValueError, match=message):
            turn_and_write_kv(block=block, **{**arguments, **changed})


@pytest.mark.parametrize("int4", [False, True])
def test_shapes_are_known_without_running(int4: bool) -> None:
    with FakeTensorMode():
        codes = (torch.zeros(9, 2, 16, 32, dtype=torch.uint8), torch.zeros(9, 2, 16, 2, dtype=FP16))
        full = [torch.zeros(9, 2, 16, 64, dtype=BF16) for _ in range(2)]
        block = KVBlock(codes[0], codes[0].clone(), codes[1], codes[1].clone()) if int4 else KVBlock(*full)
        tokens = torch.zeros(5, dtype=torch.int64)
        kernels.write_kv_triton(full[0][:5, :, 0], full[0][:5, :, 1], tokens, block)
        out = kernels.turn_and_write_kv_triton(
            torch.zeros(5, 12, 64, dtype=BF16), None, tokens, tokens, block, 8, None, 0.0
        )
        assert out.shape == (5, 8, 64)
        assert kernels.rotate_heads_triton(out).dtype == BF16
