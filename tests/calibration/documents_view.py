"""What gates make of documents that they know unequally well: texts for simulations, their true risk known by size."""

import numpy as np

from exeunt.calibration.thresholds import GateView


def documents_view(generator: np.random.Generator, documents: int, tokens: int, spread: float) -> GateView:
    """One exit whose reach is right on average, and wrong by an amount of its own (logits, `spread`) in each document.

    Documents differ in how sure the gate is of them, too.
    """
    document = np.repeat(np.arange(documents), tokens // documents)
    shift = generator.normal(0.0, spread, documents)[document]
    ease = generator.normal(0.0, 0.7, documents)[document]
    logit = generator.normal(ease - 0.5, 2.0)
    reach = 1.0 / (1.0 + np.exp(-logit))
    agrees = generator.random(len(document)) < 1.0 / (1.0 + np.exp(-logit - shift))
    return GateView(reach[None], reach[None], reach[None], agrees[None], document, documents)
