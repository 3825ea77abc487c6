"""Turns a request's compression block, and the server's default for it, into what the engine runs."""

import json
from collections.abc import Iterable
from dataclasses import astuple, dataclass
from operator import eq
from typing import Final

from exeunt.compression.variant import SkippedKV, Variant
from exeunt.server.api.offer import SKIPPED_KV, Offer, Risk
from exeunt.server.api.schemas import CompressionOptions, EarlyExitOptions
from exeunt.server.request import ExitMode, ExitPolicy

RISKS: Final[tuple[Risk, ...]] = ("max_disagreement", "max_nll_increase")
LIMITS: Final = (*RISKS, "threshold")  # of which a request gives one at most
DEFAULT_TARGET: Final = 0.02  # the smallest certified target from here on is used where a request names none
_WHY_UNUSED: Final = {
    ("verified", "max_disagreement"): ", whose answers are those of exits off",
    ("verified", "max_nll_increase"): ", whose answers are those of exits off",
    ("verified", "threshold"): ", in which the server decides when a draft pays",
    ("verified", "skipped_kv"): ", whose drafts are confirmed by passes that compute all keys and values",
}


class NotOfferedError(ValueError):
    """A request asks for a mode that the loaded model does not have.

    `param` is the field at fault, as a path in the request.
    """

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.param = param


@dataclass(frozen=True, slots=True)
class AppliedCompression:
    """The compression a request runs under."""

    variant: Variant
    exits: ExitPolicy


def resolve(
    asked: CompressionOptions | None, defaults: CompressionOptions, offer: Offer
) -> AppliedCompression:
    """What applies: each field as asked, else as the server defaults, else as the model offers.

    Raises:
        NotOfferedError: the model does not have it, or the mode does not use it; the message says what there is.
    """
    asked = asked or CompressionOptions()
    try:
        return _resolved(asked, defaults, offer)
    except NotOfferedError as error:
        note = _unasked(error.param, asked, defaults)
        raise NotOfferedError(f"{error}{note}", error.param) from error


def _resolved(asked: CompressionOptions, defaults: CompressionOptions, offer: Offer) -> AppliedCompression:
    variant = Variant(
        weights=asked.weights or defaults.weights or offer.default.weights,
        kv_cache=asked.kv_cache or defaults.kv_cache or offer.default.kv_cache,
        linear_block=_first(asked.linear_block, defaults.linear_block, offer.default.linear_block),
    )
    _check_variant(variant, offer)
    exits = _exits(
        asked.early_exit or EarlyExitOptions(), defaults.early_exit or EarlyExitOptions(), variant, offer
    )
    return AppliedCompression(variant, exits)


def describe_applied(applied: AppliedCompression) -> dict[str, object]:
    """The response's `compression` block."""
    variant, exits = applied.variant, applied.exits
    early_exit: dict[str, object] = {"mode": exits.mode}
    if exits.mode == "approximate":
        if exits.target is not None:
            early_exit["max_disagreement"] = exits.target
        if exits.nll_target is not None:
            early_exit["max_nll_increase"] = exits.nll_target
        early_exit |= {"threshold": exits.threshold, "skipped_kv": exits.skipped_kv}
    return {
        "weights": variant.weights,
        "kv_cache": variant.kv_cache,
        "linear_block": variant.linear_block,
        "early_exit": early_exit,
    }


def _unasked(param: str, asked: CompressionOptions, defaults: CompressionOptions) -> str:
    """A sentence that names what a refusal is about and the server's defaults said; empty where all was asked for."""
    found = {
        field: _value(defaults, field)
        for field in _concerned(param.removeprefix("compression").removeprefix("."))
        if _value(asked, field) is None and _value(defaults, field) is not None
    }
    if not found:
        return ""
    named = " and ".join(f"{field}={json.dumps(value)}" for field, value in found.items())
    return f" The request leaves {named} to the server's default (--default-compression); ask for something else."


def _concerned(field: str) -> list[str]:
    """The fields that a refusal of `field` is about; an empty one is the variant as a whole."""
    if not field:
        return ["weights", "kv_cache", "linear_block"]
    limits = any(field == f"early_exit.{limit}" for limit in LIMITS)
    within = ["early_exit.mode", *(["early_exit.skipped_kv"] if limits else [])]
    return list(dict.fromkeys([*(within if field.startswith("early_exit") else []), field]))


def _value(options: CompressionOptions, path: str) -> object:
    """The value of a field such as `early_exit.mode`; None where it is not given."""
    found: object = options
    for name in path.split("."):
        found = getattr(found, name, None)
    return found


def _first(*values: bool | None) -> bool:
    return next((value for value in values if value is not None), False)


def _check_variant(variant: Variant, offer: Offer) -> None:
    if variant in offer.variants:
        return
    there = {
        "weights": sorted({v.weights for v in offer.variants}),
        "kv_cache": sorted({v.kv_cache for v in offer.variants}),
    }
    for name, held in there.items():
        value = getattr(variant, name)
        if value not in held:
            raise NotOfferedError(
                f"compression.{name} is '{value}'; the loaded model holds {_listed(held)}.",
                f"compression.{name}",
            )
    if variant.linear_block and not any(v.linear_block for v in offer.variants):
        raise NotOfferedError(
            "compression.linear_block is true; the loaded model has no linear block, leave it out or false.",
            "compression.linear_block",
        )
    held_variants = "; ".join(str(v) for v in offer.variants)
    raise NotOfferedError(
        f"The loaded model does not hold {variant} together; it holds {held_variants}.", "compression"
    )


