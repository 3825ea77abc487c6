"""Blocks that are read when they are run: the bits of a decoder that holds them all, and never two at once."""

import gc
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import exeunt.compression.resident_blocks
import exeunt.compression.streamed_blocks
from exeunt.compression.block import Block, BlockFrame
from exeunt.compression.block_weights import read_block
from exeunt.compression.bundle_weights import int4_tensors
from exeunt.compression.checkpoint import Checkpoint, open_checkpoint
from exeunt.compression.checkpoint_names import linear_names
from exeunt.compression.decoder import Decoder
from exeunt.compression.linear_block import LinearBlock
from exeunt.compression.streamed_blocks import StreamedBlocks
from exeunt.compression.variant import KVFormat
from exeunt.compression.weights import WeightError, WeightSource
from exeunt.kernels.int4_linear import quantize
from exeunt.kernels.native.library import native_library
from tests.compression.paged_generation import Sequences, kv_tensors, written
from tests.compression.reference_models import build_model, save

FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 6},
    "qwen3": {"head_dim": 14},
}
TOKENS = torch.randint(0, 131, (23,), generator=torch.Generator().manual_seed(5))
needs_native = pytest.mark.skipif(
    native_library() is None, reason="needs the native kernels (a C++ compiler, and EXEUNT_NATIVE not 0)"
)


def checkpoint_of(family: str, folder: Path, dtype: torch.dtype = torch.float32) -> Checkpoint:
    return open_checkpoint(save(build_model(family, dtype, **FAMILIES[family]), folder))


