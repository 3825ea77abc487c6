"""Exit heads as tensors and settings, the form that they have in a bundle, and back."""

import json
from collections.abc import Mapping, Sequence
from typing import Final, TypeGuard

import torch
from torch import Tensor

from exeunt.compression.bundle_format import CONFIRMED_VERSION, JUDGED_VERSION, PLAIN_VERSION
from exeunt.compression.exit_output import Shortlist
from exeunt.compression.exit_parts import (
    JUDGE_PARTS,
    ExitConfirmation,
    ExitHeadError,
    ExitJudge,
    ExitProbe,
)
from exeunt.compression.exits import ExitHead
from exeunt.compression.norm import Norm

METADATA_KEY: Final = "exits"


def exit_tensors(heads: Sequence[ExitHead]) -> dict[str, Tensor]:
    """The tensors of `heads` under the names they have in a bundle: `block_<i>.<part>`."""
    return {f"{head.name}.{part}": tensor for head in heads for part, tensor in head.tensors.items()}


def exit_metadata(heads: Sequence[ExitHead]) -> dict[str, str]:
    """What `exit_tensors` does not hold, as safetensors metadata: blocks, norms and screens."""
    return {METADATA_KEY: json.dumps([_settings(head) for head in heads])}


def _settings(head: ExitHead) -> dict[str, object]:
    settings: dict[str, object] = {
        "block": head.block,
        "norm_kind": head.norm.kind,
        "norm_eps": head.norm.eps,
        "screen_ratio": head.screen_ratio,
    }
    return settings if head.confirmation is None else settings | {"list_ratio": head.confirmation.list_ratio}


def format_version(heads: Sequence[ExitHead]) -> int:
    """The least format version of a bundle with these heads: readers that would overlook a part must refuse it."""
    if any(head.confirmation is not None for head in heads):
        return CONFIRMED_VERSION
    return JUDGED_VERSION if any(head.optional_tensors for head in heads) else PLAIN_VERSION


def exits_from_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[ExitHead, ...]:
    """The heads that `exit_tensors` and `exit_metadata` wrote, shallowest first.

    Raises ExitHeadError where something is missing, left over, not a finite number, or does not fit together.
    """
    try:
        settings = json.loads(metadata[METADATA_KEY])
        heads = [_head_from(tensors, entry) for entry in settings]
    except KeyError as error:
        raise ExitHeadError(f"the exit heads are incomplete: {error} is missing") from error
    except (TypeError, OverflowError, RecursionError, json.JSONDecodeError) as error:
        raise ExitHeadError(f"the settings of the exit heads cannot be read: {error}") from error
    # half of a judge, say: what it was part of would be passed over
    left_over = sorted(set(tensors).difference(exit_tensors(heads)))
    if left_over:
        raise ExitHeadError(f"the exit heads have a tensor that is no part of them: {left_over[0]}")
    return tuple(sorted(heads, key=lambda head: head.block))


def _head_from(tensors: Mapping[str, Tensor], settings: Mapping[str, object]) -> ExitHead:
    block, kind, eps = settings["block"], settings["norm_kind"], settings["norm_eps"]
    ratio = settings["screen_ratio"]
    if not (isinstance(block, int) and _is_number(eps) and _is_number(ratio)):
        raise ExitHeadError(f"the settings of an exit head have the wrong types: {dict(settings)}")
    if kind not in ("rms", "layer"):
        raise ExitHeadError(f"block_{block}: norm kind is {kind!r}, it must be 'rms' or 'layer'")
    name = f"block_{block}"

    for place, tensor in tensors.items():
        if place.startswith(f"{name}.") and place != f"{name}.shortlist":
            _expect_numbers(place, tensor)

    def part(place: str) -> Tensor:
        return tensors[f"{name}.{place}"]

    norm = Norm(kind, part("norm.weight"), tensors.get(f"{name}.norm.bias"), float(eps))
    if not 0.0 <= norm.eps < float("inf"):
        raise ExitHeadError(f"{name}: norm_eps is {norm.eps}, it must be a number of at least 0")
    probe = ExitProbe(
        part("probe.hidden_weight"),
        part("probe.hidden_bias"),
        part("probe.output_weight"),
        part("probe.output_bias"),
    )
    return ExitHead(
        block,
        norm,
        part("adapter"),
        probe,
        part("combine"),
        float(ratio),
        _judge(tensors, f"{name}.judge"),
        _shortlist(tensors, name),
        _confirmation(tensors, name, settings),
    )


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _expect_numbers(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ExitHeadError(f"{name} is {tensor.dtype}, it must be float32, bfloat16 or float16")
    if not bool(tensor.isfinite().all()):
        raise ExitHeadError(f"{name} holds a number that is not finite")


def _judge(tensors: Mapping[str, Tensor], name: str) -> ExitJudge | None:
    """The judge whose tensors begin with `name`, None where there is none."""
    if f"{name}.top_weight" not in tensors:
        return None
    return ExitJudge(*(tensors[f"{name}.{part}"] for part in JUDGE_PARTS))


def _shortlist(tensors: Mapping[str, Tensor], name: str) -> Shortlist | None:
    ids = tensors.get(f"{name}.shortlist")
    try:
        return None if ids is None else Shortlist(ids)
    except ValueError as error:
        raise ExitHeadError(f"{name}: {error}") from error


def _confirmation(
    tensors: Mapping[str, Tensor], name: str, settings: Mapping[str, object]
) -> ExitConfirmation | None:
    judge = _judge(tensors, f"{name}.confirm.judge")
    if judge is None:
        if "list_ratio" in settings or f"{name}.confirm.combine" in tensors:
            raise ExitHeadError(f"{name}: the confirmation has no judge")
        return None
    ratio = settings["list_ratio"]
    if not _is_number(ratio):
        raise ExitHeadError(f"{name}: list_ratio is {ratio!r}, it must be a number in [0, 1]")
    return ExitConfirmation(judge, tensors[f"{name}.confirm.combine"], float(ratio))
