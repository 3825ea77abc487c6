"""A whole gate in one native call: state, probe, the projection of the rows that pass the screen, confidence.

Called one operation at a time a gate of a small model takes several times as long as its arithmetic. The reference is
`exeunt.compression.exits.ExitHead.gate`, which strings the same kernels together.
"""

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from exeunt.kernels.exit_gate.dispatch import ExitStruct, ExitWeights
from exeunt.kernels.exit_gate.reference import LEAST_DOUBT
from exeunt.kernels.native.descriptors import Matrix
from exeunt.kernels.native.library import DTYPE_CODES, native_library

_MOST_LOGITS = 1 << 26  # room is made for every row's logits at once: 256 MB

_pointer = ctypes.c_void_p


class _Gate(ctypes.Structure):
    """`struct Gate` of kernels/native/exit_gate.h."""

    _fields_ = (
        ("weights", ExitStruct),
        ("output", Matrix),
        ("combine", _pointer),
        ("screen_ratio", ctypes.c_double),
        ("least_doubt", ctypes.c_double),
    )


class _Decisions(ctypes.Structure):
    """`struct Decisions`."""

    _fields_ = (
        ("confidence", _pointer),
        ("leaves", _pointer),
        ("projected", _pointer),
        ("logits", _pointer),
    )


@dataclass(frozen=True, slots=True)
class GateRule:
    """What decides once an exit's state is read: `combine` [4] float32 weighs the features and a constant.

    A row whose probe says less than `screen_ratio` × its threshold is not projected.
    """

    combine: Tensor
    screen_ratio: float


def exit_gate(
    hidden: Tensor, thresholds: Tensor, weights: ExitWeights, rule: GateRule, output: Matrix
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """Return confidence [T] float32, leaves [T] bool, projected [K] int64, logits [K, V] float32; None where it cannot.

    `hidden` [T, size] is of the weights' dtype, `thresholds` [T] float32. `output` is of that dtype or INT4 and must
    stay alive with what it points to. It cannot without native kernels, on another device, where gradients are wanted,
    and for so many rows that room for all their logits would be too much. Raises ValueError where sizes do not fit.
    """
    library, struct, (rows, size) = native_library(), weights.native, hidden.shape
    tensors, outputs = (hidden, thresholds, rule.combine), int(output.outputs)
    if library is None or struct is None or rows * outputs > _MOST_LOGITS:
        return None
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return None
    if hidden.dtype != weights.norm.dtype or not all(tensor.is_cpu for tensor in tensors):
        return None
    if any(tensor.dtype != torch.float32 for tensor in tensors[1:]):
        return None
    if size != struct.size or output.inputs != size or outputs < 2:
        raise ValueError(
            f"hidden is {list(hidden.shape)} and the output matrix takes {output.inputs} and gives {outputs}, expected "
            f"[tokens, {struct.size}], {struct.size} and at least 2"
        )
    if thresholds.shape != (rows,) or rule.combine.shape != (4,):
        raise ValueError(
            f"thresholds are {list(thresholds.shape)} and combine is {list(rule.combine.shape)}, expected [{rows}] "
            "and [4]"
        )
    hidden, thresholds, combine = (tensor.contiguous() for tensor in tensors)
    confidence, leaves = torch.empty(rows), torch.empty(rows, dtype=torch.bool)
    projected, logits = torch.empty(rows, dtype=torch.int64), torch.empty(rows, outputs)
    narrow = 2 * size + (0 if hidden.dtype == torch.float32 else outputs)
    scratch, wide = (
        torch.empty(rows * narrow, dtype=hidden.dtype),
        torch.empty(rows * (size + struct.units + 2)),
    )
    count = ctypes.c_int64()
    library.exit_gate(
        ctypes.byref(
            _Decisions(confidence.data_ptr(), leaves.data_ptr(), projected.data_ptr(), logits.data_ptr())
        ),
        ctypes.byref(count),
        hidden.data_ptr(),
        thresholds.data_ptr(),
        ctypes.byref(_Gate(struct, output, combine.data_ptr(), rule.screen_ratio, LEAST_DOUBT)),
        rows,
        scratch.data_ptr(),
        wide.data_ptr(),
        DTYPE_CODES[hidden.dtype],
        torch.get_num_threads(),
    )
    return confidence, leaves, projected[: count.value], logits[: count.value]
