"""A whole gate in one native call: state, probe, a look at the rows that pass the screen, logits of those that leave.

A look may be at a shortlist of tokens; then all logits of the rows that it lets go may have the last word on them.

Called one operation at a time a gate of a small model takes several times as long as its arithmetic. The reference is
`exeunt.compression.exits.ExitHead.gate`, which strings the same kernels together.
"""

import ctypes
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from exeunt.kernels.exit_gate.dispatch import ExitStruct, ExitWeights
from exeunt.kernels.exit_gate.judge import JudgeStruct, JudgeWeights
from exeunt.kernels.exit_gate.reference import LEAST_DOUBT
from exeunt.kernels.native.descriptors import Matrix
from exeunt.kernels.native.library import DTYPE_CODES, native_library

MOST_LOGITS: Final = 1 << 26
"""Room is made for every row's logits at once: of so many, 256 MB."""

_pointer, _long = ctypes.c_void_p, ctypes.c_int64


class _Confirmation(ctypes.Structure):
    """`struct Confirmation` of kernels/native/exit_gate.h; all zeros is none."""

    _fields_ = (("judge", JudgeStruct), ("combine", _pointer), ("list_ratio", ctypes.c_double))


class _Gate(ctypes.Structure):
    """`struct Gate` of kernels/native/exit_gate.h."""

    _fields_ = (
        ("weights", ExitStruct),
        ("output", Matrix),
        ("shortlist", Matrix),
        ("judge", JudgeStruct),
        ("combine", _pointer),
        ("screen_ratio", ctypes.c_double),
        ("least_doubt", ctypes.c_double),
        ("confirmation", _Confirmation),
    )


class _Decisions(ctypes.Structure):
    """`struct Decisions`."""

    _fields_ = (
        ("confidence", _pointer),
        ("leaves", _pointer),
        ("looked", _pointer),
        ("whole", _pointer),
        ("logits", _pointer),
    )


class _Counts(ctypes.Structure):
    """`struct Counts`."""

    _fields_ = (("looked", _long), ("whole", _long), ("left", _long))


@dataclass(frozen=True, slots=True)
class Confirmation:
    """What decides, by the logits of the whole vocabulary, about rows that a shortlist lets pass.

    It is asked about rows whose confidence by the shortlist is at least `list_ratio` × their threshold. Its own is
    that of a judge and a logistic regression, `combine` [4] float32, as the shortlist's.
    """

    combine: Tensor
    list_ratio: float
    judge: JudgeWeights


@dataclass(frozen=True, slots=True)
class GateRule:
    """What decides once an exit's state is read: `combine` [4] float32 weighs the features and a constant.

    A row whose probe says less than `screen_ratio` × its threshold is not looked at. The first feature is the judge's
    logit, or the probe's where there is no judge. Where looks are at a shortlist a `confirmation` may follow.
    """

    combine: Tensor
    screen_ratio: float
    judge: JudgeWeights | None = None
    confirmation: Confirmation | None = None


@dataclass(frozen=True, slots=True)
class NativeGate:
    """An exit's gate as the native library reads it. `tensors` are what it points into, the matrices' own aside."""

    struct: _Gate
    address: int
    dtype: torch.dtype  # of the states
    size: int
    units: int
    outputs: int
    listed: int  # logits of the shortlist, 0 where there is none
    tensors: tuple[Tensor, ...]


def native_gate(
    weights: ExitWeights, rule: GateRule, output: Matrix, shortlist: Matrix | None = None
) -> NativeGate | None:
    """Describe a gate; None where the native library does not take it. Raises ValueError where sizes do not fit.

    Both matrices are of the weights' dtype or INT4 and must stay alive with what they point to.
    """
    struct, combine = weights.native, rule.combine
    judge = JudgeStruct() if rule.judge is None else rule.judge.native
    last = _Confirmation() if rule.confirmation is None else _described(rule.confirmation)
    read = combine.is_cpu and combine.dtype == torch.float32
    if struct is None or judge is None or last is None or not read:
        return None
    _check_sizes(struct, rule, output, output if shortlist is None else shortlist)
    if rule.confirmation is not None:
        _check_confirmation(rule.confirmation, struct, output, shortlist)
    combine = combine.contiguous()
    gate = _Gate(
        struct,
        output,
        shortlist or Matrix(),
        judge,
        combine.data_ptr(),
        rule.screen_ratio,
        LEAST_DOUBT,
        last,
    )
    return NativeGate(
        gate,
        ctypes.addressof(gate),
        weights.norm.dtype,
        int(struct.size),
        int(struct.units),
        int(output.outputs),
        0 if shortlist is None else int(shortlist.outputs),
        (combine, *_tensors(weights, rule)),
    )


