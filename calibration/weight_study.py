"""How weights are rounded, compared at equal bits: INT4 to nearest, INT4 by GPTQ, and NF4 levels.

Nothing but the rounding of weights is compared: every form runs as full-precision products with the weights that it
gives, full keys and values, and activations as they are (the INT4 kernel of a CPU rounds those too). Output errors are
on the study's text, not on that which GPTQ saw. Streaming: one block is in memory in full precision and in one form at
a time, and every form's states pass it together.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

import numpy as np
import torch
from torch import Tensor

from exeunt.calibration.block_runner import BlockRunner
from exeunt.calibration.bootstrap import Floats, Measure, block_difference, block_ratio, resamples
from exeunt.calibration.gptq import relative_loss
from exeunt.calibration.hessians import SecondMoments, recording
from exeunt.calibration.nf4 import nf4
from exeunt.calibration.scored_text import ScoredBatch, ScoredText
from exeunt.calibration.sequence_batch import first_rows
from exeunt.calibration.teacher_forcing import logit_rows
from exeunt.calibration.weights_int4 import Int4Weights
from exeunt.compression.block import Block
from exeunt.compression.block_weights import read_block, read_embedding
from exeunt.compression.checkpoint_names import linear_names
from exeunt.compression.embedding import Embedding
from exeunt.compression.linear import FullLinear, Linear
from exeunt.compression.weights import WeightSource
from exeunt.kernels.int4_linear import dequantize, quantize

STUDY_TOKENS: Final = 4_000
OUTPUT: Final = "output"
FormName = Literal["nearest", "gptq", "nf4"]

Advance = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class WeightForm:
    """One way of rounding all of a model's linears and its output matrix.

    `weight_error` |W - Ŵ|² / |W|² and `output_error` |X (W - Ŵ)ᵀ|² / |X Wᵀ|² are by kind of layer, means over the
    blocks, "output" the output matrix; X are the full-precision model's own inputs on the study's text. `increase` is
    in perplexity and `kl` in nats per token, over full weights. `bits` are per weight, scales and offsets counted.
    """

    name: FormName
    bits: float
    weight_error: Mapping[str, float]
    output_error: Mapping[str, float]
    perplexity: Measure
    increase: Measure
    kl: Measure


@dataclass(frozen=True, slots=True)
class WeightStudy:
    """The forms on one text of `tokens` tokens; intervals draw `text_blocks`. `perplexity` is that of full weights."""

    tokens: int
    text_blocks: int
    group_size: int
    perplexity: Measure
    forms: tuple[WeightForm, ...]

    def form(self, name: FormName) -> WeightForm | None:
        """The form called `name`, None where it was not compared."""
        return next((form for form in self.forms if form.name == name), None)

    def as_json(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return asdict(self)


def study_work(int4: Int4Weights, rows: Sequence[Tensor], blocks: int, tokens: int = STUDY_TOKENS) -> int:
    """What `advance` of `study_weights` is told in all."""
    return (blocks + 1) * (1 + len(_names(int4))) * sum(map(len, first_rows(rows, tokens)))


def study_weights(
    weights: WeightSource,
    runner: BlockRunner,
    int4: Int4Weights,
    rows: Sequence[Tensor],
    *,
    documents: Sequence[int] | None = None,
    tokens: int = STUDY_TOKENS,
    batch_tokens: int,
    seed: int,
    advance: Advance = lambda _tokens: None,
) -> WeightStudy:
    """The forms on the first of `rows` (each [n] int64) up to `tokens` tokens, GPTQ's being `int4` where it made that.

    `runner` has full keys and values. `documents` numbers each row's document, for the intervals (see `text_units`).
    `advance` is told a batch's tokens for every block, the head and every form: `study_work` in all. Raises
    ValueError where a weight cannot be held in INT4, and WeightError.
    """
    used = first_rows(rows, tokens)
    text = ScoredText.of_rows(used, None if documents is None else documents[: len(used)])
    return _Study(weights, runner, int4, text, batch_tokens, seed, advance).run()


def _names(int4: Int4Weights) -> tuple[FormName, ...]:
    return ("nearest", "gptq", "nf4") if int4.rounding == "gptq" else ("nearest", "nf4")


@dataclass(slots=True)
class _Losses:
    """Sums by block of text."""

    nll: Floats
    kl: Floats


class _Study:
    """The study under way. Form 0 is full weights, the others are in the order of `names`."""

    def __init__(
        self,
        weights: WeightSource,
        runner: BlockRunner,
        int4: Int4Weights,
        text: ScoredText,
        batch_tokens: int,
        seed: int,
        advance: Advance,
    ) -> None:
        self._weights, self._runner, self._int4, self._text = weights, runner, int4, text
        self._seed, self._advance = seed, advance
        self._names = _names(int4)
        self._groups = list(text.batches(batch_tokens, runner.device))
        self._weight_error: dict[tuple[FormName, str], list[float]] = {}
        self._output_error: dict[tuple[FormName, str], list[float]] = {}

    def run(self) -> WeightStudy:
        """Every block in turn, then the head."""
        runner = self._runner
        embedding = read_embedding(runner.spec, self._weights.shared(), runner.device, runner.dtype)
        states = [
            [embedding.embed(group.batch.token_ids, group.batch.positions)] * (1 + len(self._names))
            for group in self._groups
        ]
        for index in range(runner.spec.blocks):
            self._pass(index, states)
        return self._found(self._losses(states, embedding))

    def _pass(self, index: int, states: list[list[Tensor]]) -> None:
        """All states through block `index`, each in its form."""
        runner = self._runner
        full = read_block(runner.spec, index, self._weights.block(index), runner.device, runner.dtype)
        observed, moments = recording(full)
        self._run(observed, 0, states)
        for number, name in enumerate(self._names, 1):
            linears: dict[str, Linear] = {}
            for kind in linear_names(runner.spec):
                linear = full.linears()[kind]
                if not isinstance(linear, FullLinear):
                    raise TypeError(f"{kind} of block {index} is not in full precision")
                restored = self._restored(name, linear.weight, index, kind)
                self._compare(name, kind, linear.weight, restored, moments[kind])
                linears[kind] = FullLinear(restored.to(runner.dtype), linear.bias)
            self._run(full.with_linears(linears), number, states)

    def _run(self, block: Block, form: int, states: list[list[Tensor]]) -> None:
        for group, own in zip(self._groups, states, strict=True):
            own[form] = self._runner.run(block, own[form], group.batch)
            self._advance(group.batch.tokens)

    def _restored(self, name: FormName, weight: Tensor, index: int, kind: str) -> Tensor:
        """A layer's weight [out, in] as the form gives it back, float32; block -1 is the output matrix."""
        size = self._int4.group_size
        if name == "nf4":
            return nf4(weight, size // 2)
        if name == "nearest":
            return dequantize(quantize(weight, size), torch.float32)
        packed = self._int4.output if kind == OUTPUT else self._int4.weights[index, kind]
        return dequantize(packed, torch.float32).to(weight.device)

    def _compare(
        self, name: FormName, kind: str, weight: Tensor, restored: Tensor, moments: SecondMoments
    ) -> None:
        missed, wanted = (restored - weight.float()).square().sum(), weight.float().square().sum()
        self._weight_error.setdefault((name, kind), []).append(float(missed / wanted.clamp(min=1e-30)))
        output_error = relative_loss(weight, restored, moments.sum)
        self._output_error.setdefault((name, kind), []).append(output_error)

    @torch.inference_mode()
    def _losses(self, states: list[list[Tensor]], embedding: Embedding) -> list[_Losses]:
        """Every form's losses; its output matrix is in memory beside the full one."""
        runner = self._runner
        shared = self._weights.shared()
        matrix = (
            embedding.tokens if runner.spec.tied else shared["output.weight"].to(runner.device, runner.dtype)
        )
        moments = SecondMoments(runner.spec.hidden_size, runner.device)
        for own in states:
            own[:] = [embedding.final_norm(state) for state in own]
            moments.add(own[0])
        found = []
        for form in range(1 + len(self._names)):
            projection = matrix
            if form > 0:
                name = self._names[form - 1]
                restored = self._restored(name, matrix, -1, OUTPUT)
                self._compare(name, OUTPUT, matrix, restored, moments)
                projection = restored.to(runner.dtype)
            found.append(self._form_losses(form, states, FullLinear(matrix), FullLinear(projection)))
        return found

    def _form_losses(
        self, form: int, states: list[list[Tensor]], full: FullLinear, projection: FullLinear
    ) -> _Losses:
        losses = _Losses(np.zeros(self._text.blocks), np.zeros(self._text.blocks))
        for group, own in zip(self._groups, states, strict=True):
            for part in self._parts(group):
                wanted = full(own[0][part]).float().log_softmax(-1)
                log_probs = wanted if form == 0 else projection(own[form][part]).float().log_softmax(-1)
                targets = group.batch.targets[part]
                nll = -log_probs.gather(1, targets.clamp(min=0)[:, None]).squeeze(1)
                self._add(losses.nll, group, part, nll.masked_fill(targets < 0, 0.0))
                self._add(losses.kl, group, part, (wanted.exp() * (wanted - log_probs)).sum(-1))
            self._advance(group.batch.tokens)
        return losses

    def _parts(self, group: ScoredBatch) -> Iterator[slice]:
        step = logit_rows(self._runner.spec.vocab_size, self._runner.device)
        for first in range(0, group.batch.tokens, step):
            yield slice(first, min(first + step, group.batch.tokens))

    def _add(self, sums: Floats, group: ScoredBatch, part: slice, values: Tensor) -> None:
        weights = values.double().cpu().numpy()
        sums += np.bincount(group.where[part], weights=weights, minlength=len(sums))

    def _found(self, losses: Sequence[_Losses]) -> WeightStudy:
        blocks = self._text.blocks
        scored, tokens = np.zeros(blocks), np.zeros(blocks)
        for group in self._groups:
            whole = slice(0, group.batch.tokens)
            self._add(scored, group, whole, (group.batch.targets >= 0).double())
            self._add(tokens, group, whole, torch.ones(group.batch.tokens))
        drawn = resamples(blocks, self._seed)
        full, size = losses[0], self._int4.group_size

        def form(name: FormName, own: _Losses) -> WeightForm:
            return WeightForm(
                name=name,
                bits=4 + 32 / size if name != "nf4" else 4 + 16 / (size // 2),
                weight_error=_means(self._weight_error, name),
                output_error=_means(self._output_error, name),
                perplexity=block_ratio(own.nll, scored, drawn, np.exp),
                increase=block_difference(own.nll, full.nll, scored, drawn, np.exp),
                kl=block_ratio(own.kl, tokens, drawn),
            )

        return WeightStudy(
            tokens=int(tokens.sum()),
            text_blocks=blocks,
            group_size=size,
            perplexity=block_ratio(full.nll, scored, drawn, np.exp),
            forms=tuple(form(name, own) for name, own in zip(self._names, losses[1:], strict=True)),
        )


def _means(errors: Mapping[tuple[FormName, str], Sequence[float]], name: FormName) -> dict[str, float]:
    return {kind: float(np.mean(found)) for (form, kind), found in errors.items() if form == name}
