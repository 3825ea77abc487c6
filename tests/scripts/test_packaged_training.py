"""Training of the packaged model on a tiny recipe: schedule, resumption, branches, export, sampling, card."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from scripts.packaged_model.card import card, verdict
from scripts.packaged_model.decoder import Decoder, build_model
from scripts.packaged_model.export import export, stage_model
from scripts.packaged_model.facts import gather
from scripts.packaged_model.measure import measure
from scripts.packaged_model.recipe import CPU, PRESETS, TINY, block_dropout, learning_share, split_of
from scripts.packaged_model.sampler import Sampler, documents, drawn
from scripts.packaged_model.tokenizer import train_tokenizer
from scripts.packaged_model.tokens import SOURCES, Batches, held_out_rows
from scripts.packaged_model.trainer import Trainer

STEPS = 6
CPU_DEVICE = torch.device("cpu")


def trainer(run: Path, stage: str, steps: int = STEPS) -> Trainer:
    return Trainer(run, TINY, stage, steps, CPU_DEVICE, compiled=False)  # type: ignore[arg-type]


def prepared(run: Path) -> Path:
    run.mkdir()
    texts = ["A small cat sat on the mat and looked at the old sea."] * 20
    train_tokenizer(texts, TINY.vocabulary, TINY.context).save_pretrained(run / "tokenizer")
    generator = np.random.default_rng(3)
    for source in SOURCES:
        for side in ("train", "held_out"):
            tokens = generator.integers(0, TINY.vocabulary, 1500).astype(np.uint16)
            tokens[::40] = 0
            np.save(run / f"{source}.{side}.npy", tokens)
    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with all three stages trained to their end."""
    run = prepared(tmp_path_factory.mktemp("runs") / "whole")
    for stage in ("trunk", "exits", "plain"):
        assert trainer(run, stage).train()
    return run


@pytest.mark.parametrize("stage", ["trunk", "exits"])
def test_resuming_gives_the_weights_of_an_uninterrupted_run(
    trained: Path, tmp_path: Path, stage: str
) -> None:
    run = prepared(tmp_path / "broken")
    if stage == "exits":
        (run / "trunk.pt").write_bytes((trained / "trunk.pt").read_bytes())
    while not (finished := trainer(run, stage).train(minutes=0)):
        pass  # every call makes one step and stops
    assert finished
    whole = stage_model(trained, TINY, stage).state_dict()  # type: ignore[arg-type]
    for name, tensor in stage_model(run, TINY, stage).state_dict().items():  # type: ignore[arg-type]
        assert torch.equal(tensor, whole[name]), name


def test_branches_start_alike_and_part(trained: Path) -> None:
    exits, plain = (torch.load(trained / f"{stage}.pt", weights_only=True) for stage in ("exits", "plain"))
    assert exits["first"] == plain["first"] == STEPS
    assert exits["step"] == plain["step"] == 2 * STEPS + TINY.long_steps
    assert any(not torch.equal(exits["model"][name], plain["model"][name]) for name in exits["model"])


def test_a_branch_without_a_trunk_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"trunk\.pt does not exist"):
        trainer(prepared(tmp_path / "run"), "plain")


def test_a_branch_may_change_its_length_only_before_the_decay(trained: Path, tmp_path: Path) -> None:
    run = prepared(tmp_path / "run")
    (run / "trunk.pt").write_bytes((trained / "trunk.pt").read_bytes())
    assert not trainer(run, "plain", steps=20).train(minutes=0)
    assert trainer(run, "plain", steps=40).steps == 40
    assert Trainer(run, TINY, "plain", None, CPU_DEVICE, compiled=False).steps == 20
    with pytest.raises(ValueError, match="too late"):
        trainer(trained, "plain", steps=STEPS + 1)


def test_a_branch_changes_the_mixture_and_goes_on_in_both_sources(tmp_path: Path) -> None:
    recipe = replace(TINY, windows=4, story_windows=1, branch_story_windows=3, trunk_split=1)
    batches = Batches(prepared(tmp_path / "run"), recipe)
    trunk, branch = (
        torch.cat([batches.batch(step, 1, first)[0] for step in range(4)]) for first in (None, 2)
    )
    assert torch.equal(branch[:8], trunk[:8])
    stories = [trunk[index] for index in (0, 4, 8, 12)]
    assert torch.equal(branch[8], stories[2])
    assert torch.equal(branch[9], stories[3])
    assert torch.equal(branch[11], trunk[9])


