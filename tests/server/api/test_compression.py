"""Which compression applies: as asked, else as the server defaults, else as the model offers."""

import pytest
from pydantic import ValidationError

from exeunt.calibration.nll_risk import CLIP
from exeunt.compression.variant import SkippedKV, Variant
from exeunt.server.api.compression import NotOfferedError, describe_applied, resolve
from exeunt.server.api.offer import Certificate, Offer
from exeunt.server.api.schemas import NLL_CLIP, CompressionOptions
from exeunt.server.request import ExitPolicy

APPROXIMATE = '"mode": "approximate"'
INT4 = Variant(weights="int4", kv_cache="int4")
LINEAR = Variant(weights="int4", kv_cache="int4", linear_block=True)
FULL = Variant()
OFFER = Offer(
    (FULL, INT4, LINEAR),
    INT4,
    ("block_2", "block_8"),
    ("off", "verified", "approximate"),
    {
        (INT4, "propagate"): (
            *(Certificate(0.01, 0.97), Certificate(0.02, None)),
            *(Certificate(0.05, 0.9), Certificate(0.1, 0.8)),
        ),
        (INT4, "backfill"): (Certificate(0.01, None), Certificate(0.05, 0.85), Certificate(0.1, 0.7)),
        (FULL, "propagate"): (Certificate(0.01, 0.99),),
    },
    {
        (INT4, "backfill"): (Certificate(0.01, None, "only 12 tokens left"), Certificate(0.05, 0.75)),
        (INT4, "propagate"): (Certificate(0.01, None, "it was not tested"), Certificate(0.02, 0.88)),
    },
)
DRAFTS_ONLY = Offer((FULL,), FULL, ("block_2",), ("off", "verified"))
PLAIN = Offer((FULL,), FULL)


def options(text: str) -> CompressionOptions:
    return CompressionOptions.model_validate_json(text)


def exits_of(text: str, defaults: str = "{}", offer: Offer = OFFER) -> ExitPolicy:
    return resolve(options(text), options(defaults), offer).exits


def refusal(text: str, offer: Offer = OFFER) -> NotOfferedError:
    with pytest.raises(NotOfferedError) as caught:
        resolve(options(text), CompressionOptions(), offer)
    return caught.value


@pytest.mark.parametrize(("offer", "mode"), [(OFFER, "verified"), (DRAFTS_ONLY, "verified"), (PLAIN, "off")])
def test_nothing_asked_is_the_offers_default_with_exits_that_change_nothing(offer: Offer, mode: str) -> None:
    applied = resolve(None, CompressionOptions(), offer)
    assert (applied.variant, applied.exits.mode) == (offer.default, mode)
    assert describe_applied(applied)["early_exit"] == {"mode": mode}


@pytest.mark.parametrize(
    ("asked", "mode"),
    [
        ('{"early_exit": true}', "verified"),
        ('{"early_exit": false}', "off"),
        ('{"early_exit": {"mode": "verified"}}', "verified"),
        ('{"early_exit": {"mode": "off"}}', "off"),
        ('{"early_exit": {}}', "verified"),
    ],
)
def test_modes_without_anything_to_choose(asked: str, mode: str) -> None:
    assert exits_of(asked).mode == mode
    assert exits_of(asked).threshold is None
    default = exits_of(asked, '{"early_exit": {"mode": "approximate", "threshold": 0.7}}')
    assert default.mode == ("approximate" if asked == '{"early_exit": {}}' else mode)


def test_each_field_is_asked_then_default_then_offered() -> None:
    defaults = options('{"weights": "full", "kv_cache": "full"}')
    assert resolve(None, defaults, OFFER).variant == FULL
    asked = options('{"weights": "int4", "kv_cache": "int4", "linear_block": true}')
    assert resolve(asked, defaults, OFFER).variant == LINEAR


