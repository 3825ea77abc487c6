"""Figures are those of a plain computation, buckets sum to the total, and a form that changes nothing is free."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from exeunt.calibration.kv_forms import DEPLOYED, FULL, PER_CHANNEL, UNROTATED, TokenInt4
from exeunt.calibration.kv_study import (
    KVStudy,
    KVSubject,
    context_buckets,
    longest_rows,
    study_kv,
    study_work,
)
from exeunt.calibration.sequence_batch import batches
from exeunt.calibration.teacher_forcing import ForcedModel
from exeunt.compression.decoder import Decoder
from exeunt.compression.kv_format import kv_layout, page_bytes_for
from tests.calibration.conftest import VOCAB

LENGTHS = (70, 40, 70, 23, 70, 90)


def some_rows() -> list[Tensor]:
    g = torch.Generator().manual_seed(8)
    return [torch.randint(VOCAB, (length,), generator=g) for length in LENGTHS]


@pytest.fixture(scope="module")
def study(decoder: Decoder) -> KVStudy:
    return study_kv([KVSubject("full", decoder)], some_rows(), tokens=300, batch_tokens=100, seed=0)


def test_every_part_of_every_form_is_there_once(study: KVStudy, decoder: Decoder) -> None:
    assert (study.tokens, study.row_tokens) == (300, 90)  # the longest rows that there is room for
    (costs,) = study.subjects
    pairs = [(each.form, each.part) for each in costs.costs]
    assert pairs == [
        *((DEPLOYED.name, part) for part in ("keys", "values", "both")),
        *((UNROTATED.name, part) for part in ("keys", "both")),
        *((PER_CHANNEL.name, part) for part in ("keys", "values", "both")),
    ]
    page = page_bytes_for(decoder.spec, torch.float32)
    both = costs.cost(DEPLOYED, "both")
    assert both is not None
    assert both.bytes_per_token == kv_layout(decoder.spec, "int4", torch.float32, page).bytes_per_token
    assert costs.bytes_per_token == kv_layout(decoder.spec, "full", torch.float32, page).bytes_per_token
    assert costs.cost(UNROTATED, "values") is None
    keys = costs.cost(DEPLOYED, "keys")
    assert keys is not None
    assert keys.bytes_per_token == (both.bytes_per_token + costs.bytes_per_token) / 2


def test_figures_equal_those_of_the_decoders_pages(study: KVStudy, decoder: Decoder) -> None:
    (batch,) = batches([row for row in some_rows() if len(row) >= 70], 1000)
    full, int4 = (
        decoder.head(ForcedModel(decoder, kv, ()).full_depth(batch)[1]).log_softmax(-1)
        for kv in ("full", "int4")
    )
    nll = [float(F.nll_loss(each, batch.targets, ignore_index=-1)) for each in (full, int4)]
    (costs,) = study.subjects
    both = costs.cost(DEPLOYED, "both")
    assert both is not None
    perplexities = torch.tensor(nll).exp()
    assert costs.perplexity.value == pytest.approx(float(perplexities[0]), rel=1e-4)
    moved = float(perplexities[1] - perplexities[0])
    assert both.increase.value == pytest.approx(moved, abs=0.05 * abs(moved))
    kl = float(F.kl_div(int4, full, log_target=True, reduction="batchmean"))
    assert both.kl.value == pytest.approx(kl, rel=0.05)
    for cost in costs.costs:
        assert cost.perplexity.value - costs.perplexity.value == pytest.approx(cost.increase.value, abs=1e-9)
        assert cost.kl.low > 0
        assert cost.increase.low <= cost.increase.value <= cost.increase.high


def test_buckets_sum_to_the_total(study: KVStudy) -> None:
    (costs,) = study.subjects
    for cost in costs.costs:
        counts = [bucket.tokens for bucket in cost.by_context]
        assert sum(counts) == 300 - 4  # a row's last token predicts nothing
        total = sum(bucket.tokens * bucket.increase.value for bucket in cost.by_context) / sum(counts)
        ratio = cost.perplexity.value / costs.perplexity.value
        assert total == pytest.approx(float(torch.tensor(ratio, dtype=torch.float64).log()), abs=1e-9)
        assert [(bucket.first, bucket.last) for bucket in cost.by_context] == [
            (1, 16),
            (17, 32),
            (33, 64),
            (65, 90),
        ]


def test_the_longest_rows_are_studied() -> None:
    rows = some_rows()
    assert longest_rows(rows, 300) == [0, 2, 4, 5]
    assert longest_rows(rows, 190) == [0, 3, 5]  # a shorter one where no longer one has room
    assert longest_rows(rows, 10) == [5]


def test_forms_are_held_against_each_other_on_the_same_resamples(study: KVStudy) -> None:
    (costs,) = study.subjects
    assert [each.other for each in costs.differences] == [UNROTATED.name, PER_CHANNEL.name]
    ours = costs.cost(DEPLOYED, "both")
    for form in (UNROTATED, PER_CHANNEL):
        theirs, over = costs.cost(form, "both"), costs.over(form)
        assert ours is not None
        assert theirs is not None
        assert over is not None
        assert over.increase.value == pytest.approx(ours.increase.value - theirs.increase.value, abs=1e-9)
        assert over.kl.value == pytest.approx(ours.kl.value - theirs.kl.value, abs=1e-12)
        apart = (ours.kl.high - ours.kl.low) + (theirs.kl.high - theirs.kl.low)
        assert 0 < over.kl.high - over.kl.low < apart  # what both share cancels


def test_without_the_deployed_form_nothing_is_held_against_it(decoder: Decoder) -> None:
    subject = KVSubject("full", decoder, parts=("both",), forms=(UNROTATED, PER_CHANNEL))
    (costs,) = study_kv([subject], some_rows(), batch_tokens=100, seed=0).subjects
    assert costs.differences == ()
    assert costs.over(PER_CHANNEL) is None


def test_context_buckets_double() -> None:
    assert context_buckets(512) == [(1, 16), (17, 32), (33, 64), (65, 128), (129, 256), (257, 512)]
    assert context_buckets(16) == [(1, 16)]
    assert context_buckets(20) == [(1, 16), (17, 20)]
    assert context_buckets(5) == [(1, 5)]


def test_a_form_that_changes_nothing_costs_nothing(decoder: Decoder) -> None:
    subject = KVSubject("full", decoder, parts=("both",), forms=(FULL,))
    (cost,) = study_kv([subject], some_rows(), batch_tokens=100, seed=0).subjects[0].costs
    assert (cost.increase.value, cost.increase.low, cost.increase.high) == (0.0, 0.0, 0.0)
    assert cost.kl.value == cost.key_error == cost.value_error == 0.0
    assert {bucket.increase.value for bucket in cost.by_context} == {0.0}


def test_errors_are_of_the_parts_that_are_altered(decoder: Decoder) -> None:
    @dataclass(frozen=True, slots=True)
    class Tenth(TokenInt4):
        """Takes a tenth off keys and a fifth off values: errors of 1 % and 4 %."""

        def keys(self, keys: Tensor) -> Tensor:
            return keys * 0.9

        def values(self, values: Tensor) -> Tensor:
            return values * 0.8

    form = Tenth("a tenth", rotated=False)
    (costs,) = study_kv(
        [KVSubject("full", decoder, forms=(form,))], some_rows(), batch_tokens=100, seed=0
    ).subjects
    errors = {each.part: (each.key_error, each.value_error) for each in costs.costs}
    assert errors["both"] == pytest.approx((0.01, 0.04), rel=1e-5)
    assert errors["keys"] == (errors["both"][0], 0.0)
    assert errors["values"] == (0.0, errors["both"][1])


def test_progress_adds_up_and_the_same_seed_gives_the_same_study(study: KVStudy, decoder: Decoder) -> None:
    told: list[int] = []
    subjects = [KVSubject("full", decoder)]
    again = study_kv(subjects, some_rows(), tokens=300, batch_tokens=100, seed=0, advance=told.append)
    assert again == study
    assert sum(told) == study_work(subjects, some_rows(), 300)


def test_intervals_are_drawn_by_documents(decoder: Decoder) -> None:
    subject = KVSubject("full", decoder, parts=("both",), forms=(DEPLOYED,))
    rows = [row[:12] for row in some_rows() for _ in range(8)]
    apart, together = (
        study_kv([subject], rows, tokens=540, batch_tokens=600, seed=0, documents=documents)
        for documents in (list(range(48)), [number // 2 for number in range(48)])
    )
    assert (apart.text_blocks, together.text_blocks) == (45, 23)
    assert apart.subjects[0].perplexity.value == together.subjects[0].perplexity.value
    assert apart.subjects[0].perplexity.low != together.subjects[0].perplexity.low
