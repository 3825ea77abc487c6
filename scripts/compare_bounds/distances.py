"""How alike the errors of two stretches of one document are, by how far apart they stand."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from exeunt.calibration.certification import FullDepthPass, full_depth_pass
from exeunt.calibration.nll_risk import CLIP
from exeunt.calibration.teacher_forcing import ForcedModel
from exeunt.compression.model import LoadedModel

ROW: Final = 512
STRETCH: Final = 224  # tokens, so that two of one row have room for a gap
APARTS: Final = (0, 32, 64, 288, 800, 1824)
"""Tokens between two stretches of one document."""


@dataclass(frozen=True, slots=True)
class Alike:
    """The correlation of two stretches' figures, so many tokens apart, over so many pairs, by what is measured."""

    threshold: float
    apart: int
    pairs: int
    increase: float  # of the clipped NLL
    disagreement: float  # of errors less the mean rate × exits


def document_rows(texts: Sequence[str], model: LoadedModel, rows: int) -> list[list[Tensor]]:
    """By document its first `rows` rows of `ROW` tokens; documents with fewer are left out."""
    found = []
    for text in texts:
        ids = model.tokenizer.encode(text[: rows * ROW * 12], add_special_tokens=False)
        if len(ids) >= rows * ROW:
            found.append([torch.tensor(ids[start : start + ROW]) for start in range(0, rows * ROW, ROW)])
    return found


def alike(
    model: LoadedModel, documents: Sequence[Sequence[Tensor]], thresholds: Sequence[float], batch_tokens: int
) -> list[Alike]:
    """The correlations under the model's default variant, skipped keys and values backfilled."""
    variant = model.default_variant
    exits = [model.exits[place] for place in model.certified_exits]
    forced = ForcedModel(model.decoder(variant), variant.kv_cache, exits)
    rows = [row for document in documents for row in document]
    seen = full_depth_pass(forced, rows, min(thresholds), batch_tokens=batch_tokens)
    return [_alike(seen, len(documents), threshold, apart) for threshold in thresholds for apart in APARTS]


def _alike(seen: FullDepthPass, documents: int, threshold: float, apart: int) -> Alike:
    if seen.losses is None:
        raise ValueError("the pass measured no losses")
    view, losses = seen.view, seen.losses
    exits = view.leave_at(threshold)
    left = exits < len(view.reach)
    agrees = view.agrees[np.minimum(exits, len(view.reach) - 1), np.arange(len(exits))]
    increase = (losses.left_at(exits) - losses.full).clip(-CLIP, CLIP) * losses.scored
    errors = (left & ~agrees) * 1.0
    increase = increase - increase.sum() / losses.scored.sum() * losses.scored
    errors = errors - errors.sum() / left.sum() * left
    by_document = [each.reshape(documents, -1) for each in (increase, errors)]
    length, step = by_document[0].shape[1], ROW
    starts = range(0, length - 2 * STRETCH - apart + 1, step)
    pairs = [
        np.concatenate(
            [
                np.stack(
                    [
                        each[:, s : s + STRETCH].sum(1),
                        each[:, s + STRETCH + apart : s + 2 * STRETCH + apart].sum(1),
                    ]
                )
                for s in starts
            ],
            axis=1,
        )
        for each in by_document
    ]
    found = [float(np.corrcoef(each)[0, 1]) for each in pairs]
    return Alike(threshold, apart, pairs[0].shape[1], found[0], found[1])
