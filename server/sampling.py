"""Drawing the next tokens of a batch of rows, each with its own parameters.

A token is argmax(log p + Gumbel noise), the Gumbel-max form of a draw from p. The noise is a pure function of
(seed, choice, position, token id): no generator state, so a row draws the same token alone and in a crowd, in
one go and after preemption, and a draft at an early exit meets the very noise that the full model will meet.
The kernel compares p / E with E = exp(-noise), an exponential variable: the same order, one logarithm less.

p is softmax of the logits after, in this order (that of `transformers` and vLLM):

1. `min_new_tokens`: end-of-text ids are ruled out while fewer tokens were generated (unless `ignore_eos`);
2. `repetition_penalty`: ids in the history (prompt and generated tokens) have positive logits divided by the
   penalty and negative ones multiplied;
3. `temperature`: division; below 1e-5 is greedy, as in vLLM: argmax of what steps 1 and 2 left, no noise;
4. `top_k`: ids whose score is below the k-th largest go; ties with the k-th stay; 0, or k ≥ vocabulary:
   nothing goes;
5. `top_p`: on the renormalised rest, the most probable ids stay until their mass reaches top_p, the one that
   reaches it included, at least one. Among equal probabilities the lower id is the more probable one
   (`transformers` and vLLM leave that to an unstable sort).

Equal scores in an argmax go to the lower id.
"""

import math
from collections.abc import Callable, Collection, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from exeunt.compression.host_memory import Fetch, sent, staged
from exeunt.compression.row_graphs import StepGraphs
from exeunt.kernels.gpu import triton_runs
from exeunt.kernels.token_draw import draw_tokens, penalise_scores, truncate_scores
from exeunt.server.request import SamplingParams

GREEDY_BELOW = 1e-5  # temperatures under this are greedy: dividing by them only overflows
_MASS_UNITS = (
    1 << 40
)  # top-p adds probabilities up as integers of this unit: sums that no order of adding changes
_LEVEL_SHIFT = 18  # a float32's exponent and its first five mantissa bits: 32 levels per power of two
_LEVELS = 1 << (30 - _LEVEL_SHIFT)  # enough for every float up to 1
# Vocabulary entries cut by top-k and top-p at a time on a CPU: they stay in its cache, and each step on one thread.
_CPU_CHUNK = 1 << 15
_MASK64 = (1 << 64) - 1


class RowSampling(NamedTuple):
    """What one row of logits needs for its draw.

    `position` is the token's place in its answer: 0 for the first generated token, whatever the prompt's
    length. `history` holds the ids of prompt and generated tokens up to here (drafts included) in any order,
    a set will do; it is read only when there is a repetition penalty.
    """

    params: SamplingParams
    choice: int
    position: int
    history: Collection[int] = ()

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken, with no noise."""
        return self.params.temperature < GREEDY_BELOW

    def masks_eos(self) -> bool:
        """Whether end-of-text is ruled out for this token."""
        return self.position < self.params.min_new_tokens and not self.params.ignore_eos


class SampledTokens(NamedTuple):
    """One token per row, on the host. A row with an error has id -1 and logprob nan and harms no other."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]  # nats, log-softmax of the raw logits
    errors: tuple[str | None, ...]


class StartedDraws(NamedTuple):
    """Draws that a device was asked for, one a row. It knows the tokens before the host does.

    `ids` [rows] are on that device, of any dtype, and hold until the next draws are started there: ids of the
    vocabulary, of rows whose logits are not usable too. None where rows were drawn one by one.
    """

    ids: Tensor | None
    told: Callable[[], SampledTokens]  # waits for what comes to the host

    def wait(self) -> SampledTokens:
        """The tokens on the host; what the device was asked since is not waited for."""
        return self.told()


def sample(
    logits: Tensor,
    rows: Sequence[RowSampling],
    eos_token_ids: Collection[int] = (),
    graphs: StepGraphs | None = None,
) -> SampledTokens:
    """Draws a token for each row of `logits` [rows, vocabulary], any float dtype, see `start_draws`."""
    return start_draws(logits, rows, eos_token_ids, graphs).wait()


def start_draws(
    logits: Tensor,
    rows: Sequence[RowSampling],
    eos_token_ids: Collection[int] = (),
    graphs: StepGraphs | None = None,
) -> StartedDraws:
    """Starts to draw a token for each row of `logits` [rows, vocabulary], any float dtype; a GPU is not waited for.

    A row whose logits are not usable (NaN, +inf, or nothing left to choose from) gets an error in the result. On a GPU
    `graphs` hold the draws of few rows that ask for neither penalties nor truncation.
    Raises ValueError when the number of rows differs.
    """
    if logits.ndim != 2 or logits.shape[0] != len(rows):
        raise ValueError(f"logits of shape {tuple(logits.shape)} were given for {len(rows)} rows")
    if not rows:
        return StartedDraws(None, lambda: SampledTokens((), (), ()))
    logits = logits.float().contiguous()
    scores = processed_scores(logits, rows, eos_token_ids)
    temperatures = np.array([0.0 if row.greedy else row.params.temperature for row in rows], np.float32)
    keys, device = row_keys(rows), logits.device
    if device.type != "cpu":
        return _start_there(logits, scores, temperatures, keys, graphs)
    ids, logprobs = draw_tokens(
        logits, scores, torch.from_numpy(temperatures), keys, token_keys(logits.shape[1], device)
    )
    return StartedDraws(ids, lambda: _on_host(ids.tolist(), logprobs.tolist()))


