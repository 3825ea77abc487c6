"""The pass that defines risk equals running the tokens one by one, exits, propagated keys and values and all."""

import pytest
import torch

from exeunt.calibration.sequence_batch import SequenceBatch, batches
from exeunt.calibration.teacher_forcing import ForcedModel
from exeunt.compression.decoder import Decoder
from exeunt.compression.kv_format import KVPages
from exeunt.compression.linear_block import LinearBlock
from exeunt.compression.variant import KVFormat
from tests.calibration.conftest import BLOCKS, HIDDEN, VOCAB, random_exit
from tests.compression.paged_generation import batch_of, sequential_pages

THRESHOLD = 0.55


def rows(lengths: tuple[int, ...] = (40, 9, 23)) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return [torch.randint(VOCAB, (length,), generator=g) for length in lengths]


def whole(lengths: tuple[int, ...] = (40, 9, 23)) -> SequenceBatch:
    (batch,) = batches(rows(lengths), 1000)
    return batch


def forced(decoder: Decoder, kv: KVFormat, linear: bool) -> ForcedModel:
    if linear:
        g = torch.Generator().manual_seed(4)
        up, down = torch.randn(HIDDEN, 3, generator=g) * 0.2, torch.randn(3, HIDDEN, generator=g) * 0.2
        decoder = decoder.with_linear_block(LinearBlock(2, down, up, torch.zeros(HIDDEN)))
    return ForcedModel(decoder, kv, (random_exit(0, 1), random_exit(1, 2)))


@torch.inference_mode()
def one_by_one(
    model: ForcedModel, row: torch.Tensor, threshold: float
) -> tuple[list[int], list[torch.Tensor]]:
    """Where each token of a row leaves, and its logits there: a plain loop over tokens and stages."""
    decoder = model.decoder
    pages, tables = sequential_pages(model.layout, 1, len(row), decoder.device)
    left, logits = [], []
    for position in range(len(row)):
        batch = batch_of([range(position, position + 1)], tables, model.layout.page_tokens)
        hidden = decoder.embed(row[position : position + 1], batch.positions)
        start = 0
        for number, head in enumerate(model.exits):
            hidden = decoder.run_blocks(hidden, batch, pages, start, head.depth)
            start = head.depth
            limit = torch.tensor([threshold if position > 0 else float("inf")])
            gate = head.gate(hidden, limit, decoder.project)
            if bool(gate.leaves):
                decoder.project_kv(hidden, batch, pages, start, BLOCKS)
                left.append(number)
                logits.append(gate.logits[0])
                break
        else:
            hidden = decoder.run_blocks(hidden, batch, pages, start, BLOCKS)
            left.append(len(model.exits))
            logits.append(decoder.head(hidden)[0])
    return left, logits


