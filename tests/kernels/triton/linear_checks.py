"""What the tests of both linear layers share: poisoned memory, the epilogue in separate operations, ways to run."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, Final, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from exeunt.kernels.linear_parts import MOST_COUNTERS, Launch, launch_for
from exeunt.kernels.linear_rule import tiles
from exeunt.kernels.linear_tiles import Tile
from exeunt.kernels.rows.norm import RowNorm
from exeunt.kernels.rows.reference import rms_norm_reference
from exeunt.kernels.tuned.launches import TunedLaunch, forced
from tests.kernels.triton.covering import covering
from tests.kernels.triton.on_gpu import on_gpu_only

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}

ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda x: x,
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}

# Infinity on the way is meant: the exponential of a large number, a product with an infinite input.
IEEE_WARNINGS = [
    pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]


GRAPH_SIZES: Final = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 320, 384, 448, 512)
"""Rows of the calls that are captured as graphs, to which others are filled up."""


ROW_CALLS: Final = [  # dtype, inputs, whether parts have programs of their own, and rows of the calls
    (torch.bfloat16, 512, False, (17, 2, 8, 24, 48, 96)),
    (torch.bfloat16, 512, True, (1, 4, 16, 32, 64, 128)),
    (torch.float16, 512, True, (33, 2, 8, 24, 48, 96)),
    (torch.float16, 256, False, (192, 256, 320, 384, 448, 512)),
    (torch.float32, 546, False, (24, 96)),
    (torch.float32, 546, True, (2, 33)),
]
"""What a row's bits are compared in under the interpreter, which is slow: a graph's numbers of rows once each."""


def check_row_in_every_call(
    monkeypatch: pytest.MonkeyPatch,
    module: ModuleType,
    linear: Callable[[Tensor], Tensor],
    call: tuple[torch.dtype, int, bool, Sequence[int]],
    device: str,
) -> None:
    """Five rows have the same bits alone and at every place of calls of every size; of more sizes on a GPU."""
    dtype, inputs, split, sizes = call
    x = torch.randn(5, inputs, device=device).to(dtype)
    alone = torch.cat([linear(row) for row in x[:, None]])
    for apart in (split,) if device == "cpu" else (None, split):
        whole_programs(monkeypatch, module, apart)
        for tokens in sizes if device == "cpu" else (*GRAPH_SIZES, 3, 17, 33, 70):
            order = torch.randint(5, (tokens,), device=device)
            assert torch.equal(linear(x[order]), alone[order]), (apart, tokens)


def relative_error(out: Tensor, expected: Tensor) -> float:
    return float((out.double() - expected.double()).norm() / expected.double().norm())


@contextmanager
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every `torch.empty` holds NaN, or the largest integer: what is read before it is written shows."""
    empty = torch.empty

    def poisoned(*size: Any, **options: Any) -> Tensor:
        made = empty(*size, **options)
        return made.fill_(float("nan") if made.is_floating_point() else torch.iinfo(made.dtype).max)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", poisoned)
        yield


def whole_programs(
    monkeypatch: pytest.MonkeyPatch, module: ModuleType, split: bool | None, tile: Tile | None = None
) -> None:
    """Have the module's kernel give each part of the sum a program of its own, or none, however many rows there are.

    `tile` is what it then runs with.
    """

    def launched(*args: Any, **options: Any) -> Launch:
        if tile is not None:
            with forced(TunedLaunch(tile, bool(split))):
                return launch_for(*args, **options)
        launch = launch_for(*args, **options)
        chosen = launch.split if split is None else split and launch.parts > 1
        return replace(launch, grid=(*launch.grid[:2], launch.parts if chosen else 1), split=chosen)

    monkeypatch.setattr(module, "launch_for", launched)


def normed(x: Tensor, norm: RowNorm) -> Tensor:
    if norm.kind == "rms":
        return rms_norm_reference(x, norm.weight, norm.eps)
    return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)


def finished(product: Tensor, dtype: torch.dtype, activation: str | None, gated: bool) -> Tensor:
    """The epilogue of separate PyTorch operations on a float32 product."""
    rounded = product.to(dtype)
    if not gated:
        return ACTIVATIONS[activation](rounded)
    half = rounded.shape[1] // 2
    return ACTIVATIONS[activation](rounded[:, :half]) * rounded[:, half:]


@dataclass(frozen=True, slots=True)
class LinearCall:
    """A call of a linear layer with all that it may do in front of the sum and behind it."""

    activation: str | None
    gated: bool
    dtype: torch.dtype
    tokens: int
    tile: Tile | None  # None: the rule's
    inputs: int
    norm: Literal["rms", "layer"] | None
    biased: bool
    added: bool
    split: bool  # whether each part of the sum has a program of its own