def _start_there(
    logits: Tensor,
    scores: Tensor,
    temperatures: np.ndarray,
    keys: Tensor,
    graphs: StepGraphs | None,
) -> StartedDraws:
    """Draw on another device: what rows ask for goes there in one copy, what is drawn comes back in one."""
    device, vocab_size = logits.device, logits.shape[1]
    both = np.empty((len(keys), 3), np.int32)
    both[:, 0], both[:, 1:] = temperatures.view(np.int32), keys.numpy()
    asked, of_tokens, found = staged(both, device), token_keys(vocab_size, device), None
    if graphs is not None and scores is logits:
        found = graphs.run(
            ("a draw", vocab_size),
            lambda logits, asked: (_drawn(logits, logits, asked, of_tokens),),
            logits,
            asked,
        )
    if found is None:
        found = (_drawn(logits, scores, asked.to(device, non_blocking=True), of_tokens),)
    drawn, coming = found[0], Fetch(found[0])

    def told() -> SampledTokens:
        tokens, logprobs = coming.wait().t().tolist()
        return _on_host([int(token) for token in tokens], logprobs)

    return StartedDraws(drawn[:, 0], told)


def _drawn(logits: Tensor, scores: Tensor, asked: Tensor, token_keys: Tensor) -> Tensor:
    """Ids and log-probabilities [rows, 2] float64, which holds every id exactly.

    `asked` [rows, 3] int32 are the bits of each row's temperature and its two keys.
    """
    temperatures, keys = asked[:, 0].contiguous().view(torch.float32), asked[:, 1:].contiguous()
    ids, logprobs = draw_tokens(logits, scores, temperatures, keys, token_keys)
    return torch.stack((ids.double(), logprobs.double()), dim=1)


def start_each(
    logits: Tensor,
    rows: Sequence[RowSampling],
    eos_token_ids: Collection[int] = (),
    graphs: StepGraphs | None = None,
) -> StartedDraws:
    """`start_draws`, but a row that raises gets an error like one whose logits are not usable: the others are drawn."""
    try:
        return start_draws(logits, rows, eos_token_ids, graphs)
    except Exception:  # noqa: BLE001 - whose it is shows when each is drawn alone
        drawn = [_sample_alone(logits[i : i + 1], row, eos_token_ids) for i, row in enumerate(rows)]
    found = SampledTokens(
        tuple(each.ids[0] for each in drawn),
        tuple(each.logprobs[0] for each in drawn),
        tuple(each.errors[0] for each in drawn),
    )
    return StartedDraws(None, lambda: found)


def _sample_alone(logits: Tensor, row: RowSampling, eos_token_ids: Collection[int]) -> SampledTokens:
    try:
        return sample(logits, [row], eos_token_ids)
    except Exception as error:  # noqa: BLE001 - it is told of as this row's
        return SampledTokens(
            (-1,), (math.nan,), (f"drawing a token failed: {type(error).__name__}: {error}",)
        )


class PlainDraw(NamedTuple):
    """A draw from logits as they are: its temperature, 0 for the most likely token, and the two keys of its noise."""

    temperature: float
    first_key: int
    second_key: int


_GREEDY = PlainDraw(0.0, 0, 0)


def plain_draw(row: RowSampling, vocab_size: int, *, ends: bool) -> PlainDraw | None:
    """How a row's token is drawn where none of steps 1, 2, 4 and 5 change its logits; None where one does.

    `ends` says whether the model has end-of-text ids.
    """
    params = row.params
    if params.repetition_penalty != 1.0 or (ends and row.masks_eos()):
        return None
    if row.greedy:
        return _GREEDY
    return None if _truncates(params, vocab_size) else PlainDraw(float(params.temperature), *_row_key(row))


def finished_draws(ids: Sequence[int], logprobs: Sequence[float]) -> StartedDraws:
    """Draws that are on the host already; a log-probability that is NaN is that of a row that is not usable."""
    return StartedDraws(None, lambda: _on_host(ids, logprobs))