@pytest.mark.parametrize(
    ("variant", "chosen", "target", "threshold", "skipped_kv"),
    [
        ("", "", 0.05, 0.85, "backfill"),  # the smallest certified target from 0.02
        ("", '"skipped_kv": "propagate"', 0.05, 0.9, "propagate"),
        ("", '"max_disagreement": 0.1', 0.1, 0.7, "backfill"),
        ("", '"max_disagreement": 0.01', 0.01, 0.97, "propagate"),  # for backfill it is not certified
        ("", '"threshold": 0.5', None, 0.5, "backfill"),
        ("", '"threshold": 0.5, "skipped_kv": "propagate"', None, 0.5, "propagate"),
        ('"weights": "full", "kv_cache": "full"', "", 0.01, 0.99, "propagate"),  # for backfill nothing is
        ('"weights": "full", "kv_cache": "full"', '"threshold": 0', None, 0.0, "propagate"),
        ('"linear_block": true', '"threshold": 1', None, 1.0, "backfill"),  # nothing is certified at all
    ],
)
def test_approximate_thresholds(
    variant: str, chosen: str, target: float | None, threshold: float, skipped_kv: SkippedKV
) -> None:
    early_exit = f'"early_exit": {{{", ".join(filter(None, [APPROXIMATE, chosen]))}}}'
    asked = f"{{{', '.join(filter(None, [variant, early_exit]))}}}"
    assert exits_of(asked) == ExitPolicy("approximate", threshold, target, skipped_kv)


@pytest.mark.parametrize(
    ("chosen", "target", "threshold", "skipped_kv"),
    [
        ('"max_nll_increase": 0.05', 0.05, 0.75, "backfill"),
        ('"max_nll_increase": 0.02', 0.02, 0.88, "propagate"),  # for backfill it is not certified
        ('"max_nll_increase": 0.05, "skipped_kv": "backfill"', 0.05, 0.75, "backfill"),
    ],
)
def test_targets_of_the_nll_increase(
    chosen: str, target: float, threshold: float, skipped_kv: SkippedKV
) -> None:
    asked = f'{{"early_exit": {{{APPROXIMATE}, {chosen}}}}}'
    applied = resolve(options(asked), CompressionOptions(), OFFER)
    assert applied.exits == ExitPolicy("approximate", threshold, None, skipped_kv, nll_target=target)
    assert describe_applied(applied)["early_exit"] == {
        "mode": "approximate",
        "max_nll_increase": target,
        "threshold": threshold,
        "skipped_kv": skipped_kv,
    }


def test_a_limit_that_is_asked_for_replaces_the_servers() -> None:
    defaults = '{"early_exit": {"mode": "approximate", "max_nll_increase": 0.05}}'
    assert exits_of("{}", defaults) == ExitPolicy("approximate", 0.75, None, "backfill", nll_target=0.05)
    assert exits_of('{"early_exit": {"skipped_kv": "backfill"}}', defaults).nll_target == 0.05
    assert exits_of('{"early_exit": {"max_disagreement": 0.1}}', defaults).target == 0.1
    assert exits_of('{"early_exit": {"max_disagreement": 0.1}}', defaults).nll_target is None
    assert exits_of('{"early_exit": {"threshold": 0.4}}', defaults).nll_target is None
    plain = '{"early_exit": {"mode": "approximate", "max_disagreement": 0.1}}'
    assert exits_of('{"early_exit": {"max_nll_increase": 0.02}}', plain).nll_target == 0.02
    assert exits_of('{"early_exit": {"max_nll_increase": 0.02}}', plain).target is None


def test_the_response_says_which_target_and_threshold_applied() -> None:
    applied = resolve(options('{"early_exit": {"mode": "approximate"}}'), CompressionOptions(), OFFER)
    assert describe_applied(applied) == {
        "weights": "int4",
        "kv_cache": "int4",
        "linear_block": False,
        "early_exit": {
            "mode": "approximate",
            "max_disagreement": 0.05,
            "threshold": 0.85,
            "skipped_kv": "backfill",
        },
    }


def test_server_defaults_fill_in_how_to_leave() -> None:
    defaults = '{"early_exit": {"mode": "approximate", "threshold": 0.7}}'
    assert exits_of("{}", defaults).threshold == 0.7
    assert exits_of('{"early_exit": {"max_disagreement": 0.1}}', defaults).threshold == 0.7
    propagate = '{"early_exit": {"mode": "approximate", "skipped_kv": "propagate"}}'
    assert exits_of('{"early_exit": {"max_disagreement": 0.1}}', propagate).threshold == 0.8
    assert exits_of('{"early_exit": false}', defaults).mode == "off"


