"""How well a gate separates, and whether its confidence is to be believed: ROC, reliability, risk by coverage."""

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

RELIABILITY_BINS: Final = 10
CURVE_POINTS: Final = 100
"""The most points of a curve that are kept."""

Curve = tuple[tuple[float, float], ...]


@dataclass(frozen=True, slots=True)
class GateQuality:
    """How well a gate tells agreeing tokens from others, on the split it is judged on.

    AUC is the chance that an agreeing token gets more than a disagreeing one; `reliability` holds for each
    occupied tenth of confidence (mean confidence, share that agrees, tokens). Where all logits confirm what a shortlist
    lets pass, the confidence is theirs, and tokens are let go by what gets them past both.
    """

    auc: float
    auc_probe: float
    auc_top: float  # of the head's own top probability alone
    calibration_error: float  # mean distance of confidence and agreement over the tenths, weighted by tokens
    reliability: tuple[tuple[float, float, int], ...]
    tokens: int
    roc: Curve = ()
    """(share of the disagreeing tokens, share of the agreeing ones) that get more than a threshold, from (0, 0) to
    (1, 1); at most `CURVE_POINTS`, and the area below them is `auc` within 0.001."""
    coverage: Curve = ()
    """(share of the tokens that are surest, disagreement among them), by growing share; at most `CURVE_POINTS`."""
    auc_listed: float | None = None  # of the confidence by the shortlist alone, where that is confirmed


def gate_quality(
    confidence: Tensor,
    probe_logit: Tensor,
    top: Tensor,
    agrees: Tensor,
    listed: Tensor | None = None,
    reach: Tensor | None = None,
) -> GateQuality:
    """The quality of a gate from [T] tensors of its confidence, its parts and the truth.

    Where a shortlist is asked first, `listed` is the confidence by it, and `reach` what tokens are let go by.
    """
    sure = confidence.double().cpu().numpy()
    order = sure if reach is None else reach.double().cpu().numpy()
    truth = agrees.cpu().numpy()
    bins = np.minimum((sure * RELIABILITY_BINS).astype(int), RELIABILITY_BINS - 1)
    table = [
        (float(sure[bins == b].mean()), float(truth[bins == b].mean()), int((bins == b).sum()))
        for b in range(RELIABILITY_BINS)
        if (bins == b).any()
    ]
    error = sum(count * abs(said - was) for said, was, count in table) / max(1, len(sure))
    return GateQuality(
        auc=auc(order, truth),
        auc_probe=auc(probe_logit.double().cpu().numpy(), truth),
        auc_top=auc(top.double().cpu().numpy(), truth),
        calibration_error=error,
        reliability=tuple(table),
        tokens=len(sure),
        roc=roc(order, truth),
        coverage=coverage(order, truth),
        auc_listed=None if listed is None else auc(listed.double().cpu().numpy(), truth),
    )


def auc(score: NDArray[np.float64], truth: NDArray[np.bool_]) -> float:
    """Area under the ROC curve (Mann-Whitney, ties count half); 0.5 where all agree or none does."""
    positive = int(truth.sum())
    negative = len(truth) - positive
    if positive == 0 or negative == 0:
        return 0.5
    ranks = stats.rankdata(score)
    return float((ranks[truth].sum() - positive * (positive + 1) / 2) / (positive * negative))


def roc(score: NDArray[np.float64], truth: NDArray[np.bool_]) -> Curve:
    """The ROC curve, thinned to `CURVE_POINTS` of its corners, evenly; () where all agree or none does."""
    positive = int(truth.sum())
    negative = len(truth) - positive
    if positive == 0 or negative == 0:
        return ()
    ends, right = _corners(score, truth)
    kept = _thinned(np.stack(((ends - right) / negative, right / positive)), CURVE_POINTS - 1)
    return ((0.0, 0.0), *kept)


def coverage(score: NDArray[np.float64], truth: NDArray[np.bool_]) -> Curve:
    """The risk by coverage (El-Yaniv and Wiener, JMLR 11, 2010), thinned like `roc`; () where there are no tokens."""
    if not len(truth):
        return ()
    ends, right = _corners(score, truth)
    return _thinned(np.stack((ends / len(truth), 1.0 - right / ends)), CURVE_POINTS)


def _corners(
    score: NDArray[np.float64], truth: NDArray[np.bool_]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """For each distinct score, highest first: how many tokens get at least it, and how many of them agree."""
    order = np.argsort(-score, kind="stable")
    last = np.flatnonzero(np.diff(score[order], append=-np.inf))  # of the tokens with one score
    right: NDArray[np.int64] = np.cumsum(truth[order], dtype=np.int64)[last]
    return (last + 1).astype(np.int64), right


def _thinned(points: NDArray[np.float64], most: int) -> Curve:
    """At most `most` of the points [2, n], evenly by their number, the last among them."""
    count = points.shape[1]
    kept = np.unique(np.linspace(0, count - 1, min(most, count)).round().astype(int))
    return tuple((round(float(x), 6), round(float(y), 6)) for x, y in points[:, kept].T)
