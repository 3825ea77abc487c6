"""What modes write when they are let run: every mode continues the same prompts, and the full model reads it.

Teacher-forced figures say what a mode costs on a text that is given. Here each token follows the mode's own, so that
errors may build on each other. The judge is the reference: its perplexity of what was written. That alone can be
fooled, a mode that repeats itself is easy to predict, so that repetition is shown beside it, and a sample to read.

Sampled tokens are argmax(log p + Gumbel noise), the noise keyed by row and position and the same for all modes, which
therefore differ by their logits alone. Texts run on past an end of text.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from exeunt.calibration.bootstrap import Measure, block_ratio, block_share, resamples
from exeunt.calibration.errors import CalibrationError
from exeunt.calibration.evaluation_table import Mode
from exeunt.calibration.sequence_batch import batches
from exeunt.calibration.teacher_forcing import ForcedModel
from exeunt.compression.variant import Variant
from exeunt.kernels.token_draw import draw_tokens

REPEATED: Final = 4
"""Tokens in a row that were written before count as a repetition."""

TEMPERATURES: Final = (0.0, 1.0)
"""The most likely token, and a draw from the model's own distribution."""

Advance = Callable[[int], None]
Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True, slots=True)
class GenerationSize:
    """How much is written: texts, and tokens of each prompt and of what follows it."""

    texts: int = 16
    prompt_tokens: int = 32
    new_tokens: int = 48

    def __post_init__(self) -> None:
        if self.texts < 1 or self.prompt_tokens < 1 or self.new_tokens < 2:
            raise CalibrationError(
                f"{self.texts} texts of {self.new_tokens} tokens after prompts of {self.prompt_tokens} cannot be "
                "written; it takes a text, a token of prompt and two new ones."
            )

    @property
    def tokens(self) -> int:
        """Tokens that a mode writes."""
        return self.texts * self.new_tokens

    def fitted(self, rows: Sequence[Tensor], context: int) -> "GenerationSize":
        """As much of it as `rows` have prompts for and the model's context holds."""
        prompt = max(1, min(self.prompt_tokens, context // 3, max(map(len, rows))))
        long = sum(len(row) >= prompt for row in rows)
        return GenerationSize(min(self.texts, long), prompt, min(self.new_tokens, context - prompt))


@dataclass(frozen=True, slots=True)
class Written:
    """What a mode wrote. Figures are over its tokens, intervals over texts.

    `perplexity` is the reference's. `repeated` is the share of runs of `REPEATED` tokens that stood in the same text
    before, `distinct` the different pairs of neighbours over all pairs. The first token of a text comes from the
    prompt, which never leaves. `sample` follows `prompt`.
    """

    mode: Mode
    temperature: float
    perplexity: Measure
    mean_depth: Measure
    exit_rate: Measure
    repeated: float
    distinct: float
    prompt: str
    sample: str


@dataclass(frozen=True, slots=True)
class Continuations:
    """Token ids [texts, new] int64, and the exit at which each was said, the number of exits for full depth."""

    tokens: Tensor
    left: Tensor


def generate_modes(
    modes: Sequence[Mode],
    models: Mapping[Variant, ForcedModel],
    reference: ForcedModel,
    rows: Sequence[Tensor],
    size: GenerationSize,
    decode: Decode,
    *,
    seed: int,
    temperatures: Sequence[float] = TEMPERATURES,
    advance: Advance = lambda _tokens: None,
) -> tuple[Written, ...]:
    """What each of `modes` writes at each temperature after the beginnings of `rows`, judged by `reference`.

    `advance` is told `size.tokens` for each mode and temperature. Raises CalibrationError where `size` is not one that
    `rows` and the model's context allow (see `GenerationSize.fitted`).
    """
    prompts = _prompts(rows, size, reference.decoder.spec.max_position_embeddings)
    drawn = resamples(size.texts, seed)
    found = []
    for temperature in temperatures:
        for mode in modes:
            model = models[mode.variant]
            written = continuations(model, prompts, size.new_tokens, mode, temperature=temperature, seed=seed)
            found.append(_judged(mode, temperature, model, reference, prompts, written, drawn, decode))
            advance(size.tokens)
    return tuple(found)


@torch.inference_mode()
def continuations(
    model: ForcedModel, prompts: Tensor, new_tokens: int, mode: Mode, *, temperature: float, seed: int
) -> Continuations:
    """`new_tokens` tokens after each of `prompts` [texts, P], all texts a token at a time.

    At `temperature` 0 the most likely token is taken.
    """
    writer = _Writer(model, prompts.to(model.decoder.device), new_tokens, mode)
    noise = _Noise(len(prompts), model.decoder.spec.vocab_size, temperature, seed, model.decoder.device)
    logits = writer.read_prompts()
    for place in range(new_tokens):
        writer.write(noise.draw(logits, place))
        if place + 1 < new_tokens:
            logits = writer.next_logits()
    return writer.written()


class _Noise:
    """The randomness of a draw: a function of seed, row and position, and of nothing that a mode does."""

    def __init__(self, rows: int, vocab: int, temperature: float, seed: int, device: torch.device) -> None:
        self._rows, self._seed, self._device = rows, seed, device
        self._temperatures = torch.full((rows,), temperature, device=device)
        self._token_keys = self._keys((vocab,), 0)

    def draw(self, logits: Tensor, position: int) -> Tensor:
        """A token for each row of `logits` [rows, vocab]: [rows] int64."""
        keys = self._keys((self._rows, 2), 1 + position)
        tokens, _ = draw_tokens(logits, logits, self._temperatures, keys, self._token_keys)
        return tokens

    def _keys(self, shape: tuple[int, ...], stream: int) -> Tensor:
        numbers = np.random.default_rng((self._seed, stream)).integers(-(2**31), 2**31, shape)
        return torch.from_numpy(numbers.astype(np.int32)).to(self._device)


class _Writer:
    """Texts under way, every one as long as the others, over pages of their own."""

    def __init__(self, model: ForcedModel, prompts: Tensor, new_tokens: int, mode: Mode) -> None:
        texts, self._at = prompts.shape
        self._model, self._mode = model, mode
        self._length = self._at + new_tokens
        room = torch.zeros(texts, new_tokens, dtype=torch.int64, device=prompts.device)
        (self._batch,) = batches(list(torch.cat([prompts, room], 1)), texts * self._length, prompts.device)
        self._ids = self._batch.token_ids.view(texts, self._length)
        self._pages = model.pages(self._batch)
        self._prompt = self._at
        self._left = torch.full((texts, new_tokens), len(model.exits), device=prompts.device)

    def read_prompts(self) -> Tensor:
        """The logits [texts, vocab] that follow the prompts, which pass at full depth."""
        kept = (self._batch.positions < self._at).nonzero().squeeze(1)
        hidden = self._embedded(kept)
        hidden = self._run(hidden, kept, 0, self._model.blocks)
        return self._model.decoder.head(hidden.view(len(self._ids), self._at, -1)[:, -1])

    def write(self, tokens: Tensor) -> None:
        """Put down the next token of every text [texts]."""
        self._ids[:, self._at] = tokens
        self._at += 1

    def written(self) -> Continuations:
        """What was written so far."""
        return Continuations(self._ids[:, self._prompt : self._at].clone(), self._left)

    def next_logits(self) -> Tensor:
        """The logits [texts, vocab] that follow the last token of every text, each said where its token leaves."""
        model, decoder = self._model, self._model.decoder
        kept = torch.arange(len(self._ids), device=self._ids.device) * self._length + self._at - 1
        open_ = torch.ones(len(kept), dtype=torch.bool, device=kept.device)
        logits = torch.empty(len(kept), decoder.spec.vocab_size, device=kept.device)
        hidden = self._run(self._embedded(kept), kept, 0, model.depth(0))
        present = torch.arange(len(kept), device=kept.device)
        for number, head in enumerate(model.exits if self._mode.threshold is not None else ()):
            present, hidden = self._leave(number, present, hidden, kept, open_, logits)
            if len(present) == 0:
                return logits
            hidden = self._run(hidden, kept[present], head.depth, model.depth(number + 1))
        if self._mode.threshold is None and model.exits:
            hidden = self._run(hidden, kept, model.depth(0), model.blocks)
        stay = open_[present]
        if bool(stay.any()):
            logits[present[stay]] = decoder.head(hidden[stay])
        return logits

    def _leave(
        self, number: int, present: Tensor, hidden: Tensor, kept: Tensor, open_: Tensor, logits: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Ask an exit about the texts `present`, of which those `open_` have said nothing yet; who goes on, and states.

        Where keys and values are backfilled all go on, so that those of deeper blocks become exact.
        """
        model = self._model
        asked = open_[present]
        thresholds = torch.full((len(present),), self._mode.threshold or 0.0, device=hidden.device)
        thresholds[~asked] = torch.inf
        gate = model.exits[number].gate(hidden, thresholds, model.decoder.project_exit)
        gone = present[gate.leaves]
        if len(gone) == 0:
            return present, hidden
        logits[gone] = gate.logits
        open_[gone] = False
        self._left[gone, self._at - self._prompt] = number
        if self._mode.skipped_kv == "backfill":
            return present, hidden
        depth = model.depth(number)
        geometry = self._batch.geometry(model.layout.page_tokens, kept[gone])
        model.decoder.project_kv(hidden[gate.leaves], geometry, self._pages, depth, model.blocks)
        return present[~gate.leaves], hidden[~gate.leaves]

    def _embedded(self, kept: Tensor) -> Tensor:
        return self._model.decoder.embed(self._batch.token_ids[kept], self._batch.positions[kept])

    def _run(self, hidden: Tensor, kept: Tensor, start: int, stop: int) -> Tensor:
        geometry = self._batch.geometry(self._model.layout.page_tokens, kept)
        return self._model.decoder.run_blocks(hidden, geometry, self._pages, start, stop)


def _prompts(rows: Sequence[Tensor], size: GenerationSize, context: int) -> Tensor:
    """The beginnings of rows that are long enough, far from each other in the text: [texts, prompt_tokens]."""
    if size.prompt_tokens + size.new_tokens > context:
        raise CalibrationError(
            f"Prompts of {size.prompt_tokens} tokens and {size.new_tokens} new ones are longer than the model's "
            f"context of {context}; ask for shorter ones."
        )
    long = [row[: size.prompt_tokens] for row in rows if len(row) >= size.prompt_tokens]
    if len(long) < size.texts:
        raise CalibrationError(
            f"The text gives {len(long)} prompts of {size.prompt_tokens} tokens, and {size.texts} are wanted; give "
            "more text."
        )
    return torch.stack(long[:: len(long) // size.texts][: size.texts])


def _judged(
    mode: Mode,
    temperature: float,
    model: ForcedModel,
    reference: ForcedModel,
    prompts: Tensor,
    written: Continuations,
    drawn: NDArray[np.int64],
    decode: Decode,
) -> Written:
    tokens, left = written.tokens.cpu(), written.left.cpu().numpy()
    nll = _surprise(reference, torch.cat([prompts.cpu(), tokens], 1), tokens.shape[1])
    depths = np.array([model.depth(number) for number in range(len(model.exits) + 1)])[left]
    each = np.full(len(tokens), float(tokens.shape[1]))
    return Written(
        mode=mode,
        temperature=temperature,
        perplexity=block_ratio(nll, each, drawn, np.exp),
        mean_depth=block_ratio(depths.sum(1).astype(np.float64), each, drawn),
        exit_rate=(block_ratio if mode.threshold is None else block_share)(
            (left < len(model.exits)).sum(1).astype(np.float64), each, drawn
        ),
        repeated=repeated_share(tokens.tolist(), REPEATED),
        distinct=distinct_share(tokens.tolist(), 2),
        prompt=decode(prompts[0].tolist()),
        sample=decode(tokens[0].tolist()),
    )


@torch.inference_mode()
def _surprise(reference: ForcedModel, ids: Tensor, new_tokens: int) -> NDArray[np.float64]:
    """By text [texts], the summed negative log-likelihood in nats that the reference gives its last `new_tokens`."""
    device = reference.decoder.device
    (batch,) = batches(list(ids), ids.numel(), device)
    _, final = reference.full_depth(batch)
    predicts = (batch.positions >= ids.shape[1] - new_tokens - 1) & (batch.targets >= 0)
    sums = torch.zeros(len(ids), dtype=torch.float64, device=device)

    def note(_: int, tokens: Tensor, logits: Tensor) -> None:
        targets = batch.targets[tokens]
        chosen = logits.gather(1, targets[:, None]).squeeze(1)
        sums.index_add_(0, batch.rows[tokens], (logits.logsumexp(-1) - chosen).double())

    kept = predicts.nonzero().squeeze(1)
    reference.final(final[kept], kept, note)
    surprise: NDArray[np.float64] = sums.cpu().numpy()
    return surprise


def repeated_share(texts: Sequence[Sequence[int]], length: int) -> float:
    """Of all runs of `length` tokens the share that stood in the same text before."""
    runs = again = 0
    for text in texts:
        seen: set[tuple[int, ...]] = set()
        for start in range(len(text) - length + 1):
            run = tuple(text[start : start + length])
            again += run in seen
            runs += 1
            seen.add(run)
    return again / runs if runs else 0.0


def distinct_share(texts: Sequence[Sequence[int]], length: int) -> float:
    """Different runs of `length` tokens in all texts together, over all runs (distinct-n: Li et al., NAACL 2016)."""
    runs = [tuple(text[start : start + length]) for text in texts for start in range(len(text) - length + 1)]
    return len(set(runs)) / len(runs) if runs else 0.0
