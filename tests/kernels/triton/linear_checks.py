"""What the tests of both linear layers share: poisoned memory, the epilogue in separate operations, ways to run."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from exeunt.kernels.linear_parts import MOST_COUNTERS, Launch, launch_for
from exeunt.kernels.linear_tiles import Tile
from exeunt.kernels.rows.norm import RowNorm
from exeunt.kernels.rows.reference import rms_norm_reference
from exeunt.kernels.tuned.launches import TunedLaunch, forced
from tests.kernels.triton.on_gpu import on_gpu_only

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}

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


def sizes_on(device: str) -> list[tuple[bool | None, list[int]]]:
    """How programs are cut and the rows of the calls that a row's bits are compared in; the interpreter is slow."""
    if device == "cpu":
        return [(False, [17, 34]), (True, [2, 33])]
    return [(split, [1, 2, 3, 16, 17, 33, 64, 70]) for split in (None, False, True)]


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
