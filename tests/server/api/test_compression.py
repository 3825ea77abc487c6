"""Which compression applies: as asked, else as the server defaults, else as the model offers."""

import pytest

from exeunt.compression.variant import Variant
from exeunt.server.api.compression import NotOfferedError, describe_applied, resolve
from exeunt.server.api.offer import Certificate, Offer
from exeunt.server.api.schemas import CompressionOptions
from exeunt.server.request import ExitPolicy

INT4 = Variant(weights="int4", kv_cache="int4")
LINEAR = Variant(weights="int4", kv_cache="int4", linear_block=True)
FULL = Variant()
OFFER = Offer(
    (FULL, INT4, LINEAR),
    INT4,
    ("block_2", "block_8"),
    {
        (INT4, "propagate"): (
            *(Certificate(0.01, 0.97), Certificate(0.02, None)),
            *(Certificate(0.05, 0.9), Certificate(0.1, 0.8)),
        ),
        (FULL, "propagate"): (Certificate(0.01, 0.99),),
    },
)
PLAIN = Offer((FULL,), FULL)


def options(text: str) -> CompressionOptions:
    return CompressionOptions.model_validate_json(text)


def exits_of(text: str, defaults: str = "{}", offer: Offer = OFFER) -> ExitPolicy:
    return resolve(options(text), options(defaults), offer).exits


def refusal(text: str, offer: Offer = OFFER) -> NotOfferedError:
    with pytest.raises(NotOfferedError) as caught:
        resolve(options(text), CompressionOptions(), offer)
    return caught.value


def test_nothing_asked_is_the_offers_default_with_exits_off() -> None:
    applied = resolve(None, CompressionOptions(), OFFER)
    assert (applied.variant, applied.exits.mode) == (INT4, "off")
    assert describe_applied(applied)["early_exit"] == {"mode": "off"}


def test_each_field_is_asked_then_default_then_offered() -> None:
    defaults = options('{"weights": "full", "kv_cache": "full"}')
    assert resolve(None, defaults, OFFER).variant == FULL
    asked = options('{"weights": "int4", "kv_cache": "int4", "linear_block": true}')
    assert resolve(asked, defaults, OFFER).variant == LINEAR


@pytest.mark.parametrize(
    ("asked", "target", "threshold"),
    [
        ('{"early_exit": {"mode": "approximate"}}', 0.05, 0.9),  # the smallest certified target from 0.02
        ('{"early_exit": {"mode": "approximate", "max_disagreement": 0.01}}', 0.01, 0.97),
        ('{"early_exit": {"mode": "approximate", "threshold": 0.5}}', None, 0.5),
        ('{"weights": "full", "kv_cache": "full", "early_exit": {"mode": "approximate"}}', 0.01, 0.99),
    ],
)
def test_approximate_thresholds(asked: str, target: float | None, threshold: float) -> None:
    assert exits_of(asked) == ExitPolicy("approximate", threshold, target, "propagate")


def test_the_response_says_which_target_and_threshold_applied() -> None:
    applied = resolve(options('{"early_exit": {"mode": "approximate"}}'), CompressionOptions(), OFFER)
    assert describe_applied(applied) == {
        "weights": "int4",
        "kv_cache": "int4",
        "linear_block": False,
        "early_exit": {
            "mode": "approximate",
            "max_disagreement": 0.05,
            "threshold": 0.9,
            "skipped_kv": "propagate",
        },
    }


def test_server_defaults_fill_in_how_to_leave() -> None:
    defaults = '{"early_exit": {"mode": "approximate", "threshold": 0.7}}'
    assert exits_of("{}", defaults).threshold == 0.7
    assert exits_of('{"early_exit": {"max_disagreement": 0.1}}', defaults).threshold == 0.8
    assert exits_of('{"early_exit": false}', defaults).mode == "off"


@pytest.mark.parametrize(
    ("asked", "param", "words"),
    [
        ('{"early_exit": true}', "compression.early_exit.mode", ["'verified'", "'off' and 'approximate'"]),
        (
            '{"early_exit": {"mode": "verified"}}',
            "compression.early_exit.mode",
            ["'verified'", "'approximate'"],
        ),
        (
            '{"early_exit": {"mode": "approximate", "skipped_kv": "backfill"}}',
            "compression.early_exit.skipped_kv",
            ["'backfill'", "'propagate'"],
        ),
        (
            '{"early_exit": {"mode": "approximate", "max_disagreement": 0.05, "threshold": 0.5}}',
            "compression.early_exit.threshold",
            ["both", "give one"],
        ),
        (
            '{"early_exit": {"mode": "approximate", "max_disagreement": 0.02}}',
            "compression.early_exit.max_disagreement",
            ["0.02", "0.01, 0.05, 0.1"],
        ),
        (
            '{"linear_block": true, "early_exit": {"mode": "approximate"}}',
            "compression.early_exit.max_disagreement",
            ["no target is certified", "threshold"],
        ),
        ('{"early_exit": {"threshold": 0.5}}', "compression.early_exit.threshold", ["'off'", "leave it out"]),
        (
            '{"early_exit": {"mode": "off", "max_disagreement": 0.05}}',
            "compression.early_exit.max_disagreement",
            ["no use in mode 'off'"],
        ),
        (
            '{"early_exit": {"mode": "off", "skipped_kv": "propagate"}}',
            "compression.early_exit.skipped_kv",
            ["no use in mode 'off'"],
        ),
        ('{"weights": "full"}', "compression", ["weights=full kv_cache=int4", "weights=int4 kv_cache=int4"]),
    ],
)
def test_what_is_not_there_is_refused_with_what_is(asked: str, param: str, words: list[str]) -> None:
    error = refusal(asked)
    assert error.param == param
    for word in words:
        assert word in str(error)


@pytest.mark.parametrize(
    ("asked", "param", "words"),
    [
        ('{"weights": "int4"}', "compression.weights", ["'int4'", "holds 'full'"]),
        ('{"kv_cache": "int4"}', "compression.kv_cache", ["'int4'", "holds 'full'"]),
        ('{"linear_block": true}', "compression.linear_block", ["no linear block"]),
        ('{"early_exit": {"mode": "approximate"}}', "compression.early_exit.mode", ["there is 'off'"]),
    ],
)
def test_a_plain_model_holds_little(asked: str, param: str, words: list[str]) -> None:
    error = refusal(asked, PLAIN)
    assert error.param == param
    for word in words:
        assert word in str(error)