def processed_scores(
    logits: Tensor, rows: Sequence[RowSampling], eos_token_ids: Collection[int] = ()
) -> Tensor:
    """Steps 1, 2, 4 and 5: the scores [rows, vocabulary] of which softmax(score / temperature) is drawn from.

    What top-k and top-p rule out is -infinity; rows that ask for nothing stay as they are, and `logits` itself comes
    back where none does. `logits` are float32.
    """
    scores = _penalised(logits, rows, eos_token_ids)
    cut = [i for i, row in enumerate(rows) if not row.greedy and _truncates(row.params, logits.shape[1])]
    if not cut:
        return scores
    if triton_runs(scores.device):
        return _truncated_on_gpu(scores, rows)
    if scores is logits:
        scores = logits.clone()
    together = len(cut) if scores.device.type != "cpu" else max(_CPU_CHUNK // scores.shape[1], 1)
    for start in range(0, len(cut), together):
        some = cut[start : start + together]
        index = _index(some, scores)
        part = scores.index_select(0, index)
        kept = _truncated_softmax(part, [rows[i].params for i in some]) > 0
        scores.index_copy_(0, index, part.masked_fill_(~kept, -torch.inf))
    return scores


def _truncates(params: SamplingParams, vocab_size: int) -> bool:
    return 0 < params.top_k < vocab_size or params.top_p < 1.0


def _penalised(logits: Tensor, rows: Sequence[RowSampling], eos_token_ids: Collection[int]) -> Tensor:
    """Steps 1 and 2; `logits` itself when no row asks for them."""
    masked = [index for index, row in enumerate(rows) if row.masks_eos()] if eos_token_ids else []
    penalised = [
        index for index, row in enumerate(rows) if row.params.repetition_penalty != 1.0 and row.history
    ]
    if not masked and not penalised:
        return logits
    if triton_runs(logits.device):
        return _penalised_on_gpu(logits, rows, eos_token_ids)
    scores = logits.clone()
    if masked:
        eos = _index(list(eos_token_ids), scores)
        scores[_index(masked, scores)[:, None], eos] = -torch.inf
    if penalised:
        row_ids, token_ids = _seen(rows, penalised, scores.device)
        strength = torch.tensor([row.params.repetition_penalty for row in rows], device=scores.device)[
            row_ids
        ]
        values = scores[row_ids, token_ids]
        # A token that was seen twice is written twice, with the same value: both come from the score as it was.
        scores[row_ids, token_ids] = torch.where(values < 0, values * strength, values / strength)
    return scores


def _penalised_on_gpu(logits: Tensor, rows: Sequence[RowSampling], eos_token_ids: Collection[int]) -> Tensor:
    """Steps 1 and 2 in one kernel, which nothing waits for."""
    seen = [row.history if row.params.repetition_penalty != 1.0 else () for row in rows]
    lengths = [len(history) for history in seen]
    ids = [np.fromiter(history, np.int32, length) for history, length in zip(seen, lengths, strict=True)]
    device = logits.device
    return penalise_scores(
        logits,
        sent(np.concatenate(ids), device),
        sent(np.cumsum([0, *lengths], dtype=np.int32), device),
        sent(np.array([row.params.repetition_penalty for row in rows], np.float32), device),
        sent(np.fromiter(eos_token_ids, np.int32, len(eos_token_ids)), device),
        sent(np.array([row.masks_eos() for row in rows], np.bool_), device),
    )


def _truncated_on_gpu(scores: Tensor, rows: Sequence[RowSampling]) -> Tensor:
    """Steps 3 to 5 without sorting, in kernels that nothing waits for."""
    device, vocab_size = scores.device, scores.shape[1]
    return truncate_scores(
        scores,
        sent(np.array([0.0 if row.greedy else row.params.temperature for row in rows], np.float32), device),
        sent(np.array([min(row.params.top_k, vocab_size) for row in rows], np.int32), device),
        sent(np.array([row.params.top_p for row in rows], np.float64), device),
    )


def _seen(rows: Sequence[RowSampling], penalised: list[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """(row, token id) of every token in the histories of the rows `penalised`."""
    histories = [rows[index].history for index in penalised]
    lengths = [len(history) for history in histories]
    ids = np.concatenate([np.fromiter(history, np.int64, len(history)) for history in histories])
    return torch.from_numpy(np.repeat(penalised, lengths)).to(device), torch.from_numpy(ids).to(device)


def _truncated_softmax(scores: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Steps 3 to 5: [rows, vocab] float32, a new tensor, each row summing to at most 1 (truncated, not
    rescaled).

    The scale of a row changes no draw, so the mass that top-p cut off is not redistributed.
    """
    temperatures = torch.tensor([p.temperature for p in params], device=scores.device)[:, None]
    # Subtracting the maximum first keeps a small temperature from overflowing.
    scaled = (scores - scores.amax(dim=-1, keepdim=True)).div_(temperatures)
    vocab_size = scores.shape[1]
    limits = [p.top_k if 0 < p.top_k < vocab_size else 0 for p in params]
    if any(limits):
        index = _index([i for i, limit in enumerate(limits) if limit], scores)
        ks = _index([limit for limit in limits if limit], scores)[:, None]
        rows = scaled.index_select(0, index)
        kth = rows.topk(max(limits), dim=-1).values.gather(1, ks - 1)
        scaled.index_copy_(0, index, rows.masked_fill_(rows < kth, -torch.inf))
    probs = scaled.softmax(dim=-1)
    nuclei = [i for i, p in enumerate(params) if p.top_p < 1.0]
    if nuclei:
        index = _index(nuclei, scores)
        mass = torch.tensor([params[i].top_p for i in nuclei], dtype=torch.float64, device=scores.device)[
            :, None
        ]
        probs.index_copy_(0, index, _nucleus(probs.index_select(0, index), mass))
    return probs


def _nucleus(probs: Tensor, mass: Tensor) -> Tensor:
    """Step 5: `probs` [rows, vocab] with zeros outside each row's nucleus of `mass` [rows, 1] float64.

    Sorting a vocabulary costs more than the rest of sampling together. A histogram over levels of probability finds
    the level in which the nucleus ends; all above is in it, all below is not, and only that level is sorted.
    """
    probs = probs.nan_to_num(0.0)  # an unusable row fails by itself, not the batch by an index out of bounds
    units = (probs.double() * _MASS_UNITS).long()
    wanted = (mass * _MASS_UNITS).ceil().long().clamp_min_(1)
    # The bits of positive floats are ordered as the floats are.
    levels = (probs.view(torch.int32) >> _LEVEL_SHIFT).long()
    by_level = units.new_zeros(probs.shape[0], _LEVELS + 1).scatter_add_(1, levels, units)
    reached = by_level.flip(1).cumsum(dim=1).flip(1)  # [rows, levels]: mass at a level and above
    border = ((reached >= wanted).sum(dim=1, keepdim=True) - 1).clamp_min_(0)
    above = reached.gather(1, border + 1)
    inside = levels > border
    rows, ids = (levels == border).nonzero().unbind(1)
    order = probs[rows, ids].sort(descending=True, stable=True).indices  # ties stay in the order of their ids
    order = order[rows[order].sort(stable=True).indices]
    rows, ids = rows[order], ids[order]
    weights = units[rows, ids]
    before = weights.cumsum(dim=0) - weights
    counts = rows.bincount(minlength=probs.shape[0])
    first = (counts.cumsum(dim=0) - counts)[rows]
    stays = above[rows, 0] + before - before[first] < wanted[rows, 0]
    inside[rows[stays], ids[stays]] = True
    return probs * inside


def _on_host(ids: Sequence[int], logprobs: Sequence[float]) -> SampledTokens:
    if not any(map(math.isnan, logprobs)):
        return SampledTokens(tuple(ids), tuple(logprobs), (None,) * len(ids))
    errors = tuple(
        "the model's logits for this token hold NaN or infinite values, so no token can be chosen"
        if math.isnan(logprob)
        else None
        for logprob in logprobs
    )
    return SampledTokens(
        tuple(-1 if error else token for token, error in zip(ids, errors, strict=True)),
        tuple(logprobs),
        errors,
    )


def _index(values: list[int], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=like.device)


def row_keys(rows: Sequence[RowSampling]) -> Tensor:
    """What the rows' noise is keyed by, [rows, 2] int32: a hash of (seed, choice, position); 0 where greedy."""
    return torch.from_numpy(np.array([(0, 0) if row.greedy else _row_key(row) for row in rows], np.int32))


def _row_key(row: RowSampling) -> tuple[int, int]:
    """Two int32 keys from (seed, choice, position)."""
    key = _mix64(_answer_key(row.params.seed, row.choice) ^ (row.position & _MASK64))
    return _signed32(key & 0xFFFFFFFF), _signed32(key >> 32)


@lru_cache(maxsize=4096)
def _answer_key(seed: int, choice: int) -> int:
    """The part of the hash that all tokens of an answer share."""
    return _mix64(_mix64(seed & _MASK64) ^ (choice & _MASK64))


def _mix64(value: int) -> int:
    """One step of SplitMix64 (Steele, Lea, Flood 2014): a bijection of 64-bit numbers."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)


def _signed32(value: int) -> int:
    return value - (1 << 32) if value >= 1 << 31 else value


@lru_cache(maxsize=8)
def token_keys(vocab_size: int, device: torch.device) -> Tensor:
    """A scattered int32 key per token id [vocab_size], `_mix64`'s upper half: close ids share no bits."""
    keys = np.arange(vocab_size, dtype=np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    keys ^= keys >> np.uint64(31)
    return torch.from_numpy((keys >> np.uint64(32)).astype(np.uint32).view(np.int32)).to(device)