def linear_calls(wide: Tile, *others: list[Any]) -> list[Any]:
    """Calls in which any two values of two of their parts, or of `others`, meet.

    Their rows are on both sides of each tile's number; `wide` is the tile of 128 rows.
    """
    forms = [(None, False), ("relu", False), ("gelu", False), ("gelu_pytorch_tanh", False)]
    forms += [("silu", True), ("gelu", True), ("gelu_new", True)]
    rows = [(5, None), (17, None), (33, None), (70, wide)]
    dtypes = [torch.bfloat16, torch.float16, torch.float32]
    behind = [(False, False), (True, False), (False, True), (True, True)]
    axes = (forms, rows, behind, dtypes, [512, 546, 214], [None, "rms", "layer"], [False, True])
    calls = []
    for form, (tokens, tile), (biased, added), dtype, inputs, norm, split, *more in covering(*axes, *others):
        call = LinearCall(form[0], form[1], dtype, tokens, tile, inputs, norm, biased, added, split)
        label = f"{call.activation}{'-gated' * call.gated}-{str(dtype).removeprefix('torch.')}"
        label += "".join(f"-{each}" for each in (tokens, inputs, norm, *more))
        label += "-bias" * biased + "-residual" * added + "-apart" * split
        calls.append(pytest.param(call, *more, id=label))
    return calls


def check_linear_call(
    monkeypatch: pytest.MonkeyPatch,
    module: ModuleType,
    linear: Callable[..., Tensor],
    weight: Any,
    wide_weight: Tensor,
    call: LinearCall,
    device: str,
) -> None:
    """`linear` of a `weight` [outputs, inputs] is what separate operations make of the same in float32.

    Its sums are about 1, where activations bend.
    """
    outputs, dtype = wide_weight.shape[0], call.dtype
    columns = outputs // 2 if call.gated else outputs
    x = torch.randn(call.tokens, call.inputs, device=device).to(dtype)
    bias = torch.randn(outputs, device=device).to(dtype) if call.biased else None
    residual = None
    if call.added:
        residual = torch.randn(call.tokens, 2 * columns, device=device).to(dtype)[:, :columns]
    norm = None
    if call.norm is not None:
        factors = torch.randn(2, call.inputs, device=device).to(dtype)
        norm = RowNorm(call.norm, factors[0], factors[1] if call.norm == "layer" else None, 1e-5)
    rows = x if norm is None else normed(x, norm)
    product = rows.double() @ wide_weight.double().t()
    expected = finished(
        product if bias is None else product + bias.double(), dtype, call.activation, call.gated
    )
    expected = expected if residual is None else residual + expected
    tile = call.tile if dtype != torch.float32 and tiles().most_warps > 2 else None
    whole_programs(monkeypatch, module, call.split, tile)
    with poisoned_memory(monkeypatch):
        out = linear(
            x, weight, bias, norm=norm, activation=call.activation, gated=call.gated, residual=residual
        )
    rounded_twice = (
        2 if call.gated or norm is not None else 1
    )  # and the interpreter truncates a norm's result
    assert out.dtype == dtype
    assert relative_error(out, expected) < TOLERANCE[dtype] * rounded_twice
    assert residual is None or out is residual


def captured(call: Callable[[], Tensor]) -> Tensor:
    """The call's result out of a CUDA graph's second replay."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    out.fill_(float("nan"))
    graph.replay()
    out.fill_(float("nan"))
    graph.replay()
    return out


MASKED_ROWS = [  # how many rows, and which of them are there, in tiles of 8; rows beyond the last count as none
    (5, []),
    (18, [0, 3, 17]),
    on_gpu_only(5, [1, 4]),
    on_gpu_only(18, [9]),
    on_gpu_only(18, []),
    on_gpu_only(24, [*range(16)]),
]


def check_masked_tiles(
    monkeypatch: pytest.MonkeyPatch,
    module: ModuleType,
    linear: Callable[..., Tensor],
    weight: Any,
    tokens: int,
    there: list[int],
    device: str,
    *,
    split: bool,
    gated: bool,
    added: bool,
) -> None:
    """`linear` of a `weight` [40 or, gated, 80 outputs, 512] leaves tiles of which all rows are missing as they were,
    and gives the others their own bits."""
    x = torch.randn(tokens, 512, device=device).bfloat16()
    residual = torch.randn(tokens, 40, device=device).bfloat16()
    counters = torch.zeros(MOST_COUNTERS, dtype=torch.int32, device=device)
    monkeypatch.setattr("exeunt.kernels.linear_parts._counters_on", lambda device: counters)
    whole_programs(monkeypatch, module, split, Tile(8, 64, 3))

    def result(positions: Tensor | None) -> Tensor:
        with poisoned_memory(monkeypatch):  # results are NaN before they are written
            return linear(
                x,
                weight,
                activation="silu" if gated else None,
                gated=gated,
                residual=residual.clone() if added else None,
                positions=positions,
            )

    expected = result(None)
    positions = torch.full((tokens,), -1, device=device)
    positions[there] = torch.randint(0, 3, (len(there),), device=device)
    out = result(positions)
    assert torch.equal(out[there], expected[there])
    left = [row for row in range(tokens) if row // 8 not in {each // 8 for each in there}]
    assert torch.equal(out[left], residual[left]) if added else bool(out[left].isnan().all())
    assert not bool(counters.any())
    assert torch.equal(result(torch.arange(tokens, device=device)), expected)
