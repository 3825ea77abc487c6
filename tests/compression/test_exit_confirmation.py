"""Where a shortlist lets rows pass, all logits have the last word: who is asked, who leaves, and what it costs."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from exeunt.compression.bundle import open_bundle
from exeunt.compression.bundle_format import CONFIRMED_VERSION, JUDGED_VERSION
from exeunt.compression.exits import ExitHead, ExitHeadError, ExitJudge
from exeunt.compression.model import load_bundle
from exeunt.kernels.exit_gate.reference import gate_confidence_reference
from exeunt.kernels.native.library import native_library
from tests.compression.exit_heads import (
    HIDDEN,
    SHORTLIST,
    UNITS,
    VOCAB,
    CountingOutput,
    counted_output,
    exit_confirmation,
    exit_head,
    exit_judge,
    exit_outputs,
)
from tests.compression.small_bundles import small_bundle, small_checkpoint

needs_native = pytest.mark.skipif(
    native_library() is None, reason="needs the native kernels (a C++ compiler, and EXEUNT_NATIVE not 0)"
)


def confirming(list_ratio: float = 0.6, screen_ratio: float = 0.5, seed: int = 0) -> ExitHead:
    return replace(
        exit_head(screen_ratio=screen_ratio, seed=seed),
        judge=exit_judge(),
        shortlist=SHORTLIST,
        confirmation=exit_confirmation(list_ratio),
    )


def states(rows: int, seed: int = 5) -> Tensor:
    return torch.randn(rows, HIDDEN, generator=torch.Generator().manual_seed(seed))


def steps_of(head: ExitHead, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the probe, the shortlist's logits and all logits say of each row, every row asked everything: [T] each."""
    assert head.confirmation is not None
    assert head.judge is not None
    reading = head.inspect(hidden)
    logits = reading.state @ weight.T
    listed, confirmed = (
        gate_confidence_reference(reading.probe_logit, seen, combine, reading.units, judge.parts)
        for seen, combine, judge in (
            (logits[:, SHORTLIST.ids], head.combine, head.judge),
            (logits, head.confirmation.combine, head.confirmation.judge),
        )
    )
    return reading.probe_logit.sigmoid(), listed, confirmed


@pytest.mark.parametrize("list_ratio", [0.0, 0.6, 1.0])
def test_the_gate_follows_its_three_steps(list_ratio: float) -> None:
    head, output, hidden = confirming(list_ratio), CountingOutput(), states(60)
    thresholds = torch.linspace(0.2, 0.95, 60)
    thresholds[7] = math.inf
    probe, listed, confirmed = steps_of(head, hidden, output.weight)
    looked = probe >= thresholds * head.screen_ratio
    asked = looked & (listed >= thresholds * list_ratio)
    leaves = asked & (confirmed >= thresholds)
    result = head.gate(hidden, thresholds, output)
    assert result.looked.tolist() == looked.nonzero().flatten().tolist()
    assert result.whole.tolist() == asked.nonzero().flatten().tolist()
    assert result.leaves.tolist() == leaves.tolist()
    assert 0 < int(leaves.sum()) < int(asked.sum()), "some pass the list and are not confirmed"
    assert int(asked.sum()) == int(looked.sum()) if list_ratio == 0 else int(asked.sum()) < int(looked.sum())
    told = torch.where(asked, confirmed, listed).where(looked, torch.tensor(0.0))
    torch.testing.assert_close(result.confidence, told)
    assert torch.equal(result.leaves, looked & (result.confidence >= thresholds)), (
        "what is told says who leaves"
    )
    torch.testing.assert_close(result.logits, (head.read(hidden)[0] @ output.weight.T)[leaves])


def test_who_leaves_is_projected_onto_all_tokens_once() -> None:
    (output, asked), head, hidden = counted_output(), confirming(1.0), states(40)
    result = head.gate(hidden, torch.full((40,), 0.75), output)
    assert 0 < int(result.leaves.sum()) < len(result.whole) < len(result.looked) < 40
    assert asked == [(len(result.looked), len(SHORTLIST)), (len(result.whole), VOCAB)]
    asked.clear()
    nobody = replace(head, confirmation=exit_confirmation(1.0)).gate(hidden, torch.full((40,), 1.1), output)
    assert nobody.logits.shape[0] == len(nobody.whole) == 0
    assert all(outputs == len(SHORTLIST) for _, outputs in asked), (
        "nobody whom the list turns away is projected"
    )


