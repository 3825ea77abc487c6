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
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from exeunt.compression.host_memory import Fetch, staged
from exeunt.compression.row_graphs import StepGraphs
from exeunt.kernels.token_draw import draw_tokens
from exeunt.server.processed_scores import processed_scores
from exeunt.server.row_sampling import RowSampling, row_keys, token_keys


class SampledTokens(NamedTuple):
    """One token per row, on the host. A row with an error has id -1 and logprob nan and harms no other."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]  # nats, log-softmax of the raw logits
    errors: tuple[str | None, ...]
    beside: tuple[int, ...] = ()  # what was to come along


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
    beside: Tensor | None = None,
) -> StartedDraws:
    """Starts to draw a token for each row of `logits` [rows, vocabulary], any float dtype; a GPU is not waited for.

    A row whose logits are not usable (NaN, +inf, or nothing left to choose from) gets an error in the result. On a GPU
    `graphs` hold the draws of few rows that ask for neither penalties nor truncation. `beside` [rows] int64, small
    numbers on the logits' device, comes to the host with the tokens, in the same copy.
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
    if device.type != "cpu" or graphs is not None:
        return _start_there(logits, scores, temperatures, keys, graphs, beside)
    ids, logprobs = draw_tokens(
        logits, scores, torch.from_numpy(temperatures), keys, token_keys(logits.shape[1], device)
    )
    return StartedDraws(ids, lambda: _on_host(ids.tolist(), logprobs.tolist(), _numbers(beside)))


def _start_there(
    logits: Tensor,
    scores: Tensor,
    temperatures: np.ndarray,
    keys: Tensor,
    graphs: StepGraphs | None,
    beside: Tensor | None,
) -> StartedDraws:
    """Draw on another device: what rows ask for goes there in one copy, what is drawn comes back in one."""
    device, vocab_size = logits.device, logits.shape[1]
    both = np.empty((len(keys), 3), np.int32)
    both[:, 0], both[:, 1:] = temperatures.view(np.int32), keys.numpy()
    asked, of_tokens, found = staged(both, device), token_keys(vocab_size, device), None
    along = () if beside is None else (beside,)
    if graphs is not None and scores is logits:
        found = graphs.run(
            ("a draw", vocab_size, len(along)),
            lambda logits, asked, *along: (_drawn(logits, logits, asked, of_tokens, *along),),
            logits,
            asked,
            *along,
        )
    if found is None:
        found = (_drawn(logits, scores, asked.to(device, non_blocking=True), of_tokens, *along),)
    drawn, coming = found[0], Fetch(found[0])

    def told() -> SampledTokens:
        tokens, logprobs, *numbers = coming.wait().t().tolist()
        return _on_host(_integers(tokens), logprobs, _integers(*numbers))

    return StartedDraws(drawn[:, 0], told)


def _drawn(logits: Tensor, scores: Tensor, asked: Tensor, token_keys: Tensor, *along: Tensor) -> Tensor:
    """Ids, log-probabilities and what goes `along` [rows, 2 or 3] float64, which holds every id exactly.

    `asked` [rows, 3] int32 are the bits of each row's temperature and its two keys.
    """
    temperatures, keys = asked[:, 0].contiguous().view(torch.float32), asked[:, 1:].contiguous()
    ids, logprobs = draw_tokens(logits, scores, temperatures, keys, token_keys)
    return torch.stack((ids.double(), logprobs.double(), *(each.double() for each in along)), dim=1)


def _integers(found: Sequence[float] = ()) -> tuple[int, ...]:
    return tuple(map(int, found))


def _numbers(beside: Tensor | None) -> tuple[int, ...]:
    """What comes along on the host, waited for."""
    return () if beside is None else _integers(beside.tolist())


def start_each(
    logits: Tensor,
    rows: Sequence[RowSampling],
    eos_token_ids: Collection[int] = (),
    graphs: StepGraphs | None = None,
    beside: Tensor | None = None,
) -> StartedDraws:
    """`start_draws`, but a row that raises gets an error like one whose logits are not usable: the others are drawn."""
    try:
        return start_draws(logits, rows, eos_token_ids, graphs, beside)
    except Exception:  # noqa: BLE001 - whose it is shows when each is drawn alone
        drawn = [_sample_alone(logits[i : i + 1], row, eos_token_ids) for i, row in enumerate(rows)]
    found = SampledTokens(
        tuple(each.ids[0] for each in drawn),
        tuple(each.logprobs[0] for each in drawn),
        tuple(each.errors[0] for each in drawn),
        _numbers(beside),
    )
    return StartedDraws(None, lambda: found)


def _sample_alone(logits: Tensor, row: RowSampling, eos_token_ids: Collection[int]) -> SampledTokens:
    try:
        return sample(logits, [row], eos_token_ids)
    except Exception as error:  # noqa: BLE001 - it is told of as this row's
        return SampledTokens(
            (-1,), (math.nan,), (f"drawing a token failed: {type(error).__name__}: {error}",)
        )


def finished_draws(ids: Sequence[int], logprobs: Sequence[float]) -> StartedDraws:
    """Draws that are on the host already; a log-probability that is NaN is that of a row that is not usable."""
    return StartedDraws(None, lambda: _on_host(ids, logprobs))


def _on_host(ids: Sequence[int], logprobs: Sequence[float], beside: tuple[int, ...] = ()) -> SampledTokens:
    if not any(map(math.isnan, logprobs)):
        return SampledTokens(tuple(ids), tuple(logprobs), (None,) * len(ids), beside)
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
        beside,
    )
