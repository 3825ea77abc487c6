"""The public exit kernels: native on the CPU, Triton on a GPU, plain PyTorch elsewhere and where gradients are wanted.

A row's result does not depend, to the bit, on the rows beside it, so that a token leaves or stays alike in any batch.
"""

import ctypes
from dataclasses import dataclass, field

import torch
from torch import Tensor

from exeunt.kernels.exit_gate.judge import JudgeStruct, JudgeWeights
from exeunt.kernels.exit_gate.reference import (
    LEAST_DOUBT,
    exit_state_reference,
    gate_confidence_reference,
)
from exeunt.kernels.full_linear import full_linear
from exeunt.kernels.gpu import check_one_device, triton_runs
from exeunt.kernels.native.library import DTYPE_CODES, NativeLibrary, native_library
from exeunt.kernels.rows import layer_norm, rms_norm

_pointer = ctypes.c_void_p


class ExitStruct(ctypes.Structure):
    """`struct ExitWeights` of kernels/native/exit_state.h."""

    _fields_ = (
        *((name, _pointer) for name in ("norm", "norm_bias", "adapter")),
        *((name, _pointer) for name in ("hidden", "hidden_bias", "output", "output_bias")),
        *((name, ctypes.c_int64) for name in ("size", "units", "layer_norm")),
        ("eps", ctypes.c_double),
    )


@dataclass(frozen=True, slots=True)
class ExitWeights:
    """An exit's weights: norm and adapter in the model's dtype, the probe in float32, all dense on one device.

    Raises ValueError where the shapes do not fit each other, or the tensors are on several devices.
    """

    norm: Tensor  # [size]
    norm_bias: Tensor | None  # [size]; None is an RMS norm
    eps: float
    adapter: Tensor  # [size, size]
    probe: tuple[Tensor, Tensor, Tensor, Tensor]  # [units, size], [units], [units], []
    native: ExitStruct | None = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._check_shapes()
        object.__setattr__(self, "native", self._described())

    def __reduce__(self) -> tuple[type["ExitWeights"], tuple[object, ...]]:
        # `native` holds addresses of these tensors: a copy is described anew
        return ExitWeights, (self.norm, self.norm_bias, self.eps, self.adapter, self.probe)

    def _check_shapes(self) -> None:
        size, units = self.norm.numel(), self.probe[1].numel()
        expected: tuple[tuple[str, Tensor | None, tuple[int, ...]], ...] = (
            ("norm", self.norm, (size,)),
            ("norm_bias", self.norm_bias, (size,)),
            ("adapter", self.adapter, (size, size)),
            ("the probe's hidden weight", self.probe[0], (units, size)),
            ("the probe's hidden bias", self.probe[1], (units,)),
            ("the probe's output weight", self.probe[2], (units,)),
            ("the probe's output bias", self.probe[3], ()),
        )
        for name, tensor, shape in expected:
            if tensor is not None and tensor.shape != shape:
                raise ValueError(f"{name} is {list(tensor.shape)}, expected {list(shape)}")
        check_one_device("the exit's weights", *(tensor for _, tensor, _ in expected if tensor is not None))

    def _described(self) -> ExitStruct | None:
        """The weights as the native library reads them, None where it does not take them."""
        own = [self.norm, self.adapter, *([] if self.norm_bias is None else [self.norm_bias])]
        dtype = self.norm.dtype
        if not all(tensor.is_cpu and tensor.is_contiguous() for tensor in (*own, *self.probe)):
            return None
        if dtype not in DTYPE_CODES or any(tensor.dtype != dtype for tensor in own):
            return None
        if any(tensor.dtype != torch.float32 for tensor in self.probe):
            return None
        return ExitStruct(
            norm=self.norm.data_ptr(),
            norm_bias=None if self.norm_bias is None else self.norm_bias.data_ptr(),
            adapter=self.adapter.data_ptr(),
            hidden=self.probe[0].data_ptr(),
            hidden_bias=self.probe[1].data_ptr(),
            output=self.probe[2].data_ptr(),
            output_bias=self.probe[3].data_ptr(),
            size=self.norm.shape[0],
            units=self.probe[1].shape[0],
            layer_norm=int(self.norm_bias is not None),
            eps=self.eps,
        )


