"""What `exeunt inspect` prints and its JSON form, on a small bundle."""

import json
import re
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from exeunt.compression.bundle import Bundle, open_bundle
from exeunt.compression.bundle_weights import checkpoint_tensors, int4_tensors, tensors_beside_int4
from exeunt.compression.bundle_writer import BundleContents, write_bundle
from exeunt.compression.checkpoint import open_checkpoint
from exeunt.compression.checkpoint_names import linear_names
from exeunt.compression.manifest import (
    BaseModelRecord,
    CalibrationRecord,
    DraftRecord,
    EvaluationRow,
    ExitRecord,
    LinearBlockRecord,
    Manifest,
    NllRiskEntry,
    NllRiskTarget,
    RiskEntry,
    RiskTarget,
)
from exeunt.compression.variant import WeightFormat
from exeunt.deploy.inspect import describe, file_sizes, kind_sizes, render, savings
from exeunt.kernels.int4_linear import quantize

HIDDEN, INNER, BLOCKS, VOCAB, GROUP = 32, 64, 3, 50, 16
LINEAR_WEIGHTS = BLOCKS * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * INNER)
HEADINGS = ("bundle", "model", "holds", "Files", "What INT4 saves", "Exits", "Thresholds", "Evaluation")
OUTSIDE = VOCAB * HIDDEN + (2 * BLOCKS + 1) * HIDDEN


def _manifest(weights: tuple[WeightFormat, ...]) -> Manifest:
    targets = (
        RiskTarget(target=0.01, certified=False, tokens=12, reason="only 12 tokens left early"),
        RiskTarget(
            target=0.05,
            certified=True,
            threshold=0.9312,
            exit_rate=0.231,
            disagreement=0.031,
            upper_bound=0.047,
            tokens=4321,
        ),
    )
    return Manifest(
        created=datetime(2026, 1, 2, 3, 4, tzinfo=UTC),
        exeunt_version="0.1.0",
        base_model=BaseModelRecord(
            name="tiny", architecture="llama", sha256="ab" * 32, parameters=12345, blocks=BLOCKS
        ),
        weights=weights,
        kv_cache=("int4", "full"),
        int4_group_size=GROUP,
        exits=(
            ExitRecord(
                block=0,
                name="block_0",
                agreement=0.375,
                certified=False,
                drafting=True,
                draft=DraftRecord(threshold=0.4, length=3, drafted=0.55, acceptance=0.725, speed=0.913),
            ),
            ExitRecord(block=1, name="block_1", agreement=0.625, auc=0.8, tokens=1000),
        ),
        risk_table=(
            RiskEntry(
                weights="int4", kv_cache="int4", linear_block=False, skipped_kv="propagate", targets=targets
            ),
        ),
        evaluation=(
            EvaluationRow(
                name="approximate, 5 %",
                weights="int4",
                kv_cache="int4",
                linear_block=False,
                early_exit="approximate",
                perplexity=12.5,
                kl=0.0123,
                mean_depth=2.75,
                exit_rate=0.25,
                tokens=9000,
            ),
        ),
        calibration=CalibrationRecord(
            data="novels.txt",
            sha256="cd" * 32,
            tokens=3000,
            splits={"fit": 2000, "certify": 1000},
            seed=7,
            origin="written by the model itself",
        ),
        versions={"torch": "2.13.0"},
    )


