"""The pass without pages is the decoder's own: with full keys and values, and with those that its INT4 pages hold."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from exeunt.calibration.kv_forms import DEPLOYED, FULL, UNROTATED, KVForm
from exeunt.calibration.kv_forward import FULL_READING, KVPart, KVReading, attend, row_slices, states_behind
from exeunt.calibration.sequence_batch import batches
from exeunt.calibration.teacher_forcing import ForcedModel
from exeunt.compression.decoder import Decoder
from exeunt.compression.linear_block import LinearBlock
from exeunt.compression.variant import KVFormat
from tests.calibration.conftest import BLOCKS, HIDDEN
from tests.calibration.counted_weights import streamed_decoder
from tests.compression.family_configs import CONFIGS
from tests.compression.reference_models import build_model, save

LENGTHS = (37, 12, 30, 1)


def some_rows(vocab: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(8)
    return [torch.randint(vocab, (length,), generator=g) for length in LENGTHS]


def logits(
    decoder: Decoder, rows: list[Tensor], form: KVForm, part: KVPart = "both", at_once: int = 50
) -> Tensor:
    ((*states,),) = states_behind(decoder, list(batches(rows, at_once)), [KVReading(form, part)])
    return torch.cat([decoder.head(state) for state in states])


def paged_logits(decoder: Decoder, rows: list[Tensor], kv_cache: KVFormat) -> Tensor:
    model = ForcedModel(decoder, kv_cache, ())
    (batch,) = batches(rows, 1000)
    return decoder.head(model.full_depth(batch)[1])


@pytest.mark.parametrize("name", CONFIGS)
def test_the_logits_are_the_decoders(name: str, tmp_path: Path) -> None:
    family, changes = CONFIGS[name]
    decoder = Decoder.load(save(build_model(family, **changes), tmp_path), dtype=torch.float32)
    rows = some_rows(decoder.spec.vocab_size)
    full = paged_logits(decoder, rows, "full")
    torch.testing.assert_close(logits(decoder, rows, FULL), full, atol=2e-4, rtol=0)

    # A code that falls on the other side of a rounding moves logits a little; another arithmetic moves them as far as
    # quantising does at all.
    int4 = paged_logits(decoder, rows, "int4")
    moved = (int4 - full).square().sum()
    assert (logits(decoder, rows, DEPLOYED) - int4).square().sum() < 0.02 * moved
    if decoder.spec.head_dim % 4 == 0:  # the rotation of other head sizes mixes pairs only
        assert (logits(decoder, rows, UNROTATED) - int4).square().sum() > 0.1 * moved


def test_all_readings_of_one_walk_are_those_of_their_own(decoder: Decoder) -> None:
    rows = some_rows(decoder.spec.vocab_size)
    readings = [FULL_READING, *(KVReading(DEPLOYED, part) for part in ("keys", "values", "both"))]
    told: list[int] = []
    together = states_behind(decoder, list(batches(rows, 50)), readings, advance=told.append)
    assert sum(told) == len(readings) * BLOCKS * sum(LENGTHS)
    for reading, states in zip(readings, together, strict=True):
        found = torch.cat([decoder.head(state) for state in states])
        torch.testing.assert_close(found, logits(decoder, rows, reading.form, reading.part))
    parts = [torch.cat(states) for states in together]
    assert all(not torch.equal(parts[i], parts[j]) for i in range(4) for j in range(i))


def test_a_linear_block_is_passed_through(decoder: Decoder) -> None:
    g = torch.Generator().manual_seed(4)
    up, down = torch.randn(HIDDEN, 3, generator=g) * 0.2, torch.randn(3, HIDDEN, generator=g) * 0.2
    replaced = decoder.with_linear_block(LinearBlock(2, down, up, torch.ones(HIDDEN)))
    rows = some_rows(decoder.spec.vocab_size)
    torch.testing.assert_close(
        logits(replaced, rows, FULL), paged_logits(replaced, rows, "full"), atol=2e-4, rtol=0
    )


def test_the_look_sees_every_rows_keys_and_values_as_they_are_made(decoder: Decoder) -> None:
    rows = some_rows(decoder.spec.vocab_size)
    seen: list[tuple[int, ...]] = []

    def look(keys: Tensor, values: Tensor) -> None:
        assert keys.shape == values.shape
        seen.append(tuple(keys.shape))

    readings = [FULL_READING, KVReading(DEPLOYED, "both")]
    states_behind(decoder, list(batches(rows, 50)), readings, look=look)
    spec = decoder.spec
    assert seen == [(length, spec.kv_heads, spec.head_dim) for length in LENGTHS] * BLOCKS


def test_a_streamed_block_is_read_once_for_all_readings(checkpoint: Path, decoder: Decoder) -> None:
    streamed, weights = streamed_decoder(checkpoint)
    rows = some_rows(decoder.spec.vocab_size)
    readings = [FULL_READING, KVReading(DEPLOYED, "both")]
    groups = list(batches(rows, 50))
    found, wanted = (states_behind(each, groups, readings) for each in (streamed, decoder))
    assert weights.asked == list(range(BLOCKS))
    assert all(
        torch.equal(a, b)
        for one, two in zip(found, wanted, strict=True)
        for a, b in zip(one, two, strict=True)
    )


def test_rows_are_found_in_a_batch() -> None:
    (batch,) = batches(some_rows(20), 1000)
    assert [(row.start, row.stop) for row in row_slices(batch)] == [(0, 37), (37, 49), (49, 79), (79, 80)]


@pytest.mark.parametrize("window", [None, 1, 3, 40])
def test_attention_equals_the_written_out_sum(window: int | None) -> None:
    g = torch.Generator().manual_seed(0)
    queries = torch.randn(9, 4, 6, generator=g)
    keys, values = torch.randn(9, 2, 6, generator=g), torch.randn(9, 2, 6, generator=g)
    found = attend(queries, keys, values, 0.3, window)
    for token in range(9):
        first = 0 if window is None else max(0, token - window + 1)
        for head in range(4):
            scores = keys[first : token + 1, head // 2] @ queries[token, head] * 0.3
            wanted = scores.softmax(0) @ values[first : token + 1, head // 2]
            torch.testing.assert_close(found[token, head], wanted)
