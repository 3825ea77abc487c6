"""How much a predictor that knows when it is sure is worth: agreement by coverage.

Let tokens leave in order of sureness. Risk as a function of the share let go is the risk-coverage curve of selective
classification (Geifman and El-Yaniv, arXiv 1705.08500), and its mean over all shares one number for both things that an
exit needs, being right and knowing it (AURC: Geifman, Uziel and El-Yaniv, arXiv 1805.08206). Here it is told as
agreement, one minus risk: that of all tokens is where the curve ends.
"""

import numpy as np
from numpy.typing import NDArray


def selective_agreement(sure: NDArray[np.floating], agrees: NDArray[np.bool_]) -> float:
    """Agreement among the surest tokens, averaged over how many these are, 1 to T: in [0, 1], 0 for no tokens.

    `sure` [T] is higher for surer tokens, `agrees` [T] whether each is right. Tokens of the same sureness are taken in
    order of the text.
    """
    if len(agrees) == 0:
        return 0.0
    return float(_by_coverage(sure, agrees).mean())


def share_within(sure: NDArray[np.floating], agrees: NDArray[np.bool_], risk: float) -> float:
    """The largest share of the tokens, surest first, among which at most `risk` disagree; 0 where there is none."""
    within = np.flatnonzero(1.0 - _by_coverage(sure, agrees) <= risk + 1e-12)
    return 0.0 if len(within) == 0 else float(within[-1] + 1) / len(agrees)


def _by_coverage(sure: NDArray[np.floating], agrees: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Agreement among the 1, 2, ..., T surest tokens: [T]."""
    order = np.argsort(-sure, kind="stable")
    counts: NDArray[np.float64] = np.cumsum(agrees[order], dtype=np.float64)
    return counts / np.arange(1, len(order) + 1)
