"""Second moments of what a block's linears are given, against a plain model that shows its activations."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from exeunt.calibration.block_runner import BlockRunner
from exeunt.calibration.hessians import SecondMoments, recording
from exeunt.calibration.sequence_batch import batches
from exeunt.compression.block_weights import read_block, read_embedding
from exeunt.compression.checkpoint import open_checkpoint
from exeunt.compression.linear import Int4Linear
from exeunt.kernels.int4_linear import quantize

CPU = torch.device("cpu")


def some_rows() -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return [torch.randint(0, 256, (length,), generator=g) for length in (40, 17, 60)]


def test_moments_are_those_of_what_each_linear_is_given(checkpoint: Path) -> None:
    """Hooks in front of transformers' own layers see the same inputs."""
    opened = open_checkpoint(checkpoint)
    spec, weights, rows = opened.spec, opened.weights(), some_rows()
    expected = {name: torch.zeros(()) for name in ("qkv", "out", "gate_up", "down")}
    model = LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    layer = model.model.layers[1]
    theirs = {
        "qkv": layer.self_attn.q_proj,
        "out": layer.self_attn.o_proj,
        "gate_up": layer.mlp.gate_proj,
        "down": layer.mlp.down_proj,
    }
    for name, linear in theirs.items():

        def add(module: object, given: tuple[torch.Tensor], name: str = name) -> None:
            x = given[0][0]
            expected[name] = expected[name] + x.T @ x

        linear.register_forward_pre_hook(add)
    with torch.no_grad():
        for row in rows:
            model(row[None])
    runner = BlockRunner(spec, "full", CPU, torch.float32)
    embedding = read_embedding(spec, weights.shared(), CPU, torch.float32)
    first = read_block(spec, 0, weights.block(0), CPU, torch.float32)
    observed, moments = recording(read_block(spec, 1, weights.block(1), CPU, torch.float32))
    for batch in batches(rows, 64):
        states = runner.run(first, embedding.embed(batch.token_ids, batch.positions), batch)
        runner.run(observed, states, batch)
    assert list(moments) == list(expected)
    for name, found in moments.items():
        assert found.tokens == sum(map(len, rows))
        torch.testing.assert_close(
            found.sum, expected[name], rtol=1e-3, atol=1e-3 * float(expected[name].max())
        )


def test_a_recording_block_gives_the_block_s_states(checkpoint: Path) -> None:
    opened = open_checkpoint(checkpoint)
    spec, weights = opened.spec, opened.weights()
    runner = BlockRunner(spec, "int4", CPU, torch.float32)
    block = read_block(spec, 2, weights.block(2), CPU, torch.float32)
    batch = next(batches(some_rows(), 500))
    states = torch.randn(batch.tokens, spec.hidden_size, generator=torch.Generator().manual_seed(2))
    kept = states.clone()
    observed, _ = recording(block)
    torch.testing.assert_close(runner.run(observed, states, batch), runner.run(block, states, batch))
    assert torch.equal(states, kept)


def test_an_int4_block_is_not_recorded(checkpoint: Path) -> None:
    opened = open_checkpoint(checkpoint)
    block = read_block(opened.spec, 0, opened.weights().block(0), CPU, torch.float32)
    packed = block.with_linears({"out": Int4Linear(quantize(torch.randn(32, 32), 32))})
    with pytest.raises(TypeError, match="out"):
        recording(packed)


def test_moments_of_16_bit_inputs_are_summed_in_float32() -> None:
    x = torch.full((3000, 4), 1.0, dtype=torch.bfloat16)
    moments = SecondMoments(4)
    for _ in range(3):
        moments.add(x)
    assert moments.sum.dtype == torch.float32
    assert bool((moments.sum == 9000).all())
