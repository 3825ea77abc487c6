"""What each choice about rounding weights to INT4 costs, `python -m scripts.compare_rounding MODEL TEXT`, minutes.

By setting of GPTQ: perplexity over full weights and KV, and KL from them, with INT4 and full KV, on the select split,
which no setting was fitted on and no certificate is made of; and how exits behind some blocks would read the output
matrix, the model's own final norm in front of it. KL is what settings are told apart by: perplexity is that of one text
and its sampling noise hides them.
"""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from exeunt.calibration.activations import Scratch
from exeunt.calibration.block_runner import BlockRunner
from exeunt.calibration.corpus import Splits, read_corpus, split_corpus
from exeunt.calibration.gptq import Gptq
from exeunt.calibration.hessians import recording
from exeunt.calibration.journal import NoJournal
from exeunt.calibration.sequence_batch import batches
from exeunt.calibration.streaming_pass import spread_rows, stream_model
from exeunt.calibration.teacher_forcing import ForcedModel
from exeunt.calibration.text_encoding import separator, text_encoding
from exeunt.calibration.token_losses import nll_of
from exeunt.calibration.weights_int4 import Int4Plan, Int4Weights, QuantisedLinear, quantize_linear
from exeunt.compression.block_weights import read_block, read_embedding
from exeunt.compression.checkpoint import Checkpoint, open_checkpoint
from exeunt.compression.checkpoint_names import linear_names
from exeunt.compression.decoder import Decoder
from exeunt.compression.linear import Int4Linear, Linear
from exeunt.compression.tokenizer import load_tokenizer
from exeunt.compression.variant import KVFormat

CPU = torch.device("cpu")
FORMATS: tuple[KVFormat, ...] = ("int4", "full")
SETTINGS: Mapping[str, Int4Plan] = {
    "round to nearest": Int4Plan(rounding="nearest"),
    "GPTQ, 8,000 tokens, damping 0.01, by groups": Int4Plan(),
    "inputs in their own order": Int4Plan(gptq=Gptq(order="natural")),
    "inputs by size across groups": Int4Plan(gptq=Gptq(order="inputs")),
    "damping 0.001": Int4Plan(gptq=Gptq(damping=0.001)),
    "damping 0.1": Int4Plan(gptq=Gptq(damping=0.1)),
    "2,000 tokens": Int4Plan(hessian_tokens=2_000),
    "all tokens of the fit split": Int4Plan(hessian_tokens=1 << 40),
}


@dataclass(frozen=True, slots=True)
class _Text:
    checkpoint: Checkpoint
    splits: Splits
    batch_tokens: int


def main(
    model: Annotated[str, typer.Argument(help="A checkpoint.")],
    text: Annotated[str, typer.Argument(help="What `exeunt calibrate --data` takes.")],
    tokens: int = 48_000,
    seed: int = 0,
) -> None:
    """Print a line for every setting."""
    checkpoint = open_checkpoint(model)
    spec, tokenizer = checkpoint.spec, load_tokenizer(checkpoint.directory)
    splits = split_corpus(
        read_corpus(text, separator(tokenizer)),
        text_encoding(tokenizer, spec),
        tokens=tokens,
        row_tokens=min(512, spec.max_position_embeddings),
        seed=seed,
    )
    task = _Text(checkpoint, splits, 4096)
    full = Decoder.from_weights(spec, checkpoint.weights(), dtype=torch.float32)
    blocks = sorted({max(1, round(share * spec.blocks)) for share in (0.25, 0.5, 0.75)})
    exits = "".join(f" exit {block - 1} KL, agreement |" for block in blocks)
    typer.echo(f"| setting | INT4 KV: perplexity, KL | full KV: perplexity, KL |{exits}")
    typer.echo(f"| --- | ---: | ---: |{' ---: |' * len(blocks)}")
    rounded: dict[str, Callable[[], Int4Weights]] = {
        name: partial(_streamed, task, plan) for name, plan in SETTINGS.items()
    }
    rounded["a block's layers one after another"] = partial(_one_after_another, task, Int4Plan())
    for name, make in rounded.items():
        int4 = make()
        decoder = Decoder.from_weights(
            spec, int4, dtype=torch.float32, int4_group_size=int4.group_size, share_with=full
        )
        cells = [_cost(task, full, decoder, kv_cache) for kv_cache in FORMATS]
        cells += [_exit_reading(task, full, decoder, block) for block in blocks]
        typer.echo(f"| {name} | {' | '.join(cells)} |")