def _bundle(folder: Path, weights: tuple[WeightFormat, ...]) -> Bundle:
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "checkpoint")
    checkpoint = open_checkpoint(folder / "checkpoint")
    spec, source = checkpoint.spec, checkpoint.weights()
    int4 = int4_tensors(
        {
            (index, name): quantize(source.block(index)[f"{name}.weight"], GROUP)
            for index in range(BLOCKS)
            for name in linear_names(spec)
        },
        quantize(source.shared()["embedding.tokens"], GROUP),
    )
    manifest = _manifest(weights).model_copy(update={"exits": ()})
    contents = BundleContents(
        checkpoint=checkpoint.directory,
        manifest=manifest,
        full=checkpoint_tensors(checkpoint.files) if "full" in weights else None,
        int4=int4 if "full" in weights else int4 | dict(tensors_beside_int4(spec, source)),
        linear_block=None,
        exits=(),
        report_html="<p>",
        report_json="{}",
    )
    bundle = write_bundle(folder / "bundle", contents)
    # the exits' records are shown, their tensors are not looked at
    return Bundle(bundle.path, bundle.manifest.model_copy(update={"exits": _manifest(weights).exits}))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return _bundle(tmp_path_factory.mktemp("inspect"), ("int4", "full"))


def _printed(bundle: Bundle, width: int = 150) -> str:
    console = Console(width=width, record=True, file=None, force_terminal=False, quiet=False)
    with console.capture() as capture:
        console.print(render(bundle))
    return capture.get()


def test_the_dtype_of_full_weights_is_named_for_a_cpu_has_another(bundle: Bundle) -> None:
    assert savings(bundle).dtype == "bfloat16"
    said = "Full ones in bfloat16, the checkpoint's dtype; a CPU serves in float32 unless told otherwise, twice as many"
    assert said in _printed(bundle)


def test_sizes_are_those_on_the_disk(bundle: Bundle) -> None:
    on_disk = {path.name: path.stat().st_size for path in bundle.path.iterdir()}
    assert {file.name: file.bytes for file in file_sizes(bundle)} == on_disk
    assert sum(kind_sizes(bundle).values()) == sum(on_disk.values())
    assert kind_sizes(bundle)["report"] == 5
    assert list(kind_sizes(bundle).values()) == sorted(kind_sizes(bundle).values(), reverse=True)


