"""Settings that cannot fit the model are refused before it is calibrated or loaded."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from exeunt.compression.architecture import load_architecture
from exeunt.deploy import packaged_model
from exeunt.deploy.expected_model import check_settings, expected_bundle
from exeunt.deploy.loading import SettingsError, Source
from exeunt.deploy.packaged import bundle_folder, calibration_options
from exeunt.server.api.offer import SKIPPED_KV
from exeunt.server.settings import given_settings, load_settings
from tests.compression.small_bundles import small_checkpoint
from tests.deploy.server_process import environment

LONGEST = 64
LINEAR = {"linear_block": True, "early_exit": {"mode": "approximate", "max_disagreement": 0.05}}


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint that is also the packaged model."""
    folder = small_checkpoint(tmp_path / "checkpoint", max_position_embeddings=LONGEST)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(packaged_model, "path", lambda: folder)
    return folder


def compression(**given: Any) -> dict[str, Any]:
    return {"default_compression": given}


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"max_model_len": LONGEST, "weights": "int4"},
        compression(**LINEAR),
        compression(weights="full", kv_cache="full", early_exit={"mode": "approximate", "threshold": 0.5}),
        {"weights": "full", **compression(early_exit=False)},
        compression(early_exit=True),
        {"exit_guard": True},
        {"longest_wait": 0.1, "scheduling": "queues"},
        compression(early_exit={"mode": "approximate", "skipped_kv": "backfill"}),
    ],
)
def test_what_the_calibrated_packaged_model_may_hold_is_let_through(checkpoint: Path, given: Any) -> None:
    check_settings(None, given_settings(given))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            {"max_model_len": LONGEST + 1},
            f"--max-model-len is {LONGEST + 1}; this model's limit is {LONGEST}",
        ),
        ({"kv_cache_memory": "999TiB"}, "--kv-cache-memory is .* ask for less"),
        ({"kv_cache_memory": "1kB"}, "--kv-cache-memory is 1000 bytes, which hold 0 tokens"),
        ({"max_num_seqs": 600}, "--max-num-batched-tokens is 512"),
        ({"device": "cuda:77"}, "--device is cuda:77"),
        ({"longest_wait": 0.05}, "--longest-wait is 0.05 and --scheduling run-through"),
        ({"exit_guard": True, "audit_share": 0.0}, "--exit-guard judges by audits, and --audit-share is 0"),
        (
            compression(early_exit={"mode": "verified", "threshold": 0.5}),
            "--default-compression: .*threshold has no use in mode 'verified'",
        ),
        (
            compression(early_exit={"mode": "approximate", "max_disagreement": 0.03}),
            "max_disagreement is 0.03; the packaged model is calibrated for 0.01, 0.02, 0.05, 0.1",
        ),
        (
            compression(early_exit={"mode": "approximate", "max_nll_increase": 0.03}),
            "max_nll_increase is 0.03; the packaged model is calibrated for 0.01, 0.02, 0.05, 0.1",
        ),
        ({"weights": "int4", **compression(weights="full")}, "compression.weights is 'full'"),
    ],
)
def test_what_it_cannot_hold_is_refused(checkpoint: Path, given: Any, words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        check_settings(None, given_settings(given))


def test_what_is_expected_is_what_calibration_is_asked_for(checkpoint: Path, tmp_path: Path) -> None:
    options = calibration_options(checkpoint, tmp_path)
    assert (options.weights, options.kv_cache, options.linear_block) == ("both", "int4", "auto")
    model = expected_bundle(checkpoint, given_settings({}))
    assert len(model.offer.variants) == 8
    assert model.offer.exits
    for method in SKIPPED_KV:
        assert {tuple(model.offer.certified(v, method)) for v in model.offer.variants} == {options.targets}
        for variant in model.offer.variants:
            found = model.offer.certified(variant, method, "max_nll_increase")
            assert tuple(found) == options.nll_targets


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"weights": "int4"}, "--weights is int4 .*exeunt calibrate"),
        ({"max_model_len": LONGEST + 1}, "--max-model-len"),
        (
            {"exit_guard": True},
            "--exit-guard raises the thresholds of certified targets, and this model has none",
        ),
        (compression(linear_block=True), "no linear block"),
        (compression(early_exit={"mode": "approximate"}), "'approximate' and the loaded model has no exits"),
    ],
)
def test_a_plain_model_is_looked_at_before_it_is_loaded(checkpoint: Path, given: Any, words: str) -> None:
    source = Source(str(checkpoint), is_bundle=False)
    check_settings(source, given_settings(compression(kv_cache="int4")))
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(SettingsError, match=words):
        check_settings(source, given_settings(given))


def test_a_wait_from_the_environment_is_given_too(monkeypatch: pytest.MonkeyPatch) -> None:
    source = Source("owner/name", is_bundle=False)
    check_settings(source, load_settings({}))
    monkeypatch.setenv("EXEUNT_LONGEST_WAIT", "0.05")
    with pytest.raises(SettingsError, match="--longest-wait"):
        check_settings(source, load_settings({}))


def test_what_only_loading_can_tell_is_left_to_it(tmp_path: Path) -> None:
    settings = given_settings({"max_model_len": 10**6})
    check_settings(Source("owner/name", is_bundle=False), settings)
    check_settings(Source(str(tmp_path), is_bundle=True), settings)


def test_a_packaged_model_that_is_calibrated_already_is_a_bundle(checkpoint: Path) -> None:
    bundle_folder().mkdir(parents=True)
    check_settings(None, given_settings({"max_model_len": 10**6}))


def test_the_packaged_model_itself_can_be_looked_at(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    longest = load_architecture(packaged_model.path()).max_position_embeddings
    check_settings(None, given_settings({"max_model_len": longest}))


def test_a_server_that_does_not_calibrate_has_not_what_calibration_needs() -> None:
    code = "import sys, exeunt.deploy.serve; sys.exit('scipy.stats' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=environment(), check=False).returncode == 0
