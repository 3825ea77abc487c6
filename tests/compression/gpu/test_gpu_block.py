"""Blocks in fused Triton kernels: against the same one operation at a time, and against themselves in company."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import exeunt.kernels.gpu
from exeunt.compression.decode_graphs import DecodeGraphs, Inputs
from exeunt.compression.decoder import Decoder
from exeunt.compression.linear import FullLinear, Int4Linear, Linear
from exeunt.compression.linear_block import LinearBlock
from exeunt.compression.variant import KVFormat
from exeunt.kernels.int4_linear import quantize
from tests.compression.decoder_twin import block_linears, twin
from tests.compression.paged_generation import Sequences
from tests.compression.reference_models import build_model, save
from tests.kernels.triton.on_gpu import HERE, on_gpu_only

# Triton's interpreter computes what a kernel then masks, and NumPy warns of it.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

# Sizes and pieces that take different ways through the kernels.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {"n_layer": 2}),  # layer norm, biases, learned positions, GELU's tanh form, no gate
    "llama": ("llama", {"num_hidden_layers": 2}),
    "mistral": ("mistral", {"num_hidden_layers": 2, "sliding_window": 6}),
    "qwen2": ("qwen2", {"num_hidden_layers": 2}),
    "qwen3": ("qwen3", {"num_hidden_layers": 2, "head_dim": 14}),  # head norms
}
FORMATS: tuple[tuple[str, KVFormat], ...] = (("full", "full"), ("int4", "int4"))
OWN = {
    "llama": FORMATS[0],
    "qwen2": FORMATS[0],
    "qwen3": FORMATS[1],
}  # where the interpreter runs one of them
LENGTH = 19 if HERE else 9  # more than the sliding window's
TEXT = torch.randint(0, 105, (2, LENGTH), generator=torch.Generator().manual_seed(5))


def _decoder(
    name: str,
    directory: Path,
    device: torch.device,
    dtype: torch.dtype,
    weights: str,
    linear_block: bool = False,
    **more: Any,
) -> Decoder:
    family, changes = MODELS[name]
    model = build_model(family, dtype, **changes | more)
    decoder = Decoder.load(save(model, directory), device=device, dtype=dtype)
    if weights == "int4":
        linears: dict[int, dict[str, Linear]] = {block: {} for block in range(decoder.spec.blocks)}
        for block, packed in linears.items():
            for part, linear in block_linears(decoder, block).items():
                assert isinstance(linear, FullLinear)
                packed[part] = Int4Linear(quantize(linear.weight, 16), linear.bias)
        decoder = twin(decoder, linears)
    if linear_block:
        hidden, generator = decoder.spec.hidden_size, torch.Generator().manual_seed(2)
        parts = (torch.randn(3, hidden, generator=generator) / 7, torch.randn(hidden, 3, generator=generator))
        replacement = LinearBlock(1, *parts, torch.ones(hidden))
        decoder = decoder.with_linear_block(replacement.to(device, dtype))
    return decoder


def _states(decoder: Decoder, kv: KVFormat, rows: list[Tensor], chunks: list[int]) -> Tensor:
    """The states behind the last block, [rows × tokens, hidden], of texts that come in chunks, all rows together."""
    sequences = Sequences(decoder, rows=len(rows), max_tokens=max(map(len, rows)) + 1, format=kv)
    found: list[list[Tensor]] = [[] for _ in rows]
    start = 0
    with torch.inference_mode():
        for size in chunks:
            spans = [range(start, min(start + size, len(row))) for row in rows]
            batch = sequences.batch(spans)
            ids = torch.cat([row[span.start : span.stop] for row, span in zip(rows, spans, strict=True)])
            hidden = decoder.embed(ids.to(decoder.device), batch.positions)
            out = decoder.run_blocks(hidden, batch, sequences.pages, 0, decoder.spec.blocks)
            for place, part in enumerate(out.split([len(span) for span in spans])):
                found[place].append(part)
            start += size
    return torch.cat([torch.cat(parts) for parts in found])


@pytest.mark.parametrize(
    ("name", "weights", "kv"),
    [
        (name, *formats)
        if name in ("gpt2", "mistral") or formats == OWN[name]
        else on_gpu_only(name, *formats)
        for name in MODELS
        for formats in FORMATS
    ],
)
def test_fused_blocks_do_what_the_single_operations_do(
    name: str,
    weights: str,
    kv: KVFormat,
    device: torch.device,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chunks = [7, 1, LENGTH - 8]
    fused = _states(_decoder(name, tmp_path, device, torch.float32, weights, True), kv, [*TEXT], chunks)
    monkeypatch.setattr(exeunt.kernels.gpu, "interpreted", False)
    plain = _decoder(name, tmp_path, torch.device("cpu"), torch.float32, weights, True)
    wanted = _states(plain, kv, [*TEXT], chunks)
    error = (fused.cpu() - wanted).norm() / wanted.norm()
    # with INT4 keys and values a rounding the other way moves a code by one
    assert error < (2e-5 if kv == "full" else 2e-2)


@pytest.mark.parametrize(("weights", "kv"), FORMATS)
def test_a_state_does_not_depend_on_company_or_chunks(
    weights: str, kv: KVFormat, device: torch.device, tmp_path: Path
) -> None:
    decoder = _decoder("mistral", tmp_path, device, torch.bfloat16, weights)
    together = _states(decoder, kv, [*TEXT], [LENGTH])
    rows = TEXT if HERE else TEXT[1:]
    alone = torch.cat([_states(decoder, kv, [row], [5, 1, 1, LENGTH - 7]) for row in rows])
    assert torch.equal(together[-len(alone) :], alone)


@pytest.mark.parametrize(("weights", "kv"), FORMATS)
def test_padding_changes_no_state_and_writes_nothing(
    weights: str, kv: KVFormat, device: torch.device, tmp_path: Path
) -> None:
    decoder = _decoder("llama", tmp_path, device, torch.bfloat16, weights)
    rows = [*TEXT]
    sequences = Sequences(decoder, rows=2, max_tokens=20, format=kv)
    other = Sequences(decoder, rows=2, max_tokens=20, format=kv)
    spans = [range(3), range(2)]
    batch = sequences.batch(spans)
    ids = torch.cat([row[span.start : span.stop] for row, span in zip(rows, spans, strict=True)]).to(device)
    with torch.inference_mode():
        hidden = decoder.embed(ids, batch.positions)
        plain = decoder.run_blocks(hidden, batch, sequences.pages, 0, 2)
        inputs = Inputs.empty(8, 512, other.pages.layout.page_tokens, hidden)
        inputs.fill(torch.full((7, hidden.shape[1]), torch.nan).to(hidden), other.batch([range(7), range(0)]))
        inputs.fill(hidden, batch)
        padded = decoder.run_blocks(inputs.hidden, inputs.batch, other.pages, 0, 2)
    assert torch.equal(padded[:5], plain)
    assert torch.equal(other.pages.arena, sequences.pages.arena)


@pytest.mark.parametrize(
    ("name", "weights", "kv"),
    [
        ("qwen3", "int4", "int4"),
        ("gpt2", "full", "full"),
        *(on_gpu_only(name, *formats) for name in MODELS for formats in FORMATS),
    ],
)
def test_projected_keys_and_values_are_those_that_the_block_writes(
    name: str, weights: str, kv: KVFormat, device: torch.device, tmp_path: Path
) -> None:
    decoder = _decoder(name, tmp_path, device, torch.bfloat16, weights)
    ran, projected = (Sequences(decoder, rows=2, max_tokens=20, format=kv) for _ in range(2))
    spans = [range(3), range(2)]
    batch = ran.batch(spans)
    hidden = torch.randn(5, decoder.spec.hidden_size, generator=torch.Generator().manual_seed(6))
    hidden = hidden.to(device, torch.bfloat16)
    with torch.inference_mode():
        decoder.run_blocks(hidden, batch, ran.pages, 1, 2)
        inputs = Inputs.empty(8, 512, projected.pages.layout.page_tokens, hidden)
        inputs.fill_places(hidden, batch)
        decoder.project_kv(inputs.hidden, inputs.batch, projected.pages, 1, 2)  # with three tokens of padding
    assert torch.equal(projected.pages.arena, ran.pages.arena)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("weights", "kv"), FORMATS)
def test_captured_passes_give_the_states_of_others_to_the_bit(
    weights: str, kv: KVFormat, device: torch.device, tmp_path: Path
) -> None:
    decoder = _decoder("llama", tmp_path, device, torch.bfloat16, weights)
    chunks = [3, 1, 1, 2, 1, 1, 10]
    plain = _states(decoder, kv, [*TEXT], chunks)
    graphs = decoder.capture(64)
    assert isinstance(graphs, DecodeGraphs)
    captured = _states(decoder, kv, [*TEXT], chunks)
    assert torch.equal(captured, plain)
    assert graphs.count >= 3
    assert graphs.pool.nbytes > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("weights", "kv"), FORMATS)
def test_captured_projections_write_the_bits_of_others(
    weights: str, kv: KVFormat, device: torch.device, tmp_path: Path
) -> None:
    decoder = _decoder("llama", tmp_path, device, torch.bfloat16, weights)
    plain, captured = (Sequences(decoder, rows=2, max_tokens=20, format=kv) for _ in range(2))
    hidden = torch.randn(12, decoder.spec.hidden_size, device=device).bfloat16()
    spans = [[range(3), range(2)], [range(3, 4), range(2, 3)], [range(4, 10), range(3, 9)]]

    def project(sequences: Sequences) -> None:
        for batch in map(sequences.batch, spans):
            decoder.project_kv(hidden[: batch.tokens], batch, sequences.pages, 0, 2)

    with torch.inference_mode():
        project(plain)
        graphs = decoder.capture(64)
        assert isinstance(graphs, DecodeGraphs)
        project(captured)
    assert graphs.count == 3
    assert torch.equal(captured.pages.arena, plain.pages.arena)