@needs_native
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 40),
    screen_ratio=st.sampled_from([0.0, 0.4, 1.0]),
    list_ratio=st.sampled_from([0.0, 0.3, 0.8, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_one_native_call_decides_as_the_steps_do(
    seed: int, rows: int, screen_ratio: float, list_ratio: float, dtype: torch.dtype
) -> None:
    head = confirming(list_ratio, screen_ratio, seed).to("cpu", dtype)
    g = torch.Generator().manual_seed(seed)
    hidden, thresholds = torch.randn(rows, HIDDEN, generator=g).to(dtype), torch.rand(rows, generator=g)
    thresholds[torch.rand(rows, generator=g) < 0.1] = math.inf
    hidden[torch.rand(rows, generator=g) < 0.1, 3] = math.nan
    for output in exit_outputs(dtype):
        native = head.gate(hidden, thresholds, output)
        steps = head._gate(hidden, thresholds, output.__call__)
        assert native.looked.tolist() == steps.looked.tolist()
        assert native.whole.tolist() == steps.whole.tolist()
        assert native.leaves.tolist() == steps.leaves.tolist()
        assert torch.equal(native.confidence.nan_to_num(-1), steps.confidence.nan_to_num(-1))
        assert torch.equal(native.logits, steps.logits) or len(native.logits) == len(steps.logits) == 0
        assert not bool(native.leaves[thresholds.isinf() | hidden[:, 3].isnan()].any())


@needs_native
def test_the_native_gate_gives_a_row_the_same_bits_in_any_batch() -> None:
    head, hidden, thresholds = confirming(1.0), states(23), torch.full((23,), 0.75)
    for output in exit_outputs(torch.float32):
        together = head.gate(hidden, thresholds, output)
        leaving = together.leaves.nonzero().flatten().tolist()
        logits = dict(zip(leaving, together.logits, strict=True))
        assert 0 < len(leaving) < len(together.whole) < len(together.looked)
        for row in range(23):
            alone = head.gate(hidden[row : row + 1], thresholds[:1], output)
            assert float(alone.confidence[0]) == float(together.confidence[row])
            assert bool(alone.leaves[0]) == bool(together.leaves[row])
            assert len(alone.whole) == int(row in together.whole.tolist())
            if row in logits:
                assert torch.equal(alone.logits[0], logits[row])


def test_a_row_whose_other_logits_are_nan_passes_the_list_and_stays() -> None:
    head, output, hidden = confirming(), CountingOutput(), states(40)
    thresholds = torch.full((40,), 0.3)
    clean = head.gate(hidden, thresholds, output)
    row = int(clean.leaves.nonzero()[0])
    outside = next(token for token in range(VOCAB) if token not in SHORTLIST.ids.tolist())

    def project(state: Tensor) -> Tensor:
        logits = state @ output.weight.T
        logits[(state == head.read(hidden[row : row + 1])[0]).all(1), outside] = math.nan
        return logits

    spoilt = head.gate(hidden, thresholds, project)
    assert row in spoilt.whole.tolist()
    assert (spoilt.leaves != clean.leaves).nonzero().flatten().tolist() == [row]


def test_what_does_not_fit_is_refused() -> None:
    good, last = confirming(), exit_confirmation()
    with pytest.raises(ExitHeadError, match="a confirmation and no shortlist"):
        replace(good, shortlist=None)
    with pytest.raises(ExitHeadError, match=r"list_ratio is 1\.5, it must be in \[0, 1\]"):
        replace(good, confirmation=replace(last, list_ratio=1.5))
    with pytest.raises(ExitHeadError, match="list_ratio is nan"):
        replace(good, confirmation=replace(last, list_ratio=math.nan))
    with pytest.raises(ExitHeadError, match=r"confirm\.combine is \[3\], it must be \[4\]"):
        replace(good, confirmation=replace(last, combine=torch.zeros(3)))
    narrow = ExitJudge(torch.zeros(2, 3), torch.zeros(3), torch.zeros(3), torch.zeros(()))
    with pytest.raises(ExitHeadError, match=f"the confirmation's judge reads 3 units, the probe has {UNITS}"):
        replace(good, confirmation=replace(last, judge=narrow))
    torn = ExitJudge(torch.zeros(2, 3), torch.zeros(4), torch.zeros(3), torch.zeros(()))
    with pytest.raises(ExitHeadError, match="the judge's tensors are"):
        replace(good, confirmation=replace(last, judge=torn))
    with pytest.raises(ExitHeadError, match="block_3 has no confirmation"):
        exit_head().confirmed(exit_head().inspect(states(2)), torch.zeros(2, VOCAB))


def test_a_bundle_says_that_older_servers_must_not_read_it(tmp_path: Path) -> None:
    checkpoint = small_checkpoint(tmp_path / "checkpoint")
    listed = small_bundle(tmp_path / "listed", checkpoint, shortlist=(1, 5, 6, 20))
    confirmed = small_bundle(tmp_path / "confirmed", checkpoint, shortlist=(1, 5, 6, 20), list_ratio=0.9)
    assert open_bundle(listed.path).manifest.format_version == JUDGED_VERSION
    assert open_bundle(confirmed.path).manifest.format_version == CONFIRMED_VERSION > JUDGED_VERSION
    models = [load_bundle(bundle.path) for bundle in (listed, confirmed)]
    found = models[1].exits[0].confirmation
    assert found is not None
    assert found.list_ratio == 0.9
    assert models[0].exits[0].confirmation is None
    assert models[1].exits[0].nbytes > models[0].exits[0].nbytes