def decoders(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> tuple[Decoder, Decoder]:
    """The same model, resident and streamed."""
    spec = checkpoint.spec
    resident = Decoder.from_weights(spec, checkpoint.weights(), dtype=dtype)
    return resident, Decoder.from_weights(spec, checkpoint.weights(), dtype=dtype, streamed=True)


def stream_of(decoder: Decoder) -> StreamedBlocks:
    assert isinstance(decoder._blocks, StreamedBlocks)
    return decoder._blocks


def linear_map(decoder: Decoder, index: int) -> LinearBlock:
    hidden, seed = decoder.spec.hidden_size, torch.Generator().manual_seed(7)
    down, up = torch.randn(3, hidden, generator=seed) / 7, torch.randn(hidden, 3, generator=seed)
    return LinearBlock(index, *(t.to(decoder.dtype) for t in (down, up, torch.ones(hidden))))


def assert_alike(one: Decoder, other: Decoder, format: KVFormat) -> None:
    """The same logits and the same pages, of a pass in two parts and of keys and values projected in between."""
    blocks = one.spec.blocks
    logits, pages = [], []
    for decoder in (one, other):
        sequence = Sequences(decoder, max_tokens=40, format=format)
        batch = sequence.batch([range(len(TOKENS))])
        hidden = decoder.embed(TOKENS, batch.positions)
        early = decoder.run_blocks(hidden, batch, sequence.pages, 0, 1)
        decoder.project_kv(early, batch, sequence.pages, 1, blocks)
        projected = _written(sequence, batch.slots)
        late = decoder.run_blocks(early, batch, sequence.pages, 1, blocks)
        logits.append(decoder.head(late))
        pages.append([*projected, *_written(sequence, batch.slots)])
    assert torch.isfinite(logits[0]).all()
    assert torch.equal(*logits)
    assert all(torch.equal(*each) for each in zip(*pages, strict=True))
    assert one.block_calls.calls == other.block_calls.calls == [1] * blocks


def _written(sequence: Sequences, slots: Tensor) -> list[Tensor]:
    return [
        written(tensor, slots).clone()
        for block in sequence.pages.layout.blocks
        for tensor in kv_tensors(sequence, block)
    ]


@needs_native
@pytest.mark.parametrize("replaced", [None, 2])
@pytest.mark.parametrize("format", ["full", "int4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_streaming_changes_no_bit(
    family: str, format: KVFormat, replaced: int | None, tmp_path: Path
) -> None:
    resident, streamed = decoders(checkpoint_of(family, tmp_path))
    if replaced is not None:
        resident, streamed = (
            each.with_linear_block(linear_map(each, replaced)) for each in (resident, streamed)
        )
    assert_alike(resident, streamed, format)


@needs_native
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_streaming_changes_no_bit_in_sixteen(family: str, tmp_path: Path) -> None:
    checkpoint = checkpoint_of(family, tmp_path, torch.bfloat16)
    assert_alike(*decoders(checkpoint, torch.bfloat16), "full")
    assert_alike(*decoders(checkpoint, torch.float32), "full")


@pytest.mark.parametrize("family", FAMILIES)
def test_without_the_native_kernels_states_are_the_same_bits(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exeunt.compression.resident_blocks, "native_blocks", lambda *_: None)
    states, keys = [], []
    for decoder in decoders(checkpoint_of(family, tmp_path)):
        sequence = Sequences(decoder)
        states.append(sequence.run(TOKENS, 0))
        batch = sequence.batch([range(len(TOKENS))])
        decoder.project_kv(states[0], batch, sequence.pages, 1, decoder.spec.blocks)
        keys.append(torch.stack(_written(sequence, batch.slots)))
    assert torch.equal(*states)
    torch.testing.assert_close(*keys, atol=1e-5, rtol=1e-5)  # one stacked product, or one for each block


class _Counted:
    """A source that counts the blocks read from it, and fails at one of them where asked to."""

    def __init__(self, source: WeightSource) -> None:
        self.source = source
        self.read: list[int] = []
        self.fails: int | None = None

    def shared(self) -> Mapping[str, Tensor]:
        return self.source.shared()

    def block(self, index: int) -> Mapping[str, Tensor]:
        self.read.append(index)
        if index == self.fails:
            raise WeightError(f"block {index} cannot be read")
        return self.source.block(index)


@pytest.fixture
def alive(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """After every block that is read, how many of those read are still in memory."""
    read: list[weakref.ref[Tensor]] = []
    counts: list[int] = []
    real = read_block

    def watched(*args: Any, **options: Any) -> Block:
        counts.append(sum(reference() is not None for reference in read))
        block = real(*args, **options)
        read.append(weakref.ref(block.down.weight))  # type: ignore[attr-defined]
        return block

    monkeypatch.setattr(exeunt.compression.streamed_blocks, "read_block", watched)
    gc.disable()  # what waits for the collector is memory too
    yield counts
    gc.enable()


def test_no_block_is_alive_when_the_next_is_read(alive: list[int], tmp_path: Path) -> None:
    checkpoint = checkpoint_of("llama", tmp_path)
    source = _Counted(checkpoint.weights())
    streamed = Decoder.from_weights(checkpoint.spec, source, dtype=torch.float32, streamed=True)
    source.read.clear()  # those of norms and biases
    replaced = streamed.with_linear_block(linear_map(streamed, 1))
    for decoder in (streamed, replaced):
        sequence = Sequences(decoder)
        hidden = sequence.run(TOKENS, 0)
        batch = sequence.batch([range(len(TOKENS))])
        decoder.project_kv(hidden, batch, sequence.pages, 2, 4)
    assert source.read == [0, 1, 2, 3, 2, 3, 0, 2, 3, 2, 3]
    assert alive == [0] * len(source.read)


def test_a_block_that_is_asked_for_again_is_not_read_again(tmp_path: Path) -> None:
    checkpoint = checkpoint_of("llama", tmp_path)
    source = _Counted(checkpoint.weights())
    streamed = Decoder.from_weights(checkpoint.spec, source, dtype=torch.float32, streamed=True)
    source.read.clear()
    sequence = Sequences(streamed)
    batch = sequence.batch([range(len(TOKENS))])
    hidden = streamed.embed(TOKENS, batch.positions)
    for block in range(4):
        for _ in range(3):
            after = streamed.run_blocks(hidden, batch, sequence.pages, block, block + 1)
        hidden = after
    assert source.read == [0, 1, 2, 3]


def test_a_block_that_cannot_be_read_leaves_none_behind(alive: list[int], tmp_path: Path) -> None:
    checkpoint = checkpoint_of("llama", tmp_path)
    resident, _ = decoders(checkpoint)
    source = _Counted(checkpoint.weights())
    streamed = Decoder.from_weights(checkpoint.spec, source, dtype=torch.float32, streamed=True)
    source.fails = 2
    with pytest.raises(WeightError, match="block 2 cannot be read"):
        Sequences(streamed).run(TOKENS, 0)
    assert stream_of(streamed).held.block is None
    assert streamed.resident_bytes()["full"] == streamed.output.nbytes
    source.fails = None
    assert torch.equal(Sequences(streamed).run(TOKENS, 0), Sequences(resident).run(TOKENS, 0))
    assert set(alive) == {0}


def test_what_it_holds_is_one_block(tmp_path: Path) -> None:
    resident, streamed = decoders(checkpoint_of("llama", tmp_path))
    all_held, before = resident.resident_bytes(), streamed.resident_bytes()
    blocks = all_held["full"] - resident.output.nbytes
    assert before == {**all_held, "full": resident.output.nbytes}
    Sequences(streamed).run(TOKENS, 0)
    assert streamed.resident_bytes()["full"] == streamed.output.nbytes + blocks // 4


class _Int4:
    """A checkpoint's linears in INT4, and nothing else."""

    group_size = 16

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    def shared(self) -> Mapping[str, Tensor]:
        return {}

    def block(self, index: int) -> Mapping[str, Tensor]:
        full = self._checkpoint.weights().block(index)
        packed = {
            (index, name): quantize(full[f"{name}.weight"], self.group_size)
            for name in linear_names(self._checkpoint.spec)
        }
        prefix = f"blocks.{index}."
        return {name.removeprefix(prefix): tensor for name, tensor in int4_tensors(packed).items()}


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
def test_an_int4_twin_takes_norms_and_embedding_from_it_and_reads_no_block(
    family: str, tmp_path: Path
) -> None:
    checkpoint = checkpoint_of(family, tmp_path)
    spec, int4 = checkpoint.spec, _Int4(checkpoint)
    source = _Counted(checkpoint.weights())
    streamed = Decoder.from_weights(spec, source, dtype=torch.float32, streamed=True)
    source.read.clear()
    twins = [
        Decoder.from_weights(spec, int4, dtype=torch.float32, int4_group_size=16, share_with=full)
        for full in (streamed, decoders(checkpoint)[0])
    ]
    assert source.read == []
    assert twins[0]._embedding is streamed._embedding
    assert twins[0].output is streamed.output
    for index in range(spec.blocks):
        own, shared = twins[0]._blocks.frame(index), stream_of(streamed).frame(index)
        assert all(one is other for one, other in zip(_tensors(own), _tensors(shared), strict=True))
    assert torch.equal(*(Sequences(twin).run(TOKENS, 0) for twin in twins))


def _tensors(frame: BlockFrame) -> list[Tensor | None]:
    norms = (frame.attention_norm, frame.mlp_norm)
    return [*(t for norm in norms for t in (norm.weight, norm.bias)), frame.head_norm, *frame.biases.values()]


def test_blocks_that_there_are_not_are_refused_before_any_is_read(tmp_path: Path) -> None:
    _, streamed = decoders(checkpoint_of("llama", tmp_path))
    sequence = Sequences(streamed)
    batch = sequence.batch([range(3)])
    hidden = streamed.embed(torch.arange(3), batch.positions)
    for call in (streamed.run_blocks, streamed.project_kv):
        for start, stop in ((0, 5), (-1, 1)):
            with pytest.raises(ValueError, match="the decoder has 0 to 3"):
                call(hidden, batch, sequence.pages, start, stop)
    assert stream_of(streamed).held.block is None
    with pytest.raises(ValueError, match="There is no block 4"):
        streamed.with_linear_block(linear_map(streamed, 4))


def test_a_block_read_under_inference_mode_serves_outside_it(tmp_path: Path) -> None:
    _, streamed = decoders(checkpoint_of("llama", tmp_path))
    with torch.inference_mode():
        Sequences(streamed).run(TOKENS, 0)
    held = stream_of(streamed).held.block
    assert held is not None
    (block,) = held.blocks
    assert isinstance(block, Block)
    assert not any(linear.weight.is_inference() for linear in block.linears().values())  # type: ignore[attr-defined]
