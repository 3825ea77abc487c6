"""From a checkpoint and a text to a bundle that opens, and says what was done."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from exeunt.calibration.evaluate import EvaluationOptions, evaluate
from exeunt.calibration.exit_placement import DraftingExit
from exeunt.calibration.pipeline import calibrate
from exeunt.calibration.presets import PRESETS
from exeunt.compression.bundle import FULL_WEIGHTS, INT4_WEIGHTS, open_bundle
from exeunt.compression.checkpoint_names import linear_names
from exeunt.compression.model import LoadedModel, load_bundle
from exeunt.compression.variant import Variant
from tests.calibration.conftest import EOS, VOCAB, byte_tokenizer
from tests.calibration.silent_progress import SilentProgress
from tests.calibration.tiny_calibration import Watched, options


@pytest.fixture(scope="module")
def made(
    checkpoint: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, Watched]]:
    """One calibration that several tests look at."""
    torch.set_num_threads(1)
    progress = Watched()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOURCE_DATE_EPOCH", "1700000000")
        out = tmp_path_factory.mktemp("made") / "bundle"
        yield calibrate(options(checkpoint, text_file, out), progress), progress


@pytest.fixture(scope="module")
def model(made: tuple[Path, Watched]) -> LoadedModel:
    return load_bundle(made[0], device="cpu")


def test_the_bundle_opens_and_says_what_was_done(made: tuple[Path, Watched], text_file: Path) -> None:
    manifest = open_bundle(made[0]).manifest
    assert manifest.weights == ("int4", "full")
    assert manifest.kv_cache == ("int4", "full")
    assert [(each.block, each.certified, each.drafting) for each in manifest.exits] == [
        (0, True, False),
        (1, False, True),
        (2, True, False),
    ]
    draft = manifest.exits[1].draft
    assert draft is not None
    assert draft.speed > 0
    assert 0 < draft.drafted <= 1
    assert [each.draft for each in manifest.exits] == [None, draft, None]
    assert manifest.calibration is not None
    assert manifest.calibration.data == text_file.name
    assert sum(manifest.calibration.splits.values()) == manifest.calibration.tokens <= 6000
    assert manifest.linear_block is not None
    assert len(manifest.linear_block.r2_by_block) == 4
    assert manifest.linear_block.parameters == 2 * 32 * manifest.linear_block.rank + 32
    assert {entry.variant for entry in manifest.risk_table} == {
        Variant(weights, kv, linear)
        for weights in ("int4", "full")
        for kv in ("int4", "full")
        for linear in (False, True)
    }
    assert [entry.skipped_kv for entry in manifest.risk_table] == ["backfill", "propagate"] * 8
    for entry in manifest.risk_table:
        assert [line.target for line in entry.targets] == [0.05, 0.3]
        for line in entry.targets:
            assert line.certified == (line.threshold is not None) == (line.reason is None)
    assert manifest.evaluation[0].name == "full/full"
    assert manifest.created.year == 2023


def test_it_loads_and_its_exits_run(model: LoadedModel) -> None:
    assert len(model.variants) == 8
    assert [head.block for head in model.exits] == [0, 1, 2]
    assert model.certified_exits == (0, 2)
    assert model.drafting_exit == 1


def test_the_report_stands_alone(made: tuple[Path, Watched]) -> None:
    page = (made[0] / "report.html").read_text()
    assert page.count("<svg") >= 4
    for outside in ("<script", "<link", "src=", "@import"):
        assert outside not in page
    assert "prefers-color-scheme: dark" in page
    for section in ("summary", "certificates", "exits", "drafting", "linear-block", "weights", "kv"):
        assert f'id="{section}"' in page, section
    assert ">None<" not in page
    record = json.loads((made[0] / "report.json").read_text())
    assert len(record["certificates"]) == 16
    assert record["evaluation"]["modes"][0]["perplexity"]["low"] > 1
    tried = {each["blocks"][0]: each["increase"]["value"] for each in record["linear_block"]["candidates"]}
    assert sorted(tried) == [0, 1, 2, 3]
    assert tried[record["linear_block"]["chosen"]] == min(tried.values())
    assert len(record["linear_block"]["together"]["blocks"]) == 3
    assert [each["use"] for each in record["exits"]] == ["certified", "drafts", "certified"]
    assert record["costs"]["in_units_of_a_block"] is None, "the exits were named"
    assert set(record["costs"]["in_units_of_a_token_of_one_stream"]["shallow"]) == {"1", "2", "3"}
    assert record["drafting"]["exit"] == "block_1"


def test_gates_of_an_exit_that_only_drafts_are_not_asked_for_certificates(made: tuple[Path, Watched]) -> None:
    record = json.loads((made[0] / "report.json").read_text())
    tested = [line for each in record["certificates"] for line in each["tested"]]
    assert tested
    assert all(len(line["by_exit"]) == 2 for line in tested)
    assert all(len(mode["by_exit"]) == 2 for mode in record["evaluation"]["modes"])


def test_progress_promises_what_it_does(made: tuple[Path, Watched]) -> None:
    _, progress = made
    assert set(progress.promised) == {
        "Checking the weights",
        "Quantising weights, collecting activations",
        "Loading the model",
        "Comparing linear blocks",
        "Trying other sizes of it",
        "Asking the full model",
        "Fitting where exit heads start",
        "Training exit heads",
        "Training exit gates",
        "Asking the gates",
        "Certifying thresholds",
        "Looking for looser thresholds",
        "Evaluating every mode",
        "Letting modes write",
        "Comparing roundings of weights",
        "Comparing forms of keys and values",
        "Hashing the checkpoint",
        "Writing the bundle",
    }
    early = {"Certifying thresholds", "Training exit heads"}  # sequences, and training, may end early
    for title, promised in progress.promised.items():
        if title in early:
            assert 0 < progress.done[title] <= promised
        else:
            assert progress.done[title] == promised, title
    assert any(note.startswith("linear block") for note in progress.notes)


@pytest.mark.parametrize(
    ("change", "phases"),
    [
        ({}, 18),
        ({"exits": "auto", "drafting_exit": "auto"}, 20),
        ({"weights": "full", "kv_cache": "full", "linear_block": "none", "drafting_exit": "none"}, 14),
        ({"studies": PRESETS["quick"]["studies"]}, 14),
    ],
)
def test_every_phase_says_which_of_how_many_it_is(
    checkpoint: Path, text_file: Path, tmp_path: Path, change: dict[str, Any], phases: int
) -> None:
    progress = Watched()
    calibrate(replace(options(checkpoint, text_file, tmp_path / "b"), **change), progress)
    assert progress.steps == [(number, phases) for number in range(1, phases + 1)]


def test_kernels_that_are_compiled_first_are_a_phase_more(
    checkpoint: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("exeunt.calibration.kernel_compilation.is_compiled", lambda: False)
    progress = Watched(stop_in="Compiling the CPU kernels, once")
    with pytest.raises(KeyboardInterrupt):
        calibrate(options(checkpoint, text_file, tmp_path / "b"), progress)
    assert progress.steps == [(1, 19), (2, 19)]


def test_that_nothing_is_certified_is_said(
    made: tuple[Path, Watched], checkpoint: Path, text_file: Path, tmp_path: Path
) -> None:
    progress = Watched()
    asked = replace(
        options(checkpoint, text_file, tmp_path / "b"), risk=(0.0001,), nll_risk=(), linear_block="none"
    )
    manifest = open_bundle(calibrate(asked, progress)).manifest
    assert not any(line.certified for entry in manifest.risk_table for line in entry.targets)
    (said,) = (note for note in progress.notes if note.startswith("No target is certified for any variant"))
    assert manifest.calibration is not None
    assert f"the certify split had {manifest.calibration.splits['certify']:,} tokens: give more text" in said
    assert str(manifest.risk_table[0].targets[0].reason) in said
    assert "None" not in said
    certified = any(
        line.certified for entry in open_bundle(made[0]).manifest.risk_table for line in entry.targets
    )
    assert certified != any(note.startswith("No target") for note in made[1].notes)


def test_full_weights_and_no_linear_block(checkpoint: Path, text_file: Path, tmp_path: Path) -> None:
    asked = replace(
        options(checkpoint, text_file, tmp_path / "b"), weights="full", kv_cache="full", linear_block="none"
    )
    bundle = open_bundle(calibrate(asked, SilentProgress()))
    assert bundle.manifest.weights == ("full",)
    assert bundle.manifest.kv_cache == ("full",)
    assert bundle.manifest.linear_block is None
    assert not (bundle.path / "weights.int4.safetensors").exists()
    assert {entry.variant for entry in bundle.manifest.risk_table} == {Variant("full", "full", False)}


def test_int4_weights_alone(model: LoadedModel, checkpoint: Path, text_file: Path, tmp_path: Path) -> None:
    asked = replace(options(checkpoint, text_file, tmp_path / "b"), weights="int4")
    bundle = open_bundle(calibrate(asked, SilentProgress()))
    assert bundle.manifest.weights == ("int4",)
    assert not (bundle.path / FULL_WEIGHTS).exists()
    spec = model.spec
    held = bundle.tensors(INT4_WEIGHTS)
    for block in range(spec.blocks):
        for name in linear_names(spec):
            assert f"blocks.{block}.{name}.codes" in held
            assert f"blocks.{block}.{name}.weight" not in held
    full = {name for name, tensor in held.items() if not name.endswith((".codes", ".scales", ".offsets"))}
    assert "embedding.tokens" in full
    assert all(held[name].ndim == 1 for name in full if name.startswith("blocks.")), "norms and biases"
    assert {entry.weights for entry in bundle.manifest.risk_table} == {"int4"}
    rows = bundle.manifest.evaluation
    assert [row.name for row in rows if row.weights == "full"] == ["full/full"], (
        "what the others are compared with"
    )
    alone = load_bundle(bundle.path, device="cpu")
    assert {variant.weights for variant in alone.variants} == {"int4"}
    hidden = torch.randn(3, spec.hidden_size)
    variant = Variant("int4", "full", False)
    assert torch.equal(alone.decoder(variant).head(hidden), model.decoder(variant).head(hidden))


def test_a_named_linear_block_is_taken(checkpoint: Path, text_file: Path, tmp_path: Path) -> None:
    asked = replace(options(checkpoint, text_file, tmp_path / "b"), linear_block=1)
    manifest = open_bundle(calibrate(asked, SilentProgress())).manifest
    assert manifest.linear_block is not None
    assert manifest.linear_block.index == 1


def test_evaluating_a_bundle_covers_its_modes(model: LoadedModel, text_file: Path) -> None:
    progress = Watched()
    options = EvaluationOptions(tokens=600, window=64, batch_tokens=256, generate=True)
    evaluation = evaluate(model, str(text_file), options, progress)
    table = evaluation.table
    assert {each.mode for each in evaluation.written} == {result.mode for result in table.results}
    assert evaluation.trade_off
    assert table.tokens <= 600
    assert {result.mode.variant for result in table.results} == set(model.variants)
    assert table.results[0].mode.name == "full/full"
    assert progress.done == progress.promised


def test_an_exit_is_chosen_to_draft_and_may_be_certified_too(
    checkpoint: Path, text_file: Path, tmp_path: Path
) -> None:
    asked = replace(options(checkpoint, text_file, tmp_path / "b"), exits="auto", drafting_exit="auto")
    made = open_bundle(calibrate(asked, SilentProgress()))
    drafting = [each for each in made.manifest.exits if each.drafting]
    record = json.loads((made.path / "report.json").read_text())
    assert [each.name for each in drafting] == [record["drafting"]["exit"]]
    best = max(record["drafting"]["candidates"], key=lambda each: each["speed"])
    assert best["name"] == drafting[0].name
    assert drafting[0].draft is not None
    assert best["speed"] == drafting[0].draft.speed
    assert any(each.certified for each in made.manifest.exits)
    assert record["costs"]["in_units_of_a_block"]["gate"] > 0


def test_a_model_in_bfloat16(checkpoint: Path, text_file: Path, tmp_path: Path) -> None:
    asked = replace(options(checkpoint, text_file, tmp_path / "b"), dtype=torch.bfloat16, exits=(2,))
    manifest = open_bundle(calibrate(asked, SilentProgress())).manifest
    assert manifest.exits[0].agreement > 0.3
    assert 1 < manifest.evaluation[0].perplexity < 10_000


def test_a_model_with_layer_norms_and_learned_positions(text_file: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    config = GPT2Config(
        vocab_size=VOCAB, n_positions=48, n_embd=32, n_layer=3, n_head=2, bos_token_id=EOS, eos_token_id=EOS
    )
    folder = tmp_path / "gpt2"
    GPT2LMHeadModel(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    asked = replace(options(folder, text_file, tmp_path / "b"), exits="auto")
    path = calibrate(asked, SilentProgress())
    model = load_bundle(path, device="cpu")
    assert [head.norm.kind for head in model.exits] == ["layer"] * len(model.exits)
    assert all(head.norm.bias is not None for head in model.exits)


@pytest.mark.parametrize(("drafting", "drafts"), [("none", 0), (1, 1), ("auto", 1)])
def test_no_exit_need_be_certified(
    checkpoint: Path, text_file: Path, tmp_path: Path, drafting: DraftingExit, drafts: int
) -> None:
    asked = replace(
        options(checkpoint, text_file, tmp_path / "b"), exits=(), drafting_exit=drafting, linear_block="none"
    )
    progress = Watched()
    bundle = open_bundle(calibrate(asked, progress))
    assert [(each.certified, each.drafting) for each in bundle.manifest.exits] == [(False, True)] * drafts
    assert (bundle.manifest.risk_table, bundle.manifest.nll_risk_table) == ((), ())
    assert {row.early_exit for row in bundle.manifest.evaluation} == {"off"}
    assert progress.steps[-1][0] == progress.steps[-1][1]
    assert load_bundle(bundle.path, device="cpu").certified_exits == ()
    page = (bundle.path / "report.html").read_text()
    assert ("drafts for the verified mode alone" in page) == (drafts > 0)
    assert ("There are no exits in this bundle" in page) == (drafts == 0)


def test_a_bundle_in_the_place_of_the_folder_that_one_stands_in(
    checkpoint: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "b").mkdir()
    monkeypatch.chdir(tmp_path / "b")
    asked = replace(options(checkpoint, text_file, Path(".")), work=Path("../work"))
    assert calibrate(asked, SilentProgress()) == tmp_path / "b"
    assert (tmp_path / "b" / "manifest.json").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
