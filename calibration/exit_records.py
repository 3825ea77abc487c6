"""A fitted exit, and its way into a calibration's journal and back: what was trained need not be trained again.

Every number comes back as it was, tensors as they are and floats by their shortest exact form, so that a calibration
that was interrupted gives the bundle of one that was not.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from pydantic import TypeAdapter
from torch import Tensor

from exeunt.calibration.exit_training import CurvePoint, TrainedHead
from exeunt.calibration.gate_training import GateQuality
from exeunt.calibration.journal import Journal
from exeunt.calibration.loss_comparison import LossComparison
from exeunt.compression.exit_tensors import exit_metadata, exit_tensors, exits_from_tensors
from exeunt.compression.exits import ExitHead, ExitNorm

_QUALITY = TypeAdapter(GateQuality)
_CURVE = TypeAdapter(tuple[CurvePoint, ...])
_LOSSES = TypeAdapter(LossComparison | None)
_LEARNED = ("norm", "adapter", "curve")  # of a trained head, what is not a plain value


@dataclass(frozen=True, slots=True)
class FittedExit:
    """An exit in float32 on the CPU, and how good it is on the select split."""

    head: ExitHead
    training: TrainedHead
    gate: GateQuality
    losses: LossComparison | None = None


def write_head(journal: Journal, block: int, head: TrainedHead, losses: LossComparison | None) -> None:
    """Remember the head trained behind `block`, which has no gate yet."""
    journal.write(_head_name(block), _head_tensors(head), _head_record(head, losses))


def read_head(
    journal: Journal, norm: ExitNorm, block: int
) -> tuple[TrainedHead, LossComparison | None] | None:
    """The head trained behind `block`, on the device of `norm`, the model's final one; None where there is none."""
    entry = journal.read(_head_name(block))
    return None if entry is None else _head(entry[0], entry[1], norm)


def write_exit(journal: Journal, fitted: FittedExit) -> None:
    """Remember a whole exit."""
    tensors = _head_tensors(fitted.training) | {
        f"exit.{name}": tensor for name, tensor in exit_tensors([fitted.head]).items()
    }
    record = {
        "exit": exit_metadata([fitted.head]),
        "gate": _QUALITY.dump_python(fitted.gate, mode="json"),
        "training": _head_record(fitted.training, fitted.losses),
    }
    journal.write(_exit_name(fitted.head.block), tensors, record)


def read_exit(journal: Journal, norm: ExitNorm, block: int) -> FittedExit | None:
    """The whole exit behind `block`; None where it was never finished."""
    entry = journal.read(_exit_name(block))
    if entry is None:
        return None
    tensors, record = entry
    parts = {
        name.removeprefix("exit."): tensor for name, tensor in tensors.items() if name.startswith("exit.")
    }
    training, losses = _head(tensors, record["training"], norm)
    (head,) = exits_from_tensors(parts, record["exit"])
    return FittedExit(head, training, _QUALITY.validate_python(record["gate"]), losses)


def _head_tensors(head: TrainedHead) -> dict[str, Tensor]:
    tensors = {"norm.weight": head.norm.weight, "adapter": head.adapter}
    return tensors if head.norm.bias is None else tensors | {"norm.bias": head.norm.bias}


def _head_record(head: TrainedHead, losses: LossComparison | None) -> dict[str, Any]:
    plain = {name: getattr(head, name) for name in TrainedHead.__dataclass_fields__ if name not in _LEARNED}
    return {
        "plain": plain,
        "curve": [asdict(point) for point in head.curve],
        "losses": _LOSSES.dump_python(losses, mode="json"),
    }


def _head(
    tensors: Mapping[str, Tensor], record: Mapping[str, Any], norm: ExitNorm
) -> tuple[TrainedHead, LossComparison | None]:
    device = norm.weight.device
    bias = tensors.get("norm.bias")
    own = replace(
        norm, weight=tensors["norm.weight"].to(device), bias=None if bias is None else bias.to(device)
    )
    curve = _CURVE.validate_python(record["curve"])
    head = TrainedHead(own, tensors["adapter"].to(device), curve=curve, **record["plain"])
    return head, _LOSSES.validate_python(record["losses"])


def _head_name(block: int) -> str:
    return f"head-{block}"


def _exit_name(block: int) -> str:
    return f"exit-{block}"
