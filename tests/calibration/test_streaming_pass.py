"""The pass that quantises and collects: states as the deployed decoder's, bounded memory, and going on after a stop."""

import gc
import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from exeunt.calibration.activations import BlockVisitor, Scratch, StateKeeper
from exeunt.calibration.block_fitter import BlockFitter
from exeunt.calibration.block_runner import BlockRunner
from exeunt.calibration.errors import CalibrationError
from exeunt.calibration.gptq import weighted_error
from exeunt.calibration.hessians import SecondMoments
from exeunt.calibration.journal import Entry, FolderJournal, Journal, NoJournal
from exeunt.calibration.sequence_batch import batches
from exeunt.calibration.streaming_pass import Streamed, planned_tokens, spread_rows, stream_model
from exeunt.calibration.teacher_forcing import ForcedModel
from exeunt.calibration.weights_int4 import Int4Plan
from exeunt.compression.checkpoint import Checkpoint, open_checkpoint
from exeunt.compression.decoder import Decoder
from exeunt.compression.linear import FullLinear
from exeunt.compression.variant import KVFormat
from exeunt.kernels.int4_linear import dequantize, quantize

CPU = torch.device("cpu")
MAPS = Path("/proc/self/maps")
BATCH = 128
FIT_ROWS = 12
PLAN = Int4Plan(hessian_tokens=300)


class StoppedError(Exception):
    """What stops a pass in these tests."""


