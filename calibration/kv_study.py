"""What INT4 keys and values cost: perplexity and KL of each form, by part, by weights and by length of context.

Teacher-forced. Costs are over full keys and values under the same weights, so that they are the cache's alone; all
forms of one study share tokens and resamples. The joint cost of keys and values is the paper's acceptance test
("Quantization Dominates Rank Reduction", arXiv 2604.11501).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from exeunt.calibration.bootstrap import Floats, Measure, block_difference, block_ratio, resamples
from exeunt.calibration.kv_forms import DEPLOYED, FORMS, UNROTATED, KVForm
from exeunt.calibration.kv_forward import FULL_READING, KVPart, KVReading, states_behind
from exeunt.calibration.sequence_batch import SequenceBatch, batches
from exeunt.calibration.teacher_forcing import logit_rows
from exeunt.calibration.text_units import text_units
from exeunt.compression.decoder import Decoder
from exeunt.compression.variant import WeightFormat

KV_TOKENS: Final = 4_000
PARTS: Final[tuple[KVPart, ...]] = ("keys", "values", "both")
SHORTEST: Final = 16
"""Contexts up to so many tokens are one bucket; each one after it ends at twice the length."""

Advance = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class KVSubject:
    """Weights to study under: a decoder of them, and which parts are put into INT4, each with a pass of its own."""

    weights: WeightFormat
    decoder: Decoder
    parts: tuple[KVPart, ...] = PARTS
    forms: tuple[KVForm, ...] = FORMS

    @property
    def readings(self) -> tuple[KVReading, ...]:
        """Every form of every part, each arithmetic once: values are not rotated, which leaves them one form less."""
        return tuple(
            KVReading(form, part)
            for form in self.forms
            for part in self.parts
            if not (part == "values" and form is UNROTATED and DEPLOYED in self.forms)
        )


@dataclass(frozen=True, slots=True)
class ContextCost:
    """The cost where `first` to `last` tokens are attended to, the token's own among them; nats per token."""

    first: int
    last: int
    tokens: int
    increase: Measure


@dataclass(frozen=True, slots=True)
class KVCost:
    """One form of one part. `increase` is in perplexity and `kl` in nats per token, over full keys and values.

    `key_error` and `value_error` are |x − x̂|² / |x|² over all blocks, of keys and values as the full pass makes them
    (0 for a part that is kept). `bytes_per_token` is of all blocks, in the dtype that the model runs in for such a
    part.
    """

    form: str
    streams: bool
    part: KVPart
    perplexity: Measure
    increase: Measure
    kl: Measure
    key_error: float
    value_error: float
    bytes_per_token: float
    by_context: tuple[ContextCost, ...]


@dataclass(frozen=True, slots=True)
class KVDifference:
    """What the deployed form costs over the form `other`, keys and values together; below zero it costs less.

    `increase` is in perplexity and `kl`, the difference of both KLs to full keys and values, in nats per token. Both
    forms are read on the same resamples, so that the intervals are of the difference.
    """

    other: str
    increase: Measure
    kl: Measure


@dataclass(frozen=True, slots=True)
class KVWeightsCosts:
    """The costs under one form of the weights; `perplexity` and `bytes_per_token` are of full keys and values.

    `differences` hold the deployed form against each other one, where both were studied.
    """

    weights: WeightFormat
    perplexity: Measure
    bytes_per_token: float
    costs: tuple[KVCost, ...]
    differences: tuple[KVDifference, ...] = ()

    def over(self, form: KVForm) -> KVDifference | None:
        """The deployed form against `form`, None where that was not measured."""
        return next((each for each in self.differences if each.other == form.name), None)

    def cost(self, form: KVForm, part: KVPart) -> KVCost | None:
        """The cost of `form` in `part`, None where it was not measured."""
        return next((each for each in self.costs if (each.form, each.part) == (form.name, part)), None)


@dataclass(frozen=True, slots=True)
class KVStudy:
    """All costs, and the text behind them: `tokens` in rows of at most `row_tokens`; intervals draw `text_blocks`."""

    tokens: int
    row_tokens: int
    text_blocks: int
    subjects: tuple[KVWeightsCosts, ...]


@dataclass(slots=True)
class _Losses:
    """Per token of the text: −log probability of what follows (0 where nothing does), and KL to the first reading."""

    nll: Floats
    kl: Floats


