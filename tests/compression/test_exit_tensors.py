"""Exit heads under the names of a bundle's tensors: what is written is read again, what does not fit is refused."""

from dataclasses import replace

import pytest
import torch

from exeunt.compression.bundle_format import CONFIRMED_VERSION, JUDGED_VERSION, PLAIN_VERSION
from exeunt.compression.exit_tensors import (
    exit_metadata,
    exit_tensors,
    exits_from_tensors,
    format_version,
)
from exeunt.compression.exits import ExitHead, ExitHeadError
from tests.compression.exit_heads import (
    HIDDEN,
    SHORTLIST,
    CountingOutput,
    NormKind,
    exit_confirmation,
    exit_head,
    exit_judge,
)


def test_judges_and_shortlists_survive_the_bundle_names() -> None:
    plain, listed = exit_head(block=1), replace(exit_head(block=5), judge=exit_judge(), shortlist=SHORTLIST)
    assert format_version([plain]) == PLAIN_VERSION
    assert format_version([plain, replace(plain, judge=exit_judge())]) == JUDGED_VERSION
    assert format_version([plain, replace(plain, shortlist=SHORTLIST)]) == JUDGED_VERSION
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


def test_confirmations_survive_the_bundle_names_and_are_refused_where_torn() -> None:
    listed = replace(exit_head(block=5), judge=exit_judge(), shortlist=SHORTLIST)
    confirmed = replace(listed, confirmation=exit_confirmation(0.85))
    assert format_version([listed]) == JUDGED_VERSION
    assert format_version([exit_head(), confirmed]) == CONFIRMED_VERSION
    assert "list_ratio" not in exit_metadata([listed])["exits"], "a bundle without is written as before"
    tensors, metadata = exit_tensors([confirmed]), exit_metadata([confirmed])
    (again,) = exits_from_tensors(tensors, metadata)
    assert again.confirmation is not None
    assert again.confirmation.list_ratio == 0.85
    hidden, output = torch.randn(30, HIDDEN, generator=torch.Generator().manual_seed(1)), CountingOutput()
    results = [head.gate(hidden, torch.full((30,), 0.4), output) for head in (confirmed, again, listed)]
    assert torch.equal(results[0].confidence, results[1].confidence)
    assert not torch.equal(results[0].confidence, results[2].confidence)
    for name in ("confirm.judge.hidden_bias", "confirm.combine"):
        torn = {place: tensor for place, tensor in tensors.items() if place != f"block_5.{name}"}
        with pytest.raises(ExitHeadError, match=rf"incomplete: 'block_5\.{name}'"):
            exits_from_tensors(torn, metadata)
    torn = {place: tensor for place, tensor in tensors.items() if ".confirm.judge." not in place}
    with pytest.raises(ExitHeadError, match="block_5: the confirmation has no judge"):
        exits_from_tensors(torn, metadata)
    with pytest.raises(ExitHeadError, match="incomplete: 'list_ratio'"):
        exits_from_tensors(tensors, exit_metadata([listed]))
    odd = metadata["exits"].replace("0.85", '"all"')
    with pytest.raises(ExitHeadError, match="block_5: list_ratio is 'all', it must be a number"):
        exits_from_tensors(tensors, {"exits": odd})


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


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"block_5.judge.top_weight": None}, r"no part of them: block_5\.judge\.hidden_bias"),
        (
            {"block_5.confirm.judge.top_weight": None, "block_5.confirm.combine": None},
            "the confirmation has no judge",
        ),
        ({"block_5.more": torch.zeros(2)}, r"no part of them: block_5\.more"),
        ({"block_5.combine": torch.zeros(4, dtype=torch.int8)}, r"block_5\.combine is torch\.int8"),
        ({"block_5.confirm.judge.output_bias": torch.tensor(torch.inf)}, "not finite"),
        ({"block_5.adapter": torch.full((HIDDEN, HIDDEN), torch.nan)}, r"block_5\.adapter holds a number"),
        ({"block_5.norm.weight": torch.tensor(1.0)}, "it must have one dimension"),
        ({"block_5.probe.hidden_bias": torch.tensor(1.0)}, "it must have one dimension"),
    ],
)
def test_tensors_that_no_exit_has_are_refused(change: dict[str, torch.Tensor | None], told: str) -> None:
    head = replace(
        exit_head(block=5), judge=exit_judge(), shortlist=SHORTLIST, confirmation=exit_confirmation(0.85)
    )
    tensors = {name: part for name, part in (exit_tensors([head]) | change).items() if part is not None}
    with pytest.raises(ExitHeadError, match=told):
        exits_from_tensors(tensors, exit_metadata([head]))


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ('"list_ratio": 0.85', '"list_ratio": true', "list_ratio is True"),
        ('"list_ratio": 0.85', '"list_ratio": 1' + 400 * "0", "too large"),
        ('"norm_eps": 1e-05', '"norm_eps": NaN', "norm_eps is nan"),
        ('"norm_eps": 1e-05', '"norm_eps": -1', "norm_eps is -1.0"),
        ('"screen_ratio"', '"screen"', "screen_ratio.* is missing"),
    ],
)
def test_settings_that_no_exit_has_are_refused(old: str, new: str, told: str) -> None:
    head = replace(
        exit_head(block=5), judge=exit_judge(), shortlist=SHORTLIST, confirmation=exit_confirmation(0.85)
    )
    metadata = {name: text.replace(old, new) for name, text in exit_metadata([head]).items()}
    assert metadata != exit_metadata([head])
    with pytest.raises(ExitHeadError, match=told):
        exits_from_tensors(exit_tensors([head]), metadata)
    with pytest.raises(ExitHeadError, match="cannot be read"):
        exits_from_tensors(exit_tensors([head]), dict.fromkeys(metadata, 100000 * "["))