@pytest.mark.parametrize(
    ("asked", "param", "words"),
    [
        (
            '{"early_exit": {"mode": "verified", "skipped_kv": "propagate"}}',
            "compression.early_exit.skipped_kv",
            ["no use in mode 'verified'", "compute all keys and values"],
        ),
        (
            '{"early_exit": {"mode": "verified", "max_disagreement": 0.05}}',
            "compression.early_exit.max_disagreement",
            ["no use in mode 'verified'", "those of exits off"],
        ),
        (
            '{"early_exit": {"mode": "approximate", "max_disagreement": 0.05, "threshold": 0.5}}',
            "compression.early_exit.threshold",
            ["both", "give one"],
        ),
        (
            '{"early_exit": {"mode": "approximate", "max_disagreement": 0.02}}',
            "compression.early_exit.max_disagreement",
            [
                "0.02",
                "0.05, 0.1 with skipped_kv=backfill and 0.01, 0.05, 0.1 with skipped_kv=propagate; ask for 0.01,",
            ],
        ),
        (
            '{"early_exit": {"mode": "approximate", "max_disagreement": 0.01, "skipped_kv": "backfill"}}',
            "compression.early_exit.max_disagreement",
            ["0.01 is not certified", "with skipped_kv=backfill; certified are 0.05, 0.1 with"],
        ),
        (
            '{"early_exit": {"mode": "approximate", "max_disagreement": 0.05, "max_nll_increase": 0.05}}',
            "compression.early_exit.max_nll_increase",
            ["both max_disagreement and max_nll_increase", "give one"],
        ),
        (
            '{"early_exit": {"mode": "approximate", "max_nll_increase": 0.05, "threshold": 0.5}}',
            "compression.early_exit.threshold",
            ["both max_nll_increase and threshold"],
        ),
        (
            '{"early_exit": {"mode": "approximate", "max_nll_increase": 0.01}}',
            "compression.early_exit.max_nll_increase",
            [
                "max_nll_increase 0.01 is not certified for weights=int4 kv_cache=int4",
                "certified are 0.05 with skipped_kv=backfill and 0.02 with skipped_kv=propagate",
                "Why: with backfill, only 12 tokens left; with propagate, it was not tested.",
            ],
        ),
        (
            '{"early_exit": {"mode": "approximate", "max_nll_increase": 0.01, "skipped_kv": "propagate"}}',
            "compression.early_exit.max_nll_increase",
            ["with skipped_kv=propagate; certified are", "Why: it was not tested."],
        ),
        (
            '{"early_exit": {"mode": "approximate", "max_nll_increase": 0.3}}',
            "compression.early_exit.max_nll_increase",
            [
                "0.3 is not certified",
                "certified are 0.05",
                "ask for 0.05, the nearest smaller one, which keeps within",
            ],
        ),
        (
            '{"weights": "full", "kv_cache": "full", "early_exit": {"mode": "approximate", "max_nll_increase": 0.02}}',
            "compression.early_exit.max_nll_increase",
            [
                "no target of it is certified; of max_disagreement certified are 0.01 with skipped_kv=propagate"
            ],
        ),
        (
            '{"early_exit": {"mode": "verified", "max_nll_increase": 0.05}}',
            "compression.early_exit.max_nll_increase",
            ["no use in mode 'verified'", "those of exits off"],
        ),
        (
            '{"linear_block": true, "early_exit": {"mode": "approximate"}}',
            "compression.early_exit.max_disagreement",
            [
                "no target is certified, give a threshold instead, or ask for weights=int4 kv_cache=int4 "
                "linear_block=false, of which 0.05",
            ],
        ),
        (
            '{"early_exit": {"threshold": 0.5}}',
            "compression.early_exit.threshold",
            ["no use in mode 'verified'", "leave it out"],
        ),
        (
            '{"early_exit": {"mode": "off", "threshold": 0.5}}',
            "compression.early_exit.threshold",
            ["no use in mode 'off'", "leave it out"],
        ),
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
        ('{"early_exit": true}', "compression.early_exit.mode", ["'verified'", "no exits", "there is 'off'"]),
        ('{"early_exit": {"mode": "approximate"}}', "compression.early_exit.mode", ["there is 'off'"]),
        (
            '{"early_exit": {"max_disagreement": 0.05}}',
            "compression.early_exit.max_disagreement",
            ["no use in mode 'off'; leave it out."],
        ),
    ],
)
def test_a_plain_model_holds_little(asked: str, param: str, words: list[str]) -> None:
    error = refusal(asked, PLAIN)
    assert error.param == param
    for word in words:
        assert word in str(error)


