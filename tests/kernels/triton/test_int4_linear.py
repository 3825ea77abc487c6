"""The GPU's INT4 linear against its reference: layouts, epilogues, and rows that do not know each other, to the bit."""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from exeunt.kernels.int4_linear import triton as module
from exeunt.kernels.int4_linear.native import PackedInt4
from exeunt.kernels.int4_linear.pairs import PairedInt4, pack_pairs
from exeunt.kernels.int4_linear.reference import int4_linear_reference
from exeunt.kernels.int4_linear.triton import int4_linear_triton
from exeunt.kernels.int4_linear.weight import Int4Weight, dequantize, quantize
from exeunt.kernels.linear_rule import tiles
from exeunt.kernels.linear_tiles import Tile
from tests.kernels.triton.linear_checks import (
    IEEE_WARNINGS,
    MASKED_ROWS,
    ROW_CALLS,
    TOLERANCE,
    LinearCall,
    captured,
    check_linear_call,
    check_masked_tiles,
    check_row_in_every_call,
    linear_calls,
    poisoned_memory,
    relative_error,
    whole_programs,
)
from tests.kernels.triton.on_gpu import on_gpu_only

pytestmark = IEEE_WARNINGS

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def make_weight(outputs: int, inputs: int, group: int, device: str) -> Int4Weight:
    return quantize(
        torch.randn(outputs, inputs, device=device) * torch.rand(outputs, 1, device=device), group
    )


def unpaired(weight: PairedInt4) -> Tensor:
    """The weight [out, in] in float32, read off the paired layout."""
    codes = torch.stack((weight.codes & 15, weight.codes >> 4), 1).float()  # [pairs, 2, out, group]
    params = weight.params.contiguous().view(torch.float16).view(*weight.params.shape, 2).float()
    values = codes * params[..., :1] + params[..., 1:]
    return values.permute(2, 0, 1, 3).flatten(1)[:, : weight.in_features]