def exit_gate(
    hidden: Tensor,
    thresholds: Tensor,
    weights: ExitWeights,
    rule: GateRule,
    output: Matrix,
    shortlist: Matrix | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None:
    """Return confidence [T], leaves [T] bool, looked [K] and whole [W] int64, logits [L, V]; None where it cannot.

    Looked at are rows that pass the screen, by `shortlist`, some of the rows of `output`, or by `output` itself where
    there is none. By the whole of `output` are projected rows that the shortlist lets pass: those that leave, or where
    the rule has a confirmation those that it is asked about. Confidence, of the last logits that were asked, and
    logits, of the L rows that leave, are float32. `hidden`
    [T, size] is of the weights' dtype, `thresholds` [T] float32; both matrices are of that dtype or INT4 and must stay
    alive with what they point to. It cannot without native kernels, on another device, where gradients are wanted, and
    for so many rows that room for all their logits would be too much. Raises ValueError where sizes do not fit.
    """
    library, rows = native_library(), hidden.shape[0]
    tensors = (hidden, thresholds, rule.combine)
    if library is None or rows * int(output.outputs) > MOST_LOGITS:
        return None
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return None
    if hidden.dtype != weights.norm.dtype or not all(tensor.is_cpu for tensor in tensors):
        return None
    gate = native_gate(weights, rule, output, shortlist)
    if gate is None or thresholds.dtype != torch.float32:
        return None
    _check_rows(hidden, thresholds, gate)
    hidden, thresholds = hidden.contiguous(), thresholds.contiguous()
    confidence, leaves = torch.empty(rows), torch.empty(rows, dtype=torch.bool)
    looked, whole = torch.empty(rows, dtype=torch.int64), torch.empty(rows, dtype=torch.int64)
    logits = torch.empty(rows, gate.outputs)
    narrow = 2 * gate.size + (0 if hidden.dtype == torch.float32 else max(gate.outputs, gate.listed))
    scratch = torch.empty(rows * narrow, dtype=hidden.dtype)
    wide = torch.empty(rows * (gate.size + gate.units + 2 + gate.listed))
    counts = _Counts()
    library.exit_gate(
        ctypes.byref(_Decisions(*(part.data_ptr() for part in (confidence, leaves, looked, whole, logits)))),
        ctypes.byref(counts),
        hidden.data_ptr(),
        thresholds.data_ptr(),
        gate.address,
        rows,
        scratch.data_ptr(),
        wide.data_ptr(),
        DTYPE_CODES[hidden.dtype],
        torch.get_num_threads(),
    )
    return confidence, leaves, looked[: counts.looked], whole[: counts.whole], logits[: counts.left]


def _tensors(weights: ExitWeights, rule: GateRule) -> tuple[Tensor, ...]:
    """What a description of the gate points into."""
    own = [weights.norm, weights.adapter, *weights.probe]
    if weights.norm_bias is not None:
        own.append(weights.norm_bias)
    if rule.judge is not None:
        own += rule.judge.parts
    if rule.confirmation is not None:
        own += [*rule.confirmation.judge.parts, rule.confirmation.combine]
    return tuple(own)


def _described(confirmation: Confirmation) -> _Confirmation | None:
    """The confirmation as the native library reads it, None where it does not take it."""
    combine, judge = confirmation.combine, confirmation.judge.native
    if judge is None or not (combine.is_cpu and combine.is_contiguous() and combine.dtype == torch.float32):
        return None
    return _Confirmation(judge, combine.data_ptr(), confirmation.list_ratio)


def _check_rows(hidden: Tensor, thresholds: Tensor, gate: NativeGate) -> None:
    """Raise ValueError where states or thresholds are of other sizes than the gate."""
    rows = hidden.shape[0]
    if hidden.shape != (rows, gate.size) or thresholds.shape != (rows,):
        raise ValueError(
            f"hidden is {list(hidden.shape)} and thresholds are {list(thresholds.shape)}, expected [tokens, "
            f"{gate.size}] and [tokens]"
        )


def _check_sizes(struct: ExitStruct, rule: GateRule, output: Matrix, decisive: Matrix) -> None:
    """Raise ValueError where sizes do not fit each other."""
    for matrix in (output, decisive):
        if matrix.inputs != struct.size or matrix.outputs < 2:
            raise ValueError(
                f"the output matrix takes {matrix.inputs} and gives {matrix.outputs}, expected {struct.size} and at "
                "least 2"
            )
    if decisive.outputs > output.outputs:
        raise ValueError(f"the shortlist gives {decisive.outputs} of only {output.outputs} logits")
    if rule.combine.shape != (4,):
        raise ValueError(f"combine is {list(rule.combine.shape)}, expected [4]")
    judge = rule.judge
    if judge is not None and (judge.units != struct.units or judge.count > decisive.outputs):
        raise ValueError(
            f"the judge reads {judge.units} units and {judge.count} logits, the probe has {struct.units} and the "
            f"matrix that decides gives {decisive.outputs}"
        )


def _check_confirmation(
    confirmation: Confirmation, struct: ExitStruct, output: Matrix, shortlist: Matrix | None
) -> None:
    """Raise ValueError where a confirmation does not fit what it is to confirm."""
    if shortlist is None:
        raise ValueError("there is a confirmation and no shortlist whose choice it could confirm")
    if confirmation.combine.shape != (4,):
        raise ValueError(f"the confirmation's combine is {list(confirmation.combine.shape)}, expected [4]")
    judge = confirmation.judge
    if judge.units != struct.units or judge.count > output.outputs:
        raise ValueError(
            f"the confirmation's judge reads {judge.units} units and {judge.count} logits, the probe has "
            f"{struct.units} and the output matrix gives {output.outputs}"
        )