def test_learning_rate_warms_up_stays_and_falls_to_zero() -> None:
    recipe = replace(CPU, warmup_steps=10, decay_share=0.5)
    assert learning_share(recipe, "trunk", 0, 100) == pytest.approx(0.1)
    assert learning_share(recipe, "trunk", 50, 100) == 1
    branch = [learning_share(recipe, "exits", done, 100) for done in range(100)]
    assert branch == [learning_share(recipe, "plain", done, 100) for done in range(100)]
    assert branch[:49] == [1.0] * 49
    assert all(a > b > 0 for a, b in pairwise(branch[50:]))
    assert branch[-1] < 0.03
    long = [learning_share(recipe, "exits", 100 + done, 100) for done in range(recipe.long_steps)]
    assert long[0] < recipe.long_rate
    assert all(a > b > 0 for a, b in pairwise(long))


def test_rows_grow_to_the_whole_context() -> None:
    assert split_of(CPU, "trunk", 5, 10) == CPU.trunk_split
    recipe = replace(CPU, branch_split=2, long_share=0.15)
    assert [split_of(recipe, "exits", done, 100) for done in range(100)] == [2] * 85 + [1] * 15


def test_layer_dropout_grows_with_depth_and_only_where_exits_are_trained(trained: Path) -> None:
    drops = [block_dropout(CPU, block) for block in range(CPU.blocks)]
    assert drops[0] == 0
    assert drops[-1] == pytest.approx(CPU.layer_dropout)
    assert drops == sorted(drops)
    assert trainer(trained, "plain").sampled_exit(4) == (None, None)
    exits = trainer(trained, "exits")
    depths = set()
    for step in range(60):
        exits.step = step
        depth, keeps = exits.sampled_exit(4)
        assert depth is not None
        assert keeps is not None
        depths.add(depth)
        assert torch.equal(keeps[0], torch.ones(4, 1, 1))
        if step >= 2 * STEPS:  # the long steps drop nothing
            assert all(torch.equal(keep, torch.ones(4, 1, 1)) for keep in keeps)
        again = exits.sampled_exit(4)
        assert again[0] == depth
    shallowest, deepest = TINY.exit_depths
    assert depths == set(range(shallowest, deepest + 1))


def test_every_preset_suits_the_kernels() -> None:
    assert all(recipe.hidden % 64 == recipe.mlp % 64 == 0 for recipe in PRESETS.values())
    with pytest.raises(ValueError, match="multiples of 64"):
        replace(CPU, hidden=160)


def test_export_loads_in_transformers_with_the_same_logits(trained: Path, tmp_path: Path) -> None:
    export(trained, TINY, "exits", tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert AutoTokenizer.from_pretrained(tmp_path)("a cat").input_ids[0] == 0
    tokens = held_out_rows(trained, "novels", TINY.context)[:3, :-1]
    ours = Decoder(stage_model(trained, TINY, "exits"))
    with torch.no_grad():
        torch.testing.assert_close(
            ours.logits(ours.states(tokens)[-1]), theirs(tokens).logits, atol=2e-5, rtol=2e-5
        )


def test_sampling_follows_the_models_own_distribution(trained: Path) -> None:
    model = stage_model(trained, TINY, "exits")
    starts = torch.zeros(3, 2, dtype=torch.int64)
    rows = Sampler(model).rows(starts, 20, temperature=1e-6, seed=1)
    with torch.no_grad():
        greedy = model(rows).logits.argmax(-1)
    assert torch.equal(rows[:, 2:], greedy[:, 1:-1])
    assert torch.equal(Sampler(model).rows(starts, 20, 1.0, 5), Sampler(model).rows(starts, 20, 1.0, 5))
    assert list(documents(torch.tensor([[0, 4, 5, 0, 0, 6]]))) == [[4, 5], [6]]


def test_draws_have_the_frequencies_of_the_softmax() -> None:
    odds = torch.tensor([0.5, 0.0, 0.3, 0.2])
    tokens = drawn(odds.log().expand(20000, 4), torch.Generator().manual_seed(1))
    counts = torch.bincount(tokens, minlength=4) / 20000
    torch.testing.assert_close(counts, odds, atol=0.015, rtol=0)
    assert counts[1] == 0


def test_full_depth_agrees_with_itself() -> None:
    measured = measure(build_model(TINY), torch.randint(0, TINY.vocabulary, (5, 33)))
    assert measured.tokens == 160
    assert measured.agreement[-1] == 1
    assert len(measured.perplexity) == TINY.blocks


def test_card_tells_the_measured_numbers(trained: Path) -> None:
    facts = gather(
        trained,
        TINY,
        windows=4,
        calibration={"tokens": 12345, "seed": 9},
        hardware="two CPU cores",
        remark="",
        commands=["make it"],
    )
    text = card(facts)
    assert f"{facts['exits']['held_out']['novels']['perplexity'][-1]:.2f}" in text
    assert "12,345" in text
    assert facts["exits"]["parameters"] == sum(p.numel() for p in build_model(TINY).parameters())
    assert "NOT kept" in verdict({"stories": 1.01, "novels": 1.05})
    assert "NOT" not in verdict({"stories": 1.01, "novels": 0.99})