def _exits(asked: EarlyExitOptions, defaults: EarlyExitOptions, variant: Variant, offer: Offer) -> ExitPolicy:
    mode = asked.mode or defaults.mode or offer.default_mode
    if mode not in offer.modes:
        lacks = "exit at which tokens may leave for good" if offer.exits else "exits"
        raise NotOfferedError(
            f"compression.early_exit.mode is '{mode}' and the loaded model has no {lacks}; there is "
            f"{_listed(offer.modes)}.",
            "compression.early_exit.mode",
        )
    if mode == "approximate":
        return _approximate(asked, defaults, variant, offer)
    _refuse_unused(asked, mode, offer)
    return ExitPolicy(mode=mode)


def _refuse_unused(asked: EarlyExitOptions, mode: ExitMode, offer: Offer) -> None:
    instead = " or ask for 'approximate'" if "approximate" in offer.modes else ""
    for name in (*LIMITS, "skipped_kv"):
        if getattr(asked, name) is not None:
            raise NotOfferedError(
                f"compression.early_exit.{name} has no use in mode '{mode}'{_WHY_UNUSED.get((mode, name), '')}; leave "
                f"it out{instead}.",
                f"compression.early_exit.{name}",
            )


def _approximate(
    asked: EarlyExitOptions, defaults: EarlyExitOptions, variant: Variant, offer: Offer
) -> ExitPolicy:
    source = asked if _given(asked) else defaults
    given = _given(source)
    if len(given) > 1:
        raise NotOfferedError(
            f"compression.early_exit has both {given[0]} and {given[1]}; give one of them.",
            f"compression.early_exit.{given[1]}",
        )
    risk: Risk = "max_nll_increase" if given == ["max_nll_increase"] else "max_disagreement"
    target: float | None = getattr(source, risk)
    method = asked.skipped_kv or defaults.skipped_kv
    skipped_kv = method or offer.default_skipped_kv(variant, target, risk)
    if source.threshold is not None:
        return ExitPolicy("approximate", source.threshold, None, skipped_kv)
    certified = offer.certified(variant, skipped_kv, risk)
    if target is None:
        target = _default_target(certified)
    if target is None or target not in certified:
        raise _uncertified(risk, target, offer, variant, method)
    if risk == "max_nll_increase":
        return ExitPolicy("approximate", certified[target], None, skipped_kv, nll_target=target)
    return ExitPolicy("approximate", certified[target], target, skipped_kv)


def _given(options: EarlyExitOptions) -> list[str]:
    """The limits that are given."""
    return [name for name in LIMITS if getattr(options, name) is not None]


def _default_target(certified: Iterable[float]) -> float | None:
    """The smallest certified target from DEFAULT_TARGET on, else the largest below it."""
    targets = list(certified)
    return min((t for t in targets if t >= DEFAULT_TARGET), default=max(targets, default=None))


def _uncertified(
    risk: Risk, target: float | None, offer: Offer, variant: Variant, method: SkippedKV | None
) -> NotOfferedError:
    there = _there(risk, offer, variant)
    what = (
        "compression.early_exit asks for approximate exits without a target, and none is certified"
        if target is None
        else f"compression.early_exit.{risk} {target} is not certified"
    )
    hint = f"certified are {there}" if there else "no target is certified, give a threshold instead"
    other = next(each for each in RISKS if each != risk)
    if not there and (instead := _there(other, offer, variant)):
        hint = f"no target of it is certified; of {other} certified are {instead}"
    elif not there and (others := [each for each in offer.variants if _there(risk, offer, each)]):
        nearest = max(others, key=lambda each: sum(map(eq, astuple(each), astuple(variant))))
        hint += f", or ask for {nearest}, of which {_there(risk, offer, nearest)} are certified"
    if (smaller := _smaller(risk, target, offer, variant, method)) is not None:
        hint += f"; ask for {smaller}, the nearest smaller one, which keeps within {target} too"
    named = f" with skipped_kv={method}" if method else ""
    return NotOfferedError(
        f"{what} for {variant}{named}; {hint}.{_why_not(risk, target, offer, variant, method)}",
        f"compression.early_exit.{risk}",
    )


def _smaller(
    risk: Risk, target: float | None, offer: Offer, variant: Variant, method: SkippedKV | None
) -> float | None:
    """The largest certified target below the one that was asked for, None where there is none."""
    if target is None:
        return None
    asked = (method,) if method else SKIPPED_KV
    below = (each for way in asked for each in offer.certified(variant, way, risk) if each < target)
    return max(below, default=None)


def _there(risk: Risk, offer: Offer, variant: Variant) -> str:
    """The certified targets of a variant by method; empty where there are none."""
    certified = {each: offer.certified(variant, each, risk) for each in SKIPPED_KV}
    return " and ".join(
        f"{', '.join(map(str, targets))} with skipped_kv={each}"
        for each, targets in certified.items()
        if targets
    )


def _why_not(
    risk: Risk, target: float | None, offer: Offer, variant: Variant, method: SkippedKV | None
) -> str:
    """A sentence with the bundle's own reason, where it looked at the target; empty otherwise."""
    if target is None:
        return ""
    asked = (method,) if method else SKIPPED_KV
    reasons = {each: offer.why_not(variant, each, risk, target) for each in asked}
    said = {each: reason for each, reason in reasons.items() if reason}
    if not said:
        return ""
    if len(set(said.values())) == 1:
        return f" Why: {next(iter(said.values()))}."
    return f" Why: {'; '.join(f'with {each}, {reason}' for each, reason in said.items())}."


def _listed(values: Iterable[str]) -> str:
    *first, last = (f"'{value}'" for value in values)
    return f"{', '.join(first)} and {last}" if first else last