@dataclass(slots=True)
class _Errors:
    """Squared error and squared size of keys and values through some forms."""

    forms: Sequence[KVForm]
    missed: Floats = field(init=False)  # [forms, 2]
    size: Floats = field(init=False)  # [2]

    def __post_init__(self) -> None:
        self.missed, self.size = np.zeros((len(self.forms), 2)), np.zeros(2)

    def look(self, keys: Tensor, values: Tensor) -> None:
        """Count one row's keys and values of one block."""
        self.size += [float(x.float().square().sum(dtype=torch.float64)) for x in (keys, values)]
        for number, form in enumerate(self.forms):
            pairs = ((form.keys(keys), keys), (form.values(values), values))
            self.missed[number] += [float((a - b).square().sum(dtype=torch.float64)) for a, b in pairs]

    def of(self, reading: KVReading) -> tuple[float, float]:
        """The relative errors of the keys and of the values of a reading."""
        relative = self.missed[self.forms.index(reading.form)] / np.maximum(self.size, 1e-300)
        keys, values = reading.part != "values", reading.part != "keys"
        return float(relative[0]) if keys else 0.0, float(relative[1]) if values else 0.0


def study_work(subjects: Sequence[KVSubject], rows: Sequence[Tensor], tokens: int = KV_TOKENS) -> int:
    """What `advance` of `study_kv` is told in all."""
    seen = sum(len(rows[place]) for place in longest_rows(rows, tokens))
    return seen * sum((each.decoder.spec.blocks + 1) * (1 + len(each.readings)) for each in subjects)


def study_kv(
    subjects: Sequence[KVSubject],
    rows: Sequence[Tensor],
    *,
    tokens: int = KV_TOKENS,
    batch_tokens: int,
    seed: int,
    documents: Sequence[int] | None = None,
    advance: Advance = lambda _units: None,
) -> KVStudy:
    """The costs of the forms under every subject's weights, on the longest of `rows` up to `tokens` tokens.

    `documents` numbers each row's document, for the intervals (see `text_units`).
    `advance` is told a batch's tokens for every block, the head and every pass: `study_work` in all.
    """
    places = longest_rows(rows, tokens)
    used = tuple(rows[place] for place in places)
    units = text_units(used, None if documents is None else [documents[place] for place in places])
    text = _Text(used, units.where, resamples(units.count, seed))
    found = tuple(_under(subject, text, batch_tokens, advance) for subject in subjects)
    return KVStudy(sum(map(len, used)), max(map(len, used)), units.count, found)


def longest_rows(rows: Sequence[Tensor], tokens: int) -> list[int]:
    """The places, ascending, of the longest of `rows`, `tokens` tokens in all at most but at least one row.

    What a cache costs may grow with what is attended to, and the first rows of a split may all be short.
    """
    kept: list[int] = []
    held = 0
    for place in sorted(range(len(rows)), key=lambda place: -len(rows[place])):
        if not kept or held + len(rows[place]) <= tokens:
            kept.append(place)
            held += len(rows[place])
    return sorted(kept)


@dataclass(frozen=True, slots=True)
class _Text:
    """The rows, the block of text of each of their tokens [T], and the resamples of these blocks."""

    rows: tuple[Tensor, ...]
    where: NDArray[np.int64]
    drawn: NDArray[np.int64]

    @property
    def contexts(self) -> NDArray[np.int64]:
        """How many tokens each token attends to where there is no window, itself among them: [T]."""
        return np.concatenate([np.arange(1, len(row) + 1) for row in self.rows])

    @property
    def scored(self) -> NDArray[np.bool_]:
        """Which tokens have a following one in their row: [T]."""
        return np.concatenate([np.arange(1, len(row) + 1) < len(row) for row in self.rows])

    def sums(self, values: Floats, kept: NDArray[np.bool_] | None = None) -> Floats:
        """`values` [T] summed over each block of text, those of the tokens `kept` where given."""
        weights = values if kept is None else np.where(kept, values, 0.0)
        return np.bincount(self.where, weights=weights, minlength=self.drawn.shape[1]).astype(np.float64)


