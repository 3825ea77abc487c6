"""The linear layers' cases: rows on both sides of each tile, every epilogue, and what was measured on some GPU."""

import json
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from exeunt.kernels.full_linear.triton import full_linear_triton
from exeunt.kernels.int4_linear.ordered_triton import order_inputs
from exeunt.kernels.int4_linear.pairs import PairedInt4, pairs_of
from exeunt.kernels.int4_linear.triton import int4_linear_triton
from exeunt.kernels.tuned.files import PACKAGED, read_launches
from scripts.compile_kernels.case import BF16, FP16, FP32, HIDDEN, SHORT, Case, empty

_INNER: Final = 14336
_CAPABILITY_OF: Final = {"NVIDIA H200": 90}
"""Of the GPUs that the package has measured launches of."""


@dataclass(frozen=True, slots=True)
class _Epilogue:
    """What a layer does behind its sum."""

    activation: str | None = None
    gated: bool = False
    added: bool = False
    biased: bool = False
    masked: bool = False

    def __str__(self) -> str:
        parts = ["bias"] if self.biased else []
        if self.gated:
            parts.append("gate and up" if self.activation == "silu" else f"gate and up by {self.activation}")
        elif self.activation is not None:
            parts.append(self.activation)
        parts += ["residual"] if self.added else []
        return ", ".join([" and ".join(parts), *(["masked"] if self.masked else [])])


_ADDED: Final = _Epilogue(added=True)
_GATED: Final = _Epilogue("silu", gated=True)


def linear_cases() -> Iterator[Case]:
    """Products of both formats, the ordering of inputs, and products as they were measured to be the fastest."""
    yield from _by_rows()
    yield from _by_epilogue()
    for dtype, group in ((BF16, 64), (FP16, 64), (BF16, 32), (BF16, 48), (FP16, 128)):
        label = "" if group == 64 else f", groups of {group}"
        tested = (dtype, group) == (BF16, 64)
        yield Case(f"inputs in order, {SHORT[dtype]}{label}", partial(_order, dtype, group), tested)
    for path in sorted(PACKAGED.glob("*.json")):
        yield from _measured(path)


def _by_rows() -> Iterator[Case]:
    """Rows on both sides of each tile, and groups."""
    for dtype in (BF16, FP16, FP32):
        for rows in (1, 12, 24, 64, 512) if dtype == BF16 else (1, 512):
            for group in (64, 32, 128) if dtype == BF16 else (64,):
                tested = (dtype, group, rows) == (BF16, 64, 1)
                yield _int4_case(dtype, rows, group, _ADDED, tested)
            yield _full_case(dtype, rows, _ADDED)
            tested = (dtype, rows) == (BF16, 512)
            yield _int4_case(dtype, rows, 64, _GATED, tested)
            yield _full_case(dtype, rows, _GATED, tested)


def _by_epilogue() -> Iterator[Case]:
    for dtype, rows, group, epilogue in (
        (BF16, 1, 64, _Epilogue("gelu_new", biased=True)),
        (BF16, 24, 32, _Epilogue("gelu", biased=True)),
        (BF16, 512, 128, _Epilogue("gelu_new", biased=True)),
        (BF16, 64, 64, _Epilogue("gelu", gated=True)),
        (BF16, 1, 32, _Epilogue("gelu_pytorch_tanh", gated=True)),
        (BF16, 12, 64, _Epilogue("relu", biased=True, added=True)),
        (BF16, 512, 64, _Epilogue(biased=True, added=True)),
        (BF16, 1, 48, _Epilogue("silu", gated=True, biased=True)),
        (BF16, 64, 48, _Epilogue(added=True)),
        (FP16, 1, 32, _Epilogue("gelu", biased=True)),
        (FP16, 64, 128, _Epilogue("relu", biased=True)),
        (FP16, 24, 64, _Epilogue("gelu_pytorch_tanh", gated=True)),
        (FP16, 512, 32, _Epilogue(biased=True, added=True)),
        (FP32, 1, 32, _Epilogue("gelu", biased=True)),
        (FP32, 24, 128, _Epilogue("gelu_new", gated=True, biased=True)),
    ):
        yield _int4_case(dtype, rows, group, epilogue)
        if group != 48:
            yield _full_case(dtype, rows, epilogue)
    for rows in (1, 12, 24, 64, 512):
        masked = _Epilogue(added=True, masked=True)
        yield _int4_case(BF16, rows, 64, masked, tested=rows == 1)
        yield _full_case(BF16, rows, masked, tested=rows == 1)
    for rows in (12, 512):
        masked = _Epilogue("silu", gated=True, masked=True)
        yield _int4_case(BF16, rows, 64, masked)
        yield _full_case(BF16, rows, masked)