def test_exits_that_only_draft_let_no_token_leave_for_good() -> None:
    error = refusal('{"early_exit": {"mode": "approximate", "threshold": 0.5}}', DRAFTS_ONLY)
    assert error.param == "compression.early_exit.mode"
    assert "no exit at which tokens may leave for good; there is 'off' and 'verified'" in str(error)


@pytest.mark.parametrize("target", ["0", "-0.1", "NaN", "Infinity", '"0.02"', "true", "101"])
def test_nll_targets_are_positive_numbers(target: str) -> None:
    with pytest.raises(ValidationError):
        options(f'{{"early_exit": {{"mode": "approximate", "max_nll_increase": {target}}}}}')


@pytest.mark.parametrize("threshold", ["-0.1", "1.01", "NaN", '"0.5"', "true"])
def test_thresholds_are_probabilities(threshold: str) -> None:
    with pytest.raises(ValidationError):
        options(f'{{"early_exit": {{"mode": "approximate", "threshold": {threshold}}}}}')


@pytest.mark.parametrize("target", ["3", "3.5", "100"])
def test_a_target_that_no_text_can_break_is_refused_in_one_sentence(target: str) -> None:
    with pytest.raises(ValidationError, match=r"it must be below 3 nats, which a token's rise is clipped to"):
        CompressionOptions.model_validate_json(f'{{"early_exit": {{"max_nll_increase": {target}}}}}')
    assert NLL_CLIP == CLIP


@pytest.mark.parametrize(
    ("asked", "defaults", "named"),
    [
        (
            '{"weights": "full", "kv_cache": "full"}',
            '{"early_exit": {"mode": "approximate", "max_disagreement": 0.05}}',
            'early_exit.mode="approximate" and early_exit.max_disagreement=0.05',
        ),
        (
            '{"weights": "full", "kv_cache": "full", "early_exit": {"mode": "approximate"}}',
            '{"early_exit": {"mode": "approximate", "max_disagreement": 0.05}}',
            "early_exit.max_disagreement=0.05",
        ),
        (
            '{"early_exit": {"mode": "approximate", "max_disagreement": 0.01}}',
            '{"early_exit": {"skipped_kv": "backfill"}}',
            'early_exit.skipped_kv="backfill"',
        ),
        (
            '{"early_exit": {"threshold": 0.5}}',
            '{"early_exit": {"mode": "verified"}}',
            'early_exit.mode="verified"',
        ),
        ('{"weights": "full"}', '{"kv_cache": "int4"}', 'kv_cache="int4"'),
    ],
)
def test_a_refusal_says_what_was_not_asked_for(asked: str, defaults: str, named: str) -> None:
    with pytest.raises(NotOfferedError) as caught:
        resolve(options(asked), options(defaults), OFFER)
    note = f" The request leaves {named} to the server's default (--default-compression); ask for something else."
    assert str(caught.value).endswith(note)


@pytest.mark.parametrize(
    ("asked", "defaults"),
    [
        (
            '{"weights": "full", "kv_cache": "full", "early_exit": {"mode": "approximate", "max_disagreement": 0.1}}',
            '{"early_exit": {"mode": "approximate", "max_disagreement": 0.05}}',
        ),
        ('{"early_exit": {"mode": "approximate", "max_disagreement": 0.3}}', "{}"),
        ('{"weights": "full", "kv_cache": "int4"}', '{"kv_cache": "full"}'),
    ],
)
def test_a_refusal_of_what_was_asked_for_blames_no_default(asked: str, defaults: str) -> None:
    with pytest.raises(NotOfferedError) as caught:
        resolve(options(asked), options(defaults), OFFER)
    assert "server's default" not in str(caught.value)