def _under(subject: KVSubject, text: _Text, batch_tokens: int, advance: Advance) -> KVWeightsCosts:
    decoder, readings = subject.decoder, (FULL_READING, *subject.readings)
    groups = list(batches(text.rows, batch_tokens, decoder.device))
    errors = _Errors(subject.forms)
    states = states_behind(decoder, groups, readings, look=errors.look, advance=advance)
    full, *others = _losses(decoder, groups, states, advance)
    spec, longest = decoder.spec, max(map(len, text.rows))
    scored = text.sums(text.scored.astype(np.float64))

    def size(reading: KVReading) -> float:
        heads = spec.blocks * spec.kv_heads
        return reading.token_bytes(heads, spec.head_dim, decoder.dtype.itemsize, longest)

    def cost(reading: KVReading, losses: _Losses) -> KVCost:
        nll, base = text.sums(losses.nll), text.sums(full.nll)
        key_error, value_error = errors.of(reading)
        return KVCost(
            form=reading.form.name,
            streams=reading.form.streams,
            part=reading.part,
            perplexity=block_ratio(nll, scored, text.drawn, np.exp),
            increase=block_difference(nll, base, scored, text.drawn, np.exp),
            kl=block_ratio(text.sums(losses.kl), text.sums(np.ones(len(text.where))), text.drawn),
            key_error=key_error,
            value_error=value_error,
            bytes_per_token=size(reading),
            by_context=_by_context(losses.nll - full.nll, text),
        )

    return KVWeightsCosts(
        weights=subject.weights,
        perplexity=block_ratio(text.sums(full.nll), scored, text.drawn, np.exp),
        bytes_per_token=size(FULL_READING),
        costs=tuple(cost(*each) for each in zip(readings[1:], others, strict=True)),
        differences=_differences(readings[1:], others, text),
    )


def _differences(
    readings: Sequence[KVReading], losses: Sequence[_Losses], text: _Text
) -> tuple[KVDifference, ...]:
    """The deployed form's losses against those of every other form, keys and values together."""
    joint = {
        reading.form: own for reading, own in zip(readings, losses, strict=True) if reading.part == "both"
    }
    deployed = joint.pop(DEPLOYED, None)
    if deployed is None:
        return ()
    scored, every = text.sums(text.scored.astype(np.float64)), text.sums(np.ones(len(text.where)))
    return tuple(
        KVDifference(
            form.name,
            block_difference(text.sums(deployed.nll), text.sums(other.nll), scored, text.drawn, np.exp),
            block_difference(text.sums(deployed.kl), text.sums(other.kl), every, text.drawn),
        )
        for form, other in joint.items()
    )


@torch.inference_mode()
def _losses(
    decoder: Decoder, groups: Sequence[SequenceBatch], states: Sequence[Sequence[Tensor]], advance: Advance
) -> list[_Losses]:
    """Every reading's losses from its states behind the last block; the first reading is what KL is taken to."""
    total = sum(group.tokens for group in groups)
    found = [_Losses(np.zeros(total), np.zeros(total)) for _ in states]
    step = logit_rows(decoder.spec.vocab_size, decoder.device)
    start = 0
    for number, group in enumerate(groups):
        for first in range(0, group.tokens, step):
            part = slice(first, min(first + step, group.tokens))
            at = slice(start + part.start, start + part.stop)
            wanted = decoder.head(states[0][number][part]).log_softmax(-1)
            chance, targets = wanted.exp(), group.targets[part]
            for order, (own, losses) in enumerate(zip(states, found, strict=True)):
                log_probs = wanted if order == 0 else decoder.head(own[number][part]).log_softmax(-1)
                nll = -log_probs.gather(1, targets.clamp(min=0)[:, None]).squeeze(1)
                losses.nll[at] = nll.masked_fill_(targets < 0, 0.0).double().cpu().numpy()
                losses.kl[at] = (wanted - log_probs).mul_(chance).sum(-1).double().cpu().numpy()
                advance(part.stop - part.start)
        start += group.tokens
    return found


def _by_context(increase: Floats, text: _Text) -> tuple[ContextCost, ...]:
    """The increase [T] of −log probability by how much is attended to."""
    contexts, scored = text.contexts, text.scored
    found = []
    for first, last in context_buckets(int(contexts.max())):
        inside = scored & (contexts >= first) & (contexts <= last)
        if inside.any():
            counts = text.sums(inside.astype(np.float64))
            measure = block_ratio(text.sums(increase, inside), counts, text.drawn)
            found.append(ContextCost(first, last, int(inside.sum()), measure))
    return tuple(found)


def context_buckets(longest: int) -> list[tuple[int, int]]:
    """Lengths of context, both ends inclusive, each bucket as long as all before it: 1–16, 17–32, 33–64, …"""
    buckets, last = [], 0
    while last < longest:
        first, last = last + 1, min(longest, max(SHORTEST, 2 * last))
        buckets.append((first, last))
    return buckets