def _measured(path: Path) -> Iterator[Case]:
    """Each way of running that a file of the package names, once, for that file's GPU alone."""
    gpu = json.loads(path.read_text(encoding="utf-8"))["gpu"]
    seen = set()
    for key, launch in read_launches(path, gpu).items():
        int4, dtype, inputs, outputs, gated, group, rows = key
        if launch is None or (way := (int4, dtype, gated, group, launch)) in seen:
            continue
        seen.add(way)
        epilogue = _GATED if gated else _ADDED
        sizes = "×".join(map(str, astuple(launch.tile)))
        name = f"{'int4' if int4 else 'full'} linear, {SHORT[dtype]}"
        name += f", groups of {group}" if int4 else ""
        name += f", {epilogue}, tile {sizes}, parts {'apart' if launch.split else 'together'}, as on {gpu}"
        call = partial(_int4, dtype, rows, group, epilogue) if int4 else partial(_full, dtype, rows, epilogue)
        yield Case(name, partial(call, (inputs, outputs)), False, launch, (_CAPABILITY_OF[gpu],))


def _int4_case(dtype: torch.dtype, rows: int, group: int, epilogue: _Epilogue, tested: bool = False) -> Case:
    name = f"int4 linear, {SHORT[dtype]}, {_counted(rows)}, groups of {group}, {epilogue}"
    return Case(name, partial(_int4, dtype, rows, group, epilogue), tested)


def _full_case(dtype: torch.dtype, rows: int, epilogue: _Epilogue, tested: bool = False) -> Case:
    name = f"full linear, {SHORT[dtype]}, {_counted(rows)}, {epilogue}"
    return Case(name, partial(_full, dtype, rows, epilogue), tested)


def _counted(rows: int) -> str:
    return f"{rows} row{'s' if rows > 1 else ''}"


def _sizes(epilogue: _Epilogue) -> tuple[int, int]:
    """Inputs and outputs of a block's second half of a feed-forward network, or of its first."""
    if epilogue.gated:
        return HIDDEN, 2 * _INNER
    return (_INNER, HIDDEN) if epilogue.added else (HIDDEN, _INNER)


def _int4(
    dtype: torch.dtype, rows: int, group: int, epilogue: _Epilogue, sizes: tuple[int, int] | None = None
) -> Tensor:
    inputs, outputs = sizes or _sizes(epilogue)
    pairs = pairs_of(inputs, group)
    codes = empty(pairs, outputs, group, dtype=torch.uint8)
    weight = PairedInt4(codes, empty(pairs, 2, outputs, dtype=torch.int32), group, inputs, outputs)
    bias, residual, positions = _behind(dtype, rows, outputs, epilogue)
    return int4_linear_triton(
        empty(rows, inputs, dtype=dtype),
        weight,
        bias,
        activation=epilogue.activation,
        gated=epilogue.gated,
        residual=residual,
        positions=positions,
    )


def _full(dtype: torch.dtype, rows: int, epilogue: _Epilogue, sizes: tuple[int, int] | None = None) -> Tensor:
    inputs, outputs = sizes or _sizes(epilogue)
    bias, residual, positions = _behind(dtype, rows, outputs, epilogue)
    return full_linear_triton(
        empty(rows, inputs, dtype=dtype),
        empty(outputs, inputs, dtype=dtype),
        bias,
        activation=epilogue.activation,
        gated=epilogue.gated,
        residual=residual,
        positions=positions,
    )


def _behind(
    dtype: torch.dtype, rows: int, outputs: int, epilogue: _Epilogue
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Bias, residual and positions of a call, as far as it has them."""
    columns = outputs // 2 if epilogue.gated else outputs
    return (
        empty(outputs, dtype=dtype) if epilogue.biased else None,
        empty(rows, columns, dtype=dtype) if epilogue.added else None,
        empty(rows, dtype=torch.int64) if epilogue.masked else None,
    )


def _order(dtype: torch.dtype, group: int) -> Tensor:
    places = max(32, 1 << (group - 1).bit_length())
    return order_inputs(empty(64, HIDDEN, dtype=dtype), 2 * pairs_of(HIDDEN, group), group, places)