def exit_state(hidden: Tensor, weights: ExitWeights) -> tuple[Tensor, Tensor, Tensor]:
    """Return n + A n [tokens, size] of hidden [tokens, size], n its norm, the probe's logit [tokens] and its units.

    The units [tokens, units] are those before GELU; they and the logit are float32. Raises ValueError where hidden has
    another width than the weights, or is on another device.
    """
    if hidden.dim() != 2 or hidden.shape[1] != weights.norm.shape[0]:
        raise ValueError(f"hidden is {list(hidden.shape)}, expected [tokens, {weights.norm.shape[0]}]")
    check_one_device("hidden and the exit's weights", hidden, weights.norm)
    bias = () if weights.norm_bias is None else (weights.norm_bias,)
    own = (weights.norm, weights.adapter, *weights.probe, *bias)
    if _on_gpu(hidden, *own) and hidden.dtype == weights.norm.dtype and hidden.dtype in DTYPE_CODES:
        return _exit_state_on_gpu(hidden, weights)
    library = _library(hidden, *own)
    struct, dtype = weights.native, hidden.dtype
    if library is None or struct is None or dtype != weights.norm.dtype:
        return exit_state_reference(
            hidden, (weights.norm, weights.norm_bias, weights.eps), weights.adapter, weights.probe
        )
    hidden = hidden.contiguous()
    rows, size = hidden.shape
    state, logits = torch.empty_like(hidden), torch.empty(rows)
    scratch, wide = torch.empty_like(hidden), torch.empty(rows * (size + struct.units))
    library.exit_state(
        state.data_ptr(),
        logits.data_ptr(),
        hidden.data_ptr(),
        ctypes.addressof(struct),
        rows,
        scratch.data_ptr(),
        wide.data_ptr(),
        DTYPE_CODES[dtype],
        torch.get_num_threads(),
    )
    return state, logits, wide[rows * size :].view(rows, int(struct.units))


def _exit_state_on_gpu(hidden: Tensor, weights: ExitWeights) -> tuple[Tensor, Tensor, Tensor]:
    """`exit_state` out of kernels each of which keeps rows apart."""
    from exeunt.kernels.exit_gate.triton import probe_logit_triton  # Triton is there only where a GPU is

    if weights.norm_bias is None:
        normed = rms_norm(hidden, weights.norm, weights.eps)
    else:
        normed = layer_norm(hidden, weights.norm, weights.norm_bias, weights.eps)
    state = normed + full_linear(normed, weights.adapter)
    probe_weight, probe_bias, output_weight, output_bias = weights.probe
    units = full_linear(state.float(), probe_weight, probe_bias)
    return state, probe_logit_triton(units, output_weight, output_bias), units


def gate_confidence(
    probe_logit: Tensor,
    logits: Tensor,
    combine: Tensor,
    units: Tensor | None = None,
    judge: JudgeWeights | None = None,
) -> Tensor:
    """Return the probability [K] float32 that each row's top token is the full model's.

    `probe_logit` [K] and `logits` [K, V], V at least 2, are float32; `combine` [4] weighs the features and a constant.
    A judge reads the probe's `units` [K, units] float32 too, and needs as many logits as it looks at.
    Raises ValueError for other shapes and for tensors of several devices, TypeError for other dtypes.
    """
    tensors = (probe_logit, logits, combine, *(() if units is None else (units,)))
    rows = probe_logit.shape[0] if probe_logit.dim() == 1 else -1
    if logits.dim() != 2 or logits.shape[0] != rows or logits.shape[1] < 2 or combine.shape != (4,):
        raise ValueError(
            f"probe logits {list(probe_logit.shape)}, logits {list(logits.shape)} and combine {list(combine.shape)} "
            "are not [K], [K, V] with V at least 2, and [4]"
        )
    if judge is not None:
        judge.check(units, rows, logits.shape[1])
    if any(tensor.dtype != torch.float32 for tensor in tensors):
        raise TypeError(f"probe logits, logits, combine and units are {_dtypes(tensors)}, expected float32")
    parts = None if judge is None else judge.parts
    check_one_device("probe logits, logits, combine, units and the judge's weights", *tensors, *(parts or ()))
    if _on_gpu(logits, *tensors, *(parts or ())):
        from exeunt.kernels.exit_gate.triton import gate_confidence_triton

        return gate_confidence_triton(probe_logit, logits, combine, units, parts)
    library, struct = _library(*tensors, *(parts or ())), JudgeStruct() if judge is None else judge.native
    dense = all(tensor.is_contiguous() and tensor.is_cpu for tensor in tensors)
    if library is None or struct is None or not dense:
        return gate_confidence_reference(probe_logit, logits, combine, units, parts)
    out = torch.empty(logits.shape[0])
    library.gate_confidence(
        out.data_ptr(),
        logits.data_ptr(),
        probe_logit.data_ptr(),
        None if units is None else units.data_ptr(),
        ctypes.addressof(struct),
        combine.data_ptr(),
        *logits.shape,
        LEAST_DOUBT,
        torch.get_num_threads(),
    )
    return out


def _dtypes(tensors: tuple[Tensor, ...]) -> str:
    return ", ".join(str(tensor.dtype) for tensor in tensors)


def _library(*tensors: Tensor) -> NativeLibrary | None:
    """The native library where it takes the first tensor's device and no tensor wants a gradient."""
    if not tensors[0].is_cpu or (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)):
        return None
    return native_library()


def _on_gpu(*tensors: Tensor) -> bool:
    """Whether the Triton kernels take the first tensor's device, and no tensor wants a gradient."""
    wanted = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    return triton_runs(tensors[0].device) and not wanted