def collect(
    model: ForcedModel, batch: SequenceBatch, threshold: float, *, to_the_end: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    left = torch.full((batch.tokens,), -1)
    logits = torch.full((batch.tokens, VOCAB), float("nan"))

    def sink(number: int, tokens: torch.Tensor, values: torch.Tensor) -> None:
        assert bool((left[tokens] == -1).all()), "a token is given to the sink once"
        left[tokens], logits[tokens] = number, values

    entry, _ = model.full_depth(batch)
    model.with_exits(batch, threshold, entry, sink, to_the_end=to_the_end)
    return left, logits


@pytest.mark.parametrize("kv", ["full", "int4"])
@pytest.mark.parametrize("linear", [False, True])
def test_it_equals_a_loop_over_tokens(decoder: Decoder, kv: KVFormat, linear: bool) -> None:
    model, batch = forced(decoder, kv, linear), whole()
    left, logits = collect(model, batch, THRESHOLD)
    wanted_left: list[int] = []
    wanted: list[torch.Tensor] = []
    for row in rows():
        own_left, own = one_by_one(model, row, THRESHOLD)
        wanted_left += own_left
        wanted += own
    assert left.tolist() == wanted_left
    assert all(left.tolist().count(number) >= 5 for number in (0, 1, 2)), "every way out is taken"
    torch.testing.assert_close(logits, torch.stack(wanted), atol=2e-3, rtol=1e-3)


def test_propagated_keys_and_values_matter(decoder: Decoder) -> None:
    """With exits, tokens that stay see other keys and values than at full depth: risk is not read off full depth."""
    model, batch = forced(decoder, "full", False), whole()
    left, logits = collect(model, batch, THRESHOLD)
    _, final = model.full_depth(batch)
    stayed = left == len(model.exits)
    at_full_depth = model.decoder.head(final)
    assert not torch.allclose(logits[stayed], at_full_depth[stayed], atol=1e-3)


def test_no_exit_is_full_depth(decoder: Decoder) -> None:
    model, batch = forced(decoder, "full", False), whole()
    left, logits = collect(model, batch, 1.1)
    assert set(left.tolist()) == {len(model.exits)}
    _, final = model.full_depth(batch)
    torch.testing.assert_close(logits, model.decoder.head(final))
    assert model.top_tokens(final).tolist() == logits.argmax(-1).tolist()


def test_the_first_token_of_a_row_never_leaves(decoder: Decoder) -> None:
    model, batch = forced(decoder, "full", False), whole()
    left, _ = collect(model, batch, 0.0)
    first = batch.positions == 0
    assert set(left[first].tolist()) == {len(model.exits)}
    assert set(left[~first].tolist()) == {0}


def test_stopping_at_the_last_exit_gives_the_same_exits(decoder: Decoder) -> None:
    model, batch = forced(decoder, "int4", False), whole()
    left, logits = collect(model, batch, THRESHOLD)
    early, early_logits = collect(model, batch, THRESHOLD, to_the_end=False)
    out = left < len(model.exits)
    assert torch.equal(early, torch.where(out, left, -1))
    torch.testing.assert_close(early_logits[out], logits[out])


def test_a_batch_does_not_change_its_rows(decoder: Decoder) -> None:
    model = forced(decoder, "full", False)
    together, _ = collect(model, whole(), THRESHOLD)
    alone = [collect(model, batch, THRESHOLD)[0] for batch in batches(rows(), 1)]
    assert together.tolist() == torch.cat(alone).tolist()


def test_geometry_of_a_packed_batch_is_the_decoders_own(decoder: Decoder) -> None:
    model, batch = forced(decoder, "full", False), whole((5, 30))
    geometry = batch.geometry(model.layout.page_tokens)
    per_row = -(-30 // model.layout.page_tokens)
    tables = torch.arange(2 * per_row, dtype=torch.int32).view(2, per_row)
    wanted = batch_of([range(5), range(30)], tables, model.layout.page_tokens)
    for name in ("positions", "slots", "query_starts", "page_tables"):
        assert getattr(geometry, name).tolist() == getattr(wanted, name).tolist(), name
    assert geometry.max_context == wanted.max_context
    assert batch.targets[4] == batch.targets[34] == -1
    assert batch.targets[:4].tolist() == batch.token_ids[1:5].tolist()


def test_geometry_leaves_out_tokens_and_empty_rows(decoder: Decoder) -> None:
    batch = whole((5, 3, 6))
    kept = torch.tensor([1, 3, 9, 12])
    geometry = batch.geometry(16, kept)
    assert geometry.positions.tolist() == [1, 3, 1, 4]
    assert geometry.query_starts.tolist() == [0, 2, 4]
    assert geometry.page_tables.tolist() == [[0], [2]]
    assert geometry.slots.tolist() == [1, 3, 33, 36]


def test_pages_are_reused(decoder: Decoder) -> None:
    model = forced(decoder, "full", False)
    large: KVPages = model.pages(whole((90, 90)))
    assert model.pages(whole((5,))) is large