def _streamed(task: _Text, plan: Int4Plan) -> Int4Weights:
    """As calibration rounds."""
    runner = BlockRunner(task.checkpoint.spec, "int4", CPU, torch.float32)
    fit, weights = task.splits.fit, task.checkpoint.weights()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Scratch(Path(folder))
        passed = stream_model(
            weights, runner, fit, len(fit), plan, [], scratch, NoJournal(), batch_tokens=task.batch_tokens
        )
    if passed.int4 is None:
        raise TypeError("a plan gives INT4 weights")
    return passed.int4


@torch.inference_mode()
def _one_after_another(task: _Text, plan: Int4Plan) -> Int4Weights:
    """Each layer of a block rounded for what the rounded layers in front of it give: a run of the block for each."""
    spec, weights = task.checkpoint.spec, task.checkpoint.weights()
    runner = BlockRunner(spec, "int4", CPU, torch.float32)
    embedding = read_embedding(spec, weights.shared(), CPU, torch.float32)
    rows = [task.splits.fit[each] for each in spread_rows(task.splits.fit, plan.hessian_tokens)]
    groups = list(batches(rows, task.batch_tokens))
    states = [embedding.embed(group.token_ids, group.positions) for group in groups]
    layers: dict[tuple[int, str], QuantisedLinear] = {}
    for index in range(spec.blocks):
        full = read_block(spec, index, weights.block(index), CPU, torch.float32)
        rounded: dict[str, Linear] = {}
        for name in linear_names(spec):
            observed, moments = recording(full)
            for group, own in zip(groups, states, strict=True):
                runner.run(observed.with_linears(rounded), own, group)
            weight = weights.block(index)[f"{name}.weight"]
            layers[index, name] = quantize_linear(weight, plan, moments[name].sum, CPU, name)
            rounded[name] = Int4Linear(layers[index, name].weight, full.linears()[name].bias)
        block = full.with_linears(rounded)
        states = [runner.run(block, own, group) for group, own in zip(groups, states, strict=True)]
    final = torch.cat([embedding.final_norm(own) for own in states])
    matrix = weights.shared()["embedding.tokens" if spec.tied else "output.weight"]
    output = quantize_linear(matrix, plan, final.T @ final, CPU, "output")
    return Int4Weights(
        {key: layer.weight for key, layer in layers.items()},
        output.weight,
        plan.group_size,
        {key: layer.relative_error for key, layer in layers.items()},
    )


@torch.inference_mode()
def _cost(task: _Text, full: Decoder, decoder: Decoder, kv_cache: KVFormat) -> str:
    reference, model = ForcedModel(full, "full", ()), ForcedModel(decoder, kv_cache, ())
    losses, divergence, scored, tokens = torch.zeros(2, dtype=torch.float64), 0.0, 0, 0
    for batch in batches(task.splits.select, 2048):
        wanted = full.head(reference.full_depth(batch)[1])
        found = decoder.head(model.full_depth(batch)[1])
        losses += torch.stack([nll_of(each, batch.targets).double().sum() for each in (wanted, found)])
        divergence += _divergence(wanted, found)
        scored += int((batch.targets >= 0).sum())
        tokens += batch.tokens
    before, after = (losses / scored).exp().tolist()
    return f"{after - before:+.2f}, {divergence / tokens:.5f}"


@torch.inference_mode()
def _exit_reading(task: _Text, full: Decoder, decoder: Decoder, depth: int) -> str:
    """What the INT4 output matrix makes of early states, against the full one."""
    model, divergence, agreed, tokens = ForcedModel(decoder, "int4", ()), 0.0, 0, 0
    for batch in batches(task.splits.select, 2048):
        geometry = batch.geometry(model.layout.page_tokens)
        hidden = decoder.embed(batch.token_ids, batch.positions)
        hidden = decoder.final_norm(decoder.run_blocks(hidden, geometry, model.pages(batch), 0, depth))
        wanted, found = full.project(hidden), decoder.project(hidden)
        divergence += _divergence(wanted, found)
        agreed += int((wanted.argmax(-1) == found.argmax(-1)).sum())
        tokens += batch.tokens
    return f"{divergence / tokens:.5f}, {agreed / tokens:.1%}"


def _divergence(wanted: Tensor, found: Tensor) -> float:
    """Summed KL(wanted ‖ found) of logits [T, V], in nats."""
    log_probs = wanted.log_softmax(-1)
    return float((log_probs.exp() * (log_probs - found.log_softmax(-1))).sum(dtype=torch.float64))


if __name__ == "__main__":
    typer.run(main)