@pytest.mark.parametrize(
    ("outputs", "inputs", "group"), [(70, 324, 32), (5, 246, 64), (9, 40, 6), (33, 256, 128), (2, 2, 2)]
)
def test_pairs_hold_the_canonical_weight(
    seed: int, device: str, outputs: int, inputs: int, group: int
) -> None:
    weight = make_weight(outputs, inputs, group, device)
    paired = pack_pairs(weight)
    assert torch.equal(unpaired(paired), dequantize(weight, FP32))
    wanted = torch.randperm(outputs, device=device)[: max(1, outputs // 2)]
    assert torch.equal(unpaired(paired.pick(wanted)), dequantize(weight, FP32)[wanted])
    assert torch.equal(unpaired(paired.rows(1, outputs)), dequantize(weight, FP32)[1:])


def test_pairs_take_the_same_bytes(device: str) -> None:
    weight = make_weight(64, 512, 32, device)
    assert pack_pairs(weight).nbytes == weight.nbytes
    with pytest.raises(ValueError, match="paired INT4"):
        PairedInt4(weight.codes, weight.scales, 32, 512, 64)


@pytest.mark.parametrize(
    ("dtype", "outputs", "inputs", "group", "tokens"),
    [
        (FP16, 31, 640, 256, 16),
        (BF16, 9, 40, 6, 5),
        (FP32, 40, 1030, 48, 1),
        (FP16, 129, 600, 64, 3),
        (BF16, 1, 2, 2, 1),
    ],
)
def test_result_is_the_references(
    seed: int,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    outputs: int,
    inputs: int,
    group: int,
    tokens: int,
) -> None:
    weight = make_weight(outputs, inputs, group, device)
    x, bias = (
        torch.randn(tokens, inputs, device=device).to(dtype),
        torch.randn(outputs, device=device).to(dtype),
    )
    paired = pack_pairs(weight)
    with poisoned_memory(monkeypatch):
        out = int4_linear_triton(x, paired, bias)
    assert out.dtype == dtype
    expected = int4_linear_reference(x.float(), weight, bias.float())
    if outputs == 1:  # a single sum whose terms cancel is small beside the rounding of each
        terms = x.float().abs() @ dequantize(weight, FP32).abs().T + bias.float().abs()
        assert (out.float() - expected).abs().max() < TOLERANCE[dtype] * terms.max()
    else:
        assert relative_error(out, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize(("call", "group"), linear_calls(Tile(128, 64, 3, 4), [32, 64, 128, 48]))
def test_epilogues(
    seed: int, device: str, monkeypatch: pytest.MonkeyPatch, call: LinearCall, group: int
) -> None:
    weight = quantize(torch.randn(50, call.inputs, device=device) / call.inputs**0.5, group)
    wide = dequantize(weight, FP32)
    check_linear_call(monkeypatch, module, int4_linear_triton, weight, wide, call, device)


@pytest.mark.parametrize("call", ROW_CALLS, ids=str)
def test_row_has_the_same_bits_in_every_call(
    seed: int, device: str, monkeypatch: pytest.MonkeyPatch, call: tuple[torch.dtype, int, bool, list[int]]
) -> None:
    weight = pack_pairs(make_weight(24, call[1], 32 if call[0] == FP32 else 64, device))

    def linear(x: Tensor) -> Tensor:
        return int4_linear_triton(x, weight, activation="silu", gated=True)

    check_row_in_every_call(monkeypatch, module, linear, call, device)


@pytest.mark.parametrize(
    ("dtype", "inputs", "group", "split", "tile"),
    [
        (BF16, 1088, 64, True, Tile(64, 64, 3, 4)),
        (FP16, 352, 32, False, Tile(64, 64, 3, 4)),
        (BF16, 240, 48, False, Tile(128, 64, 3, 4)),
        (BF16, 600, 128, True, Tile(128, 64, 3, 4)),
        (FP16, 600, 48, True, Tile(64, 128, 3, 8)),
        on_gpu_only(BF16, 1088, 64, False, Tile(64, 64, 3, 4)),
        on_gpu_only(FP16, 1088, 128, True, Tile(64, 64, 3, 4)),
    ],
)
def test_tiles_whose_inputs_are_put_in_order_have_the_same_bits(
    seed: int,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    inputs: int,
    group: int,
    split: bool,
    tile: Tile,
) -> None:
    if device == "cuda" and tiles().most_warps == 2:
        pytest.skip("tiles of more than two warps are for Hopper")
    weight = pack_pairs(make_weight(70, inputs, group, device))
    x = torch.randn(tile.rows + 6, inputs, device=device).to(dtype)
    alone = torch.cat([int4_linear_triton(row, weight) for row in x[:2, None]])
    whole_programs(monkeypatch, module, split, tile)
    with poisoned_memory(monkeypatch):
        assert torch.equal(int4_linear_triton(x, weight)[:2], alone)


@pytest.mark.parametrize("group", [64, 128])
def test_groups_that_are_read_in_turns_are_summed_in_the_same_parts(
    seed: int, device: str, monkeypatch: pytest.MonkeyPatch, group: int
) -> None:
    """In float32, whose results show every bit of a sum, a group of 64 takes two turns and one of 128 four."""
    weight, x = pack_pairs(make_weight(24, 1024, group, device)), torch.randn(3, 1024, device=device)
    found = []
    for split in (True, False):
        whole_programs(monkeypatch, module, split)
        found.append(int4_linear_triton(x, weight))
    assert torch.equal(*found)


def test_some_outputs_have_the_whole_layers_bits(seed: int, device: str) -> None:
    weight = pack_pairs(make_weight(150, 544, 64, device))
    x = torch.randn(2, 544, device=device).half()
    whole = int4_linear_triton(x, weight)
    wanted = torch.randperm(150, device=device)[:70]
    assert torch.equal(int4_linear_triton(x, weight.pick(wanted)), whole[:, wanted])
    assert torch.equal(int4_linear_triton(x, weight.rows(33, 140)), whole[:, 33:140])


@pytest.mark.parametrize(("tokens", "there"), MASKED_ROWS)
@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize(("gated", "added"), [(True, False), (False, True)])
def test_tiles_of_which_all_rows_are_missing_are_left_as_they_were(
    seed: int,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
    tokens: int,
    there: list[int],
    split: bool,
    gated: bool,
    added: bool,
) -> None:
    weight = pack_pairs(make_weight(80 if gated else 40, 512, 32, device))
    forms = {"split": split, "gated": gated, "added": added}
    check_masked_tiles(monkeypatch, module, int4_linear_triton, weight, tokens, there, device, **forms)


def test_nan_and_infinity_stay_in_their_rows(seed: int, device: str) -> None:
    weight = make_weight(40, 512, 32, device)
    column = dequantize(weight, FP32)[:, 500]
    x = torch.randn(5, 512, device=device)
    clean = int4_linear_triton(x, weight)
    x[1, 7], x[3, 500] = float("nan"), float("inf")
    out = int4_linear_triton(x, weight)
    assert torch.equal(out[[0, 2, 4]], clean[[0, 2, 4]])
    assert bool(out[1].isnan().all())
    assert bool((column != 0).any())
    assert torch.equal(out[3][column != 0], (column * float("inf"))[column != 0])  # by the sign of its weight


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's programs run in an order of their own")
def test_parts_of_several_tiles_arrive_in_turns(
    seed: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interpreter runs a tile's parts one behind the other: here all first ones, then all second ones."""
    from triton.runtime.interpreter import interpreter_builder as programs

    weight = make_weight(33, 512, 64, device)
    x = torch.randn(9, 512, device=device).to(BF16)
    tile, place = Tile(8, 32, 3), programs.set_grid_idx
    whole_programs(monkeypatch, module, False, tile)
    expected = int4_linear_triton(x, weight)

    def in_turns(row: int, column: int, part: int) -> None:
        rows, columns, parts = programs.grid_dim
        part, rest = divmod((row * columns + column) * parts + part, rows * columns)
        place(*divmod(rest, columns), part)

    monkeypatch.setattr(programs, "set_grid_idx", in_turns)
    whole_programs(monkeypatch, module, True, tile)
    assert torch.equal(int4_linear_triton(x, weight), expected)


def test_rows_of_a_larger_tensor_and_no_rows(seed: int, device: str) -> None:
    weight = pack_pairs(make_weight(24, 96, 32, device))
    wide = torch.randn(4, 3, 193, device=device)
    expected = int4_linear_triton(wide[:, 1, 1:97].contiguous(), weight)
    assert torch.equal(int4_linear_triton(wide[:, 1, 1:97], weight), expected)
    assert torch.equal(
        int4_linear_triton(wide[:, 1, 1:97].t().contiguous().t(), weight), expected
    )  # columns first
    assert int4_linear_triton(wide[:0, 0, :96], weight).shape == (0, 24)


def test_what_does_not_fit_is_refused(device: str) -> None:
    weight = pack_pairs(make_weight(24, 96, 32, device))
    x = torch.randn(2, 96, device=device)
    with pytest.raises(ValueError, match="95 features"):
        int4_linear_triton(x[:, 1:], weight)
    with pytest.raises(TypeError, match="float64"):
        int4_linear_triton(x.double(), weight)
    with pytest.raises(ValueError, match="the bias is"):
        int4_linear_triton(x, weight, x[0])
    with pytest.raises(ValueError, match="'tanh'"):
        int4_linear_triton(x, weight, activation="tanh")
    with pytest.raises(ValueError, match="gated"):
        int4_linear_triton(x, weight, gated=True)
    with pytest.raises(ValueError, match="residual"):
        int4_linear_triton(x, weight, residual=x)
    numbers = torch.zeros(4, dtype=torch.int64, device=device)
    for positions in (numbers[:3], numbers[:2, None], numbers[:2].int(), numbers[::2]):
        with pytest.raises(ValueError, match="the positions are"):
            int4_linear_triton(x, weight, positions=positions)
    with pytest.raises(TypeError, match="packed for the CPU"):
        int4_linear_triton(x, PackedInt4.__new__(PackedInt4))


def test_fake_tensors_pass_through(device: str) -> None:
    weight = pack_pairs(make_weight(24, 96, 32, device))
    with FakeTensorMode() as mode:
        fake = PairedInt4(mode.from_tensor(weight.codes), mode.from_tensor(weight.params), 32, 96, 24)
        x = torch.empty(3, 96, dtype=BF16, device=device)
        out = int4_linear_triton(x, fake, activation="relu")
    assert out.shape == (3, 24)
    assert out.dtype == BF16


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("tokens", [1, 16, 40])
def test_graph_replays_to_the_same_bits(seed: int, tokens: int) -> None:
    weight = pack_pairs(make_weight(4096, 2048, 32, "cuda"))
    x = torch.randn(tokens, 2048, device="cuda").bfloat16()
    expected = int4_linear_triton(x, weight)
    reference = x.float() @ unpaired(weight).t()
    assert relative_error(expected, reference) < TOLERANCE[BF16]
    for _ in range(20):  # programs arrive in another order every time
        assert torch.equal(int4_linear_triton(x, weight), expected)
    assert torch.equal(captured(lambda: int4_linear_triton(x, weight)), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize(("inputs", "group"), [(4096, 64), (8000, 32), (14336, 128)])
def test_a_prompts_rows_are_summed_as_a_decoded_one(
    seed: int, dtype: torch.dtype, inputs: int, group: int
) -> None:
    """The widest tile against the narrowest. A bias of minus the rounded result lays the sums' low bits bare."""
    weight = pack_pairs(make_weight(4096, inputs, group, "cuda"))
    x = torch.randn(512, inputs, device="cuda").to(dtype)
    bias = -int4_linear_triton(x[:1], weight)[0]
    alone = torch.cat([int4_linear_triton(row, weight, bias) for row in x[:3, None]])
    for rows in (16, 64, 130, 512):
        assert torch.equal(int4_linear_triton(x[:rows], weight, bias)[:3], alone), rows
    assert 0 < float(alone[0].abs().max()) < 0.01 * float(bias.abs().max())
