"""What the settings mean for a model: which one, on which device, under which limits."""

import re
from pathlib import Path

import pytest
import torch

from exeunt.compression.model import LoadedModel, load_bundle
from exeunt.deploy.loading import (
    SettingsError,
    Source,
    engine_config,
    find_source,
    load_model,
    resolve_device,
    resolve_dtype,
)
from exeunt.server.settings import load_settings
from tests.deploy.server_process import CONTEXT, byte_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_bundle(tmp_path_factory.mktemp("loading"))


@pytest.fixture(scope="module")
def model(bundle: Path) -> LoadedModel:
    return load_bundle(bundle)


def test_a_source_is_a_bundle_a_checkpoint_or_a_hub_id(bundle: Path, tmp_path: Path) -> None:
    assert find_source(str(bundle)) == Source(str(bundle), is_bundle=True)
    assert not find_source(str(bundle.parent / "checkpoint")).is_bundle
    for name in ("owner/name", "gpt2"):
        assert find_source(name) == Source(name, is_bundle=False)
    (tmp_path / "exits.safetensors").touch()
    assert find_source(str(tmp_path)).is_bundle  # opening it says what it lacks


@pytest.mark.parametrize(
    "gone",
    [
        *(
            "/nowhere",
            "./nowhere",
            "../owner/name",
            "~/nowhere",
            "a/b/c",
            "nowhere/",
            "owner/",
            "owner/na me",
        ),
        *("owner/weights.safetensors", "owner/model.gguf", "model.gguf"),
    ],
)
def test_what_is_no_folder_and_no_hub_id_is_not_looked_up(gone: str) -> None:
    with pytest.raises(SettingsError, match=f"There is no folder {re.escape(gone)}; .* such as owner/name"):
        find_source(gone)


def test_a_folder_must_hold_a_model(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"no manifest.json.* no config.json.*exeunt calibrate --out"):
        find_source(str(tmp_path))
    (tmp_path / "file").touch()
    with pytest.raises(SettingsError, match=r"file is a file; give the folder"):
        find_source(str(tmp_path / "file"))


def test_a_plain_model_has_no_int4_weights(bundle: Path) -> None:
    source = find_source(str(bundle.parent / "checkpoint"))
    with pytest.raises(SettingsError, match="exeunt calibrate"):
        load_model(source, load_settings({"weights": "int4"}))
    assert load_model(source, load_settings({"device": "cpu"})).manifest is None


def test_only_the_weights_asked_for_are_loaded(bundle: Path) -> None:
    loaded = load_model(find_source(str(bundle)), load_settings({"weights": "int4", "device": "cpu"}))
    assert {weights for weights, _ in loaded.decoders} == {"int4"}


def test_devices_and_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == torch.device("cpu")
    with pytest.raises(SettingsError, match=r"--device is cuda:1; .* no CUDA device .* use cpu or auto\."):
        resolve_device("cuda:1")
    for unknown in ("abc", "mps", "cuda:x", "CPU"):
        with pytest.raises(
            SettingsError, match=f"--device is {unknown}; it must be auto, cpu, cuda or cuda:N."
        ):
            resolve_device(unknown)
    assert resolve_dtype("bfloat16") is torch.bfloat16
    assert resolve_dtype("auto") is None


def test_the_engine_takes_the_models_length_and_memory_for_it(model: LoadedModel) -> None:
    config = engine_config(model, load_settings({"max_num_seqs": 4}))
    assert config.max_model_len == CONTEXT
    assert config.max_num_seqs == 4
    assert config.kv_cache_bytes <= 2**30
    assert engine_config(model, load_settings({"max_model_len": 100})).max_model_len == 100


def test_a_small_cache_shortens_what_was_not_asked_for(model: LoadedModel) -> None:
    config = engine_config(model, load_settings({"kv_cache_memory": "100kB"}))
    assert 2 <= config.max_model_len < CONTEXT
    assert config.kv_cache_bytes == 100_000


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"max_model_len": CONTEXT + 1}, ["--max-model-len", str(CONTEXT)]),
        ({"max_model_len": 3000, "kv_cache_memory": "100kB"}, ["--kv-cache-memory", "100000", "3000"]),
        (
            {"kv_cache_memory": "999TiB"},
            ["--kv-cache-memory", str(999 * 2**40), "bytes free", "ask for less"],
        ),
        ({"kv_cache_memory": "1kB"}, ["--kv-cache-memory", "0 tokens"]),
        ({"max_num_seqs": 600}, ["--max-num-batched-tokens", "512", "--max-num-seqs", "600"]),
    ],
)
def test_limits_that_cannot_be(model: LoadedModel, given: dict[str, object], words: list[str]) -> None:
    with pytest.raises(SettingsError) as caught:
        engine_config(model, load_settings(given))
    for word in words:
        assert word in str(caught.value)


def test_what_runs_on_a_gpu_is_as_asked(model: LoadedModel) -> None:
    default = engine_config(model, load_settings({}))
    assert (default.cuda_graphs, default.async_scheduling) == (True, True)
    changed = engine_config(model, load_settings({"enforce_eager": True, "async_scheduling": False}))
    assert (changed.cuda_graphs, changed.async_scheduling) == (False, False)
