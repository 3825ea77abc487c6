"""Exit heads under the names of a bundle's tensors: what is written is read again, what does not fit is refused."""

from dataclasses import replace

import pytest
import torch

from exeunt.compression.exits import (
    ExitHead,
    ExitHeadError,
    exit_metadata,
    exit_tensors,
    exits_from_tensors,
    needs_newest_format,
)
from tests.compression.exit_heads import HIDDEN, SHORTLIST, CountingOutput, NormKind, exit_head, exit_judge


def test_judges_and_shortlists_survive_the_bundle_names() -> None:
    plain, listed = exit_head(block=1), replace(exit_head(block=5), judge=exit_judge(), shortlist=SHORTLIST)
    assert not needs_newest_format([plain])
    assert needs_newest_format([plain, replace(plain, judge=exit_judge())])
    assert needs_newest_format([plain, replace(plain, shortlist=SHORTLIST)])
    before = [plain, listed]
    tensors = exit_tensors(before)
    again = exits_from_tensors(tensors, exit_metadata(before))
    assert again[0].judge is None
    assert again[0].shortlist is None
    assert again[1].shortlist is not None
    assert torch.equal(again[1].shortlist.ids, SHORTLIST.ids)
    hidden, output = torch.randn(8, HIDDEN), CountingOutput()
    for head, read in zip(before, again, strict=True):
        assert torch.equal(
            head.gate(hidden, torch.full((8,), 0.4), output).confidence,
            read.gate(hidden, torch.full((8,), 0.4), output).confidence,
        )
    del tensors["block_5.judge.hidden_bias"]
    with pytest.raises(ExitHeadError, match=r"block_5\.judge\.hidden_bias"):
        exits_from_tensors(tensors, exit_metadata(before))
    tensors = exit_tensors(before) | {"block_5.shortlist": torch.tensor([4, 4])}
    with pytest.raises(ExitHeadError, match="block_5: a shortlist's tokens must ascend"):
        exits_from_tensors(tensors, exit_metadata(before))


@pytest.mark.parametrize("kinds", [("rms", "rms"), ("layer", "layer")])
def test_heads_survive_the_bundle_names(kinds: tuple[NormKind, NormKind]) -> None:
    heads = [exit_head(kinds[0], block=9, seed=1), exit_head(kinds[1], block=4, seed=2, screen_ratio=1.0)]
    again = exits_from_tensors(exit_tensors(heads), exit_metadata(heads))
    assert [(head.name, head.depth) for head in again] == [("block_4", 5), ("block_9", 10)]
    output, hidden = CountingOutput(), torch.randn(8, HIDDEN)
    for before, after in zip(sorted(heads, key=lambda head: head.block), again, strict=True):
        thresholds = torch.full((8,), 0.4)
        assert torch.equal(
            before.gate(hidden, thresholds, output).confidence,
            after.gate(hidden, thresholds, output).confidence,
        )


def test_heads_that_are_incomplete_are_refused() -> None:
    heads = [exit_head()]
    tensors, metadata = exit_tensors(heads), exit_metadata(heads)
    with pytest.raises(ExitHeadError, match=r"incomplete: 'exits'"):
        exits_from_tensors(tensors, {})
    del tensors["block_3.adapter"]
    with pytest.raises(ExitHeadError, match=r"block_3\.adapter"):
        exits_from_tensors(tensors, metadata)


def test_shapes_and_settings_that_do_not_fit_are_refused() -> None:
    good = exit_head()
    with pytest.raises(ExitHeadError, match=r"block_3: adapter is \[2, 2\], it must be \[24, 24\]"):
        ExitHead(3, good.norm, torch.zeros(2, 2), good.probe, good.combine, 0.5)
    with pytest.raises(ExitHeadError, match=r"screen_ratio is 1\.5"):
        ExitHead(3, good.norm, good.adapter, good.probe, good.combine, 1.5)