def test_savings_are_those_of_the_tensors(bundle: Bundle) -> None:
    saved = savings(bundle)
    groups = LINEAR_WEIGHTS // GROUP
    assert saved.linear_full == 2 * LINEAR_WEIGHTS
    assert saved.linear_int4 == LINEAR_WEIGHTS // 2 + 2 * 2 * groups
    assert saved.model_full == saved.linear_full + 2 * OUTSIDE
    output = VOCAB * HIDDEN
    assert saved.model_int4 == saved.linear_int4 + output // 2 + 2 * 2 * (output // GROUP) + 2 * OUTSIDE
    assert saved.kv_full == 2 * 2 * BLOCKS * HIDDEN
    assert saved.kv_int4 == 2 * BLOCKS * (HIDDEN // 2 + 4 * 4)


def test_savings_do_not_depend_on_whether_full_weights_are_beside(bundle: Bundle, tmp_path: Path) -> None:
    assert savings(_bundle(tmp_path, ("int4",))) == savings(bundle)


def test_int4_alone_is_said_to_be_alone(tmp_path: Path) -> None:
    alone = _bundle(tmp_path, ("int4",))
    assert "int4 weights (groups of 16), no full-precision copy of them;" in _printed(alone)
    assert describe(alone)["manifest"]["weights"] == ["int4"]  # type: ignore[index]
    assert "weights, full" not in kind_sizes(alone)


def test_everything_is_shown(bundle: Bundle) -> None:
    text = _printed(bundle)
    for expected in (
        "tiny (llama, 3 blocks, 12,345 parameters)",
        "int4 and full weights (groups of 16); int4 and full KV; 2 exits",
        "2026-01-02 03:04 UTC by Exeunt 0.1.0",
        "novels.txt, 3,000 tokens (fit 2,000, certify 1,000), seed 7; written by the model itself",
        "torch 2.13.0",
        "weights.int4.safetensors",
        "linear weights of the blocks",
        "2.67×",
        "2 of 3",
        "62.5 %",
        "block_0 drafts up to 3 in a row where its gate says 0.4000: 55 % of the tokens, 72.5 % of them rightly",
        "expected 0.91× the speed without drafts",
        "Thresholds certified at 95%, by disagreement; in brackets what leaves (propagate)",
        "0.9312 (23 %)",
        "not certified: int4/int4, 1 %: only 12 tokens left early",
        "approximate, 5 %",
        "12.500",
    ):
        assert expected in text


def test_the_linear_block_is_named_with_what_it_saves(bundle: Bundle) -> None:
    record = LinearBlockRecord(index=1, rank=8, r2=0.912, parameters=544, replaced_parameters=10304)
    with_block = Bundle(bundle.path, bundle.manifest.model_copy(update={"linear_block": record}))
    assert "block 1 as a linear map of rank 8 (R² 0.912, 544 for 10,304 parameters)" in _printed(
        with_block, 300
    )


def test_an_exits_use_is_shown(bundle: Bundle) -> None:
    lines = _printed(bundle).splitlines()
    uses = {line.split()[0]: line.split()[1] for line in lines if re.match(r" *block_\d +\w+ +\d of 3", line)}
    assert uses == {"block_0": "drafts", "block_1": "certified"}


def test_exits_without_a_certificate_are_not_called_certified(bundle: Bundle) -> None:
    entry = bundle.manifest.risk_table[0]
    failed = entry.targets[0]
    both = (failed, failed.model_copy(update={"target": 0.05}))
    nothing = tuple(
        entry.model_copy(update={"weights": weights, "targets": both}) for weights in ("int4", "full")
    )
    text = _printed(Bundle(bundle.path, bundle.manifest.model_copy(update={"risk_table": nothing})))
    assert re.search(r"block_1 +tested, no target certified +2 of 3", text)
    assert failed.reason is not None
    assert text.count(failed.reason) == 1, "one reason is told once"
    rows = "int4/int4, 1 %; int4/int4, 5 %; full/int4, 1 %; full/int4, 5 %"
    assert f"not certified: {rows}: {failed.reason}" in " ".join(text.split())


def test_a_narrow_terminal_is_enough(bundle: Bundle) -> None:
    text = _printed(bundle, width=80)
    assert max(len(line) for line in text.splitlines()) <= 80
    lines = text.splitlines()
    assert len(lines) < 80  # no column is folded to a letter a line
    for expected in ("0.9312", "not certified: int4/int4, 1 %: only 12", "approximate"):
        assert expected in text


def test_what_it_is_comes_first_and_certificates_take_a_line_a_variant(bundle: Bundle) -> None:
    entry = bundle.manifest.risk_table[0]
    more = tuple(
        entry.model_copy(update={"weights": weights, "kv_cache": kv_cache, "linear_block": linear})
        for weights in ("int4", "full")
        for kv_cache in ("int4", "full")
        for linear in (False, True)
    )
    shown = _printed(
        Bundle(bundle.path, bundle.manifest.model_copy(update={"risk_table": more}))
    ).splitlines()
    first = [next(n for n, line in enumerate(shown) if line.startswith(word)) for word in HEADINGS]
    assert first == sorted(first)
    assert sum("0.9312" in line for line in shown) == 8
    text = " ".join(" ".join(shown).split())
    assert text.count("full/int4 linear") == 2  # its thresholds, and that one is missing


def test_certificates_that_say_the_same_are_shown_once(bundle: Bundle) -> None:
    (entry,) = bundle.manifest.risk_table
    alike = entry.model_copy(update={"skipped_kv": "backfill"})
    other = alike.model_copy(update={"targets": entry.targets[1:]})

    def shown(*table: RiskEntry) -> str:
        return _printed(Bundle(bundle.path, bundle.manifest.model_copy(update={"risk_table": table})))

    once = shown(alike, entry)
    assert "(backfill or propagate)" in once
    assert once.count("0.9312") == 1
    twice = shown(other, entry)
    assert "(backfill)" in twice
    assert "(propagate)" in twice
    assert twice.count("0.9312") == 2


def test_the_second_risk_has_a_table_of_its_own(bundle: Bundle) -> None:
    targets = (
        NllRiskTarget(target=0.01, certified=False, reason="only 3 tokens left"),
        NllRiskTarget(target=0.05, certified=True, threshold=0.8125, exit_rate=0.125, upper_bound=0.04),
    )
    entries = [
        NllRiskEntry(
            weights=weights,
            kv_cache="int4",
            linear_block=False,
            skipped_kv="backfill",
            targets=targets,
            clip=3.0,
        )
        for weights in ("int4", "full")
    ]
    other = entries[0].model_copy(update={"skipped_kv": "propagate", "targets": targets[:1]})
    table = (*entries, other)
    text = _printed(Bundle(bundle.path, bundle.manifest.model_copy(update={"nll_risk_table": table})), 200)
    title = "by rise of the mean NLL (a token's clipped at 3), nats per token; in brackets what leaves"
    assert f"Thresholds certified at 95%, {title} (backfill)" in text
    assert f"{title} (propagate)" in text
    assert re.search(r"weights/KV +0.01 +0.05", text)
    assert re.search(r"full/int4 +- +0.8125 \(12 %\)", text)
    assert "not certified: int4/int4, 0.01; full/int4, 0.01: only 3 tokens left" in text
    assert "0.9312" in text  # the first risk's table is there as before


def test_shares_near_all_are_numbers_that_people_read(bundle: Bundle) -> None:
    (entry,) = bundle.manifest.risk_table
    failed, certified = entry.targets
    for share, shown in ((0.994, "99 %"), (0.995, "99.5 %"), (0.998, "99.8 %"), (1.0, "100 %")):
        targets = (failed, certified.model_copy(update={"exit_rate": share}))
        table = (entry.model_copy(update={"targets": targets, "confidence": 0.999}),)
        text = _printed(Bundle(bundle.path, bundle.manifest.model_copy(update={"risk_table": table})))
        assert f"0.9312 ({shown})" in text
        assert "certified at 99.9%" in text


def test_what_a_terminal_would_obey_is_shown_and_markup_is_words(bundle: Bundle) -> None:
    evil, shown = "\x1b]0;t\x07[red]\u202e\x9b2J\r\n\udc9b", r"\x1b]0;t\x07[red]\u202e\x9b2J\r\n\udc9b"
    manifest = bundle.manifest
    (entry,) = manifest.risk_table
    assert manifest.calibration is not None
    failed = entry.targets[0].model_copy(update={"reason": f"5{evil}"})
    changed = manifest.model_copy(
        update={
            "base_model": manifest.base_model.model_copy(update={"name": f"0{evil}"}),
            "versions": {f"1{evil}": "2"},
            "calibration": manifest.calibration.model_copy(update={"data": f"2{evil}", "origin": f"3{evil}"}),
            "exits": tuple(each.model_copy(update={"name": f"4{evil}"}) for each in manifest.exits),
            "risk_table": (entry.model_copy(update={"targets": (failed,)}),),
            "evaluation": tuple(each.model_copy(update={"name": f"6{evil}"}) for each in manifest.evaluation),
            "files": {f"7{evil}": record for record in manifest.files.values()},
        }
    )
    text = _printed(Bundle(bundle.path, changed), 300)
    for number in range(8):
        assert f"{number}{shown}" in text
    assert all(each.isprintable() for line in text.split("\n") for each in line)


def test_the_json_form_holds_the_same(bundle: Bundle) -> None:
    described = json.loads(json.dumps(describe(bundle)))
    assert described["manifest"]["risk_table"][0]["targets"][1]["threshold"] == 0.9312
    assert described["bytes"] == sum(path.stat().st_size for path in bundle.path.iterdir())
    assert described["savings"]["kv_int4"] == savings(bundle).kv_int4
    assert open_bundle(bundle.path).manifest.base_model.name == described["manifest"]["base_model"]["name"]
