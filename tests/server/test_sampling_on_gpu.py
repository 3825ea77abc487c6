"""The server's own steps of sampling against the kernels that do them on a GPU."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

import exeunt.kernels.gpu
from exeunt.kernels.token_draw.scores import penalise_scores_reference, truncate_scores_reference
from exeunt.server.processed_scores import processed_scores
from exeunt.server.request import SamplingParams
from exeunt.server.row_sampling import RowSampling
from exeunt.server.sampling import sample
from tests.kernels.triton.on_gpu import patch_language_once
from tests.kernels.triton.score_cuts import HARD, assert_cut_alike, limits_of


@pytest.fixture
def seed() -> None:
    """Cuts at a border are compared: the same scores in every run."""
    torch.manual_seed(5)


def _by_the_server(scores: Tensor, limits: Sequence[tuple[float, int, float]]) -> Tensor:
    rows = [
        RowSampling(SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, seed=1), 0, 0)
        for temperature, top_k, top_p in limits
    ]
    return processed_scores(scores, rows)


@pytest.mark.parametrize("vocab", [1, 6, 300, 9001])
@pytest.mark.usefixtures("seed")
def test_cuts_what_the_kernels_reference_cuts(vocab: int) -> None:
    scores, limits = torch.randn(len(HARD), vocab) * 3, limits_of(HARD, "cpu")
    expected = truncate_scores_reference(scores, *limits)
    assert_cut_alike(_by_the_server(scores, HARD), expected, scores, limits)


@pytest.mark.usefixtures("seed")
def test_penalises_as_the_kernels_reference() -> None:
    vocab, ends = 3000, [7, 2999]
    logits = torch.randn(4, vocab) * 3
    logits[2, 5] = torch.nan
    histories = [[7, 5, 7, 1, 2999], [], torch.randint(0, vocab, (2500,)).tolist(), [5, 7, 9]]
    penalties, least = (1.3, 2.0, 0.8, 1.0), (3, 3, 0, 0)
    expected = penalise_scores_reference(
        logits,
        torch.tensor([token for history in histories for token in history], dtype=torch.int32),
        torch.tensor([0, *(len(history) for history in histories)]).cumsum(0).int(),
        torch.tensor(penalties),
        torch.tensor(ends, dtype=torch.int32),
        torch.tensor([each > 0 for each in least]),
    )
    rows = [
        RowSampling(SamplingParams(seed=1, repetition_penalty=p, min_new_tokens=m), 0, 1, history)
        for p, m, history in zip(penalties, least, histories, strict=True)
    ]
    torch.testing.assert_close(processed_scores(logits, rows, ends), expected, rtol=0, atol=0, equal_nan=True)


# The interpreter computes with numpy, which warns of what kernels do on purpose: NaN and infinity in arithmetic.
@pytest.mark.filterwarnings("ignore:.* encountered in :RuntimeWarning")
@pytest.mark.usefixtures("seed")
def test_goes_the_same_way_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="needs the package triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        patch_language_once(monkeypatch)
    params = [
        SamplingParams(
            temperature=0.8, top_k=20, top_p=0.9, repetition_penalty=1.2, min_new_tokens=2, seed=3
        ),
        SamplingParams(temperature=0.0, repetition_penalty=0.9, seed=3),
        SamplingParams(temperature=1.0, top_p=0.6, min_new_tokens=2, ignore_eos=True, seed=3),
        SamplingParams(temperature=1.0, top_k=10_000, seed=3),
    ]
    histories: tuple[list[int], ...] = ([1, 2, 3, 1], [7], [], [4])
    rows = [RowSampling(each, 0, 1, history) for each, history in zip(params, histories, strict=True)]
    logits = torch.randn(4, 600, device=device) * 2
    expected, drawn = processed_scores(logits.cpu(), rows, [5, 9]), sample(logits.cpu(), rows, [5, 9])
    monkeypatch.setattr(exeunt.kernels.gpu, "interpreted", True)
    found = processed_scores(logits, rows, [5, 9])
    torch.testing.assert_close(found[[1, 3]].cpu(), expected[[1, 3]], rtol=0, atol=0)
    kept = found.isfinite().cpu() & expected.isfinite()
    assert torch.equal(found.cpu()[kept], expected[kept])
    assert int((found.isfinite().cpu() != expected.isfinite()).sum()) <= 2
    again = sample(logits, rows, [5, 9])
    assert sum(a != b for a, b in zip(again.ids, drawn.ids, strict=True)) <= 1
    assert again.errors == drawn.errors