class Watcher:
    """Notes which blocks have passed, and stops the pass in the middle of one."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.stop_at, self.blocks = stop_at, [0]

    def see(self, block: int, tokens: slice, before: Tensor, after: Tensor) -> None:
        if block == self.stop_at and tokens.start > 0:
            raise StoppedError

    def finish(self, block: int) -> None:
        self.blocks.append(block)

    def record(self, block: int) -> Entry:
        return {"seen": torch.tensor([block])}, {"block": block}

    def restore(self, block: int, entry: Entry) -> bool:
        return entry[0]["seen"].tolist() == [block] and entry[1] == {"block": block}

    def forget(self) -> None:
        self.blocks = [0]


class Census(Watcher):
    """Counts the full-precision linears in memory while each block runs as deployed."""

    def __init__(self) -> None:
        super().__init__()
        self.full, self._before = [0] * 4, full_linears()

    def see(self, block: int, tokens: slice, before: Tensor, after: Tensor) -> None:
        if tokens.start == 0:
            self.full[block] = full_linears() - self._before


def full_linears() -> int:
    """Full-precision linears that are alive, also those that only a cycle of references keeps."""
    return sum(issubclass(type(each), FullLinear) for each in gc.get_objects())


@pytest.fixture(scope="module")
def opened(checkpoint: Path) -> Checkpoint:
    return open_checkpoint(checkpoint)


@pytest.fixture(scope="module")
def rows() -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(7)
    lengths = torch.randint(20, 60, (18,), generator=g).tolist()
    return tuple(torch.randint(0, 256, (length,), generator=g) for length in lengths)


def streamed(
    opened: Checkpoint,
    rows: Sequence[Tensor],
    folder: Path,
    visitors: Sequence[BlockVisitor] = (),
    *,
    plan: Int4Plan | None = PLAN,
    kv_cache: KVFormat = "int4",
    journal: Journal | None = None,
    counted: list[int] | None = None,
) -> Streamed:
    folder.mkdir(exist_ok=True)
    return stream_model(
        opened.weights(),
        BlockRunner(opened.spec, kv_cache, CPU, torch.float32),
        rows,
        FIT_ROWS,
        plan,
        visitors,
        Scratch(folder),
        journal or NoJournal(),
        batch_tokens=BATCH,
        advance=(counted if counted is not None else []).append,
    )


def int4_decoder(opened: Checkpoint, passed: Streamed) -> Decoder:
    full = Decoder.from_weights(opened.spec, opened.weights(), dtype=torch.float32)
    assert passed.int4 is not None
    return Decoder.from_weights(
        opened.spec, passed.int4, dtype=torch.float32, int4_group_size=passed.int4.group_size, share_with=full
    )


@pytest.mark.parametrize("kv_cache", ["int4", "full"])
@pytest.mark.parametrize("plan", [PLAN, Int4Plan(rounding="nearest"), None])
def test_states_are_the_deployed_decoder_s_to_the_bit(
    opened: Checkpoint, rows: tuple[Tensor, ...], tmp_path: Path, plan: Int4Plan | None, kv_cache: KVFormat
) -> None:
    counted: list[int] = []
    keeper = StateKeeper(
        [1, 2], sum(map(len, rows)), opened.spec.hidden_size, torch.float32, Scratch(tmp_path)
    )
    passed = streamed(
        opened, rows, tmp_path / "states", [keeper], plan=plan, kv_cache=kv_cache, counted=counted
    )
    full = Decoder.from_weights(opened.spec, opened.weights(), dtype=torch.float32)
    assert (passed.int4 is None) == (plan is None)
    model = ForcedModel(full if plan is None else int4_decoder(opened, passed), kv_cache, ())
    start = 0
    for batch in batches(rows, BATCH):
        part = slice(start, start + batch.tokens)
        assert torch.equal(passed.final[part], model.full_depth(batch)[1])
        hidden = model.decoder.embed(batch.token_ids, batch.positions)
        geometry = batch.geometry(model.layout.page_tokens)
        for block in (1, 2):
            begin = 0 if block == 1 else 2
            hidden = model.decoder.run_blocks(hidden, geometry, model.pages(batch), begin, block + 1)
            assert torch.equal(keeper.states[block][part], hidden)
        start += batch.tokens
    assert sum(counted) == planned_tokens(rows, FIT_ROWS, plan, opened.spec.blocks)


def test_gptq_leaves_less_output_error_than_rounding_to_nearest(
    opened: Checkpoint, rows: tuple[Tensor, ...], tmp_path: Path
) -> None:
    """On the inputs that the deployed model itself gives its layers, and for the output matrix too."""
    found = streamed(opened, rows, tmp_path / "gptq").int4
    nearest = streamed(opened, rows, tmp_path / "nearest", plan=Int4Plan(rounding="nearest")).int4
    assert found is not None
    assert nearest is not None
    assert found.rounding == "gptq"
    assert set(found.output_error) == set(found.weights)
    assert nearest.output_error == {}
    for key, error in nearest.relative_error.items():
        assert 0 < error < 0.02
        assert found.relative_error[key] > 0.9 * error
    final = streamed(opened, rows, tmp_path / "again").final
    decoder = Decoder.from_weights(opened.spec, opened.weights(), dtype=torch.float32)
    moments = SecondMoments(opened.spec.hidden_size)
    moments.add(decoder.final_norm(final[: sum(map(len, rows[:FIT_ROWS]))]))
    matrix = opened.weights().shared()["output.weight"]
    rounded = weighted_error(matrix, quantize(matrix, 32), moments.sum)
    assert weighted_error(matrix, found.output, moments.sum) < 0.95 * rounded


def test_rounding_to_nearest_is_that_of_the_kernels(
    opened: Checkpoint, rows: tuple[Tensor, ...], tmp_path: Path
) -> None:
    passed = streamed(opened, rows, tmp_path, plan=Int4Plan(48, "nearest")).int4
    assert passed is not None
    weight = opened.weights().block(2)["down.weight"]
    assert torch.equal(
        dequantize(passed.weights[2, "down"], torch.float32), dequantize(quantize(weight, 48), torch.float32)
    )


@pytest.mark.parametrize("plan", [PLAN, None])
def test_one_block_at_a_time_is_in_memory_in_full_precision(
    opened: Checkpoint, rows: tuple[Tensor, ...], tmp_path: Path, plan: Int4Plan | None
) -> None:
    census = Census()
    read: list[int] = []
    alive: list[int] = []
    weights, before = opened.weights(), full_linears()

    class Counted:
        """The checkpoint, with a look at what is in memory whenever a block is asked for."""

        def shared(self) -> Mapping[str, Tensor]:
            return weights.shared()

        def block(self, index: int) -> Mapping[str, Tensor]:
            read.append(index)
            alive.append(full_linears() - before)
            return weights.block(index)

    stream_model(
        Counted(),
        BlockRunner(opened.spec, "int4", CPU, torch.float32),
        rows,
        FIT_ROWS,
        plan,
        [census],
        Scratch(tmp_path),
        NoJournal(),
        batch_tokens=BATCH,
    )
    assert read == list(range(opened.spec.blocks))
    assert alive == [0] * opened.spec.blocks  # the block in front is gone before the next is read
    assert (
        census.full == [0 if plan is not None else 4] * opened.spec.blocks
    )  # what runs as deployed has no full-precision layer


@pytest.mark.parametrize("stop_at", [0, 1, 3])
@pytest.mark.parametrize("plan", [PLAN, Int4Plan(rounding="nearest"), None])
def test_an_interrupted_pass_goes_on_to_the_same_bytes(
    opened: Checkpoint, rows: tuple[Tensor, ...], tmp_path: Path, plan: Int4Plan | None, stop_at: int
) -> None:
    """Stopped in the middle of a block, taken up by new objects on the folder that is left."""

    def attempt(
        folder: Path, watcher: Watcher, counted: list[int]
    ) -> tuple[Streamed, StateKeeper, BlockFitter]:
        journal = FolderJournal(folder, "the same calibration")
        scratch = Scratch(journal.scratch)
        tokens, hidden = sum(map(len, rows)), opened.spec.hidden_size
        keeper = StateKeeper([0, 2], tokens, hidden, torch.float32, scratch)
        fitter = BlockFitter(hidden, opened.spec.block_parameters, 400, CPU, scratch)
        visitors: list[BlockVisitor] = [keeper, fitter, watcher]
        passed = streamed(
            opened, rows, journal.scratch, visitors, plan=plan, journal=journal, counted=counted
        )
        return passed, keeper, fitter

    whole, whole_keeper, whole_fitter = attempt(tmp_path / "whole", Watcher(), [])
    with pytest.raises(StoppedError):
        attempt(tmp_path / "stopped", Watcher(stop_at), [])
    watcher, counted = Watcher(), list[int]()
    passed, keeper, fitter = attempt(tmp_path / "stopped", watcher, counted)
    assert watcher.blocks == [
        0,
        *range(stop_at, opened.spec.blocks),
    ]  # nothing that was finished is done again
    assert sum(counted) == planned_tokens(rows, FIT_ROWS, plan, opened.spec.blocks)
    assert torch.equal(passed.final, whole.final)
    for block in (0, 2):
        assert torch.equal(keeper.states[block], whole_keeper.states[block])
    for mine, expected in zip(fitter.fits, whole_fitter.fits, strict=True):
        assert mine.r2 == expected.r2
        assert torch.equal(mine.map.down, expected.map.down)
    if passed.int4 is not None and whole.int4 is not None:
        tensors, expected_tensors = passed.int4.tensors(), whole.int4.tensors()
        assert tensors.keys() == expected_tensors.keys()
        assert all(torch.equal(tensors[name], expected_tensors[name]) for name in tensors)
        assert passed.int4.relative_error == whole.int4.relative_error
        assert passed.int4.output_error == whole.int4.output_error


@pytest.mark.parametrize("spoilt", ["passing-0", "passing-1", "behind-block-0"])
def test_a_pass_whose_states_are_spoilt_begins_anew(
    opened: Checkpoint, rows: tuple[Tensor, ...], tmp_path: Path, spoilt: str
) -> None:
    """A power failure may lose what a file was given last: the digest tells."""

    def attempt(watcher: Watcher) -> Streamed:
        journal = FolderJournal(tmp_path / "work", "the same calibration")
        scratch = Scratch(journal.scratch)
        keeper = StateKeeper([0], sum(map(len, rows)), opened.spec.hidden_size, torch.float32, scratch)
        return streamed(opened, rows, journal.scratch, [keeper, watcher], journal=journal)

    expected = streamed(opened, rows, tmp_path / "whole").final
    with pytest.raises(StoppedError):
        attempt(Watcher(2))
    data = bytearray((tmp_path / "work" / "states" / spoilt).read_bytes())
    data[100:200] = bytes(100)
    (tmp_path / "work" / "states" / spoilt).write_bytes(data)
    watcher = Watcher()
    passed = attempt(watcher)
    # in front of block 2 is array 0; array 1 is what block 2 was writing
    begun = 2 if spoilt == "passing-1" else 0
    assert watcher.blocks == [0, *range(begun, opened.spec.blocks)]
    assert torch.equal(passed.final, expected)


def test_what_the_journal_holds_is_json_and_packed_weights(
    opened: Checkpoint, rows: tuple[Tensor, ...], tmp_path: Path
) -> None:
    journal = FolderJournal(tmp_path / "work", "this")
    streamed(opened, rows, journal.scratch, journal=journal)
    entry = journal.read("block-1")
    assert entry is not None
    tensors, record = entry
    json.dumps(record)
    held = sum(tensor.nbytes for tensor in tensors.values())
    assert (
        held < 0.8 * opened.spec.block_parameters
    )  # bytes: 4 bits and a scale and an offset to each 32 weights


def test_the_same_text_gives_the_same_bytes(
    opened: Checkpoint, rows: tuple[Tensor, ...], tmp_path: Path
) -> None:
    first, second = (streamed(opened, rows, tmp_path / name).int4 for name in ("a", "b"))
    assert first is not None
    assert second is not None
    tensors = second.tensors()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in first.tensors().items())


def test_rows_looked_at_are_spread_over_the_split() -> None:
    rows = [torch.zeros(100) for _ in range(40)]
    assert spread_rows(rows, 10_000) == list(range(40))
    chosen = spread_rows(rows, 1000)
    assert len(chosen) == pytest.approx(10, abs=1)
    steps = {after - before for before, after in pairwise(chosen)}
    assert steps <= {3, 4, 5}
    assert spread_rows(rows, 5) == [0]
    assert spread_rows([torch.zeros(3)], 1) == [0]


def test_a_weight_that_int4_cannot_hold_is_named(
    opened: Checkpoint, rows: tuple[Tensor, ...], tmp_path: Path
) -> None:
    weights = opened.weights()

    class Huge:
        def shared(self) -> Mapping[str, Tensor]:
            return weights.shared()

        def block(self, index: int) -> Mapping[str, Tensor]:
            tensors = dict(weights.block(index))
            return {**tensors, "out.weight": tensors["out.weight"] * 1e6} if index == 1 else tensors

    with pytest.raises(
        CalibrationError, match="Layer out of block 1 cannot be held in INT4: a weight is not"
    ):
        stream_model(
            Huge(),
            BlockRunner(opened.spec, "int4", CPU, torch.float32),
            rows,
            FIT_ROWS,
            PLAN,
            [],
            Scratch(tmp_path),
            NoJournal(),
            batch_tokens=BATCH,
        )


@pytest.mark.skipif(not MAPS.exists(), reason="needs Linux's list of what is mapped into a process")
def test_layers_that_the_journal_has_are_read_from_its_files(
    opened: Checkpoint, rows: tuple[Tensor, ...], tmp_path: Path
) -> None:
    kept = streamed(opened, rows, tmp_path / "kept").int4
    journal = FolderJournal(tmp_path / "work", "a calibration")
    filed = streamed(opened, rows, tmp_path / "filed", journal=journal).int4
    assert kept is not None
    assert filed is not None
    for (block, name), weight in filed.weights.items():
        for part in ("codes", "scales", "offsets"):
            tensor = getattr(weight, part)
            assert torch.equal(tensor, getattr(kept.weights[block, name], part))
            assert Path(file_at(tensor.data_ptr())).parent == tmp_path / "work"
    assert filed.relative_error == kept.relative_error
    assert filed.output_error == kept.output_error


def file_at(address: int) -> str:
    """The file that is mapped at an address of this process; nothing where none is."""
    for line in MAPS.read_text().splitlines():
        span, *rest = line.split(maxsplit=5)
        first, last = (int(each, 16) for each in span.split("-"))
        if first <= address < last:
            return rest[4] if len(rest) > 4 else ""
    return ""
