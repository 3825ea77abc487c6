"""What the settings mean for a model: which one, on which device, under which limits."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from exeunt.compression.model import LoadedModel, load_bundle
from exeunt.deploy import loading
from exeunt.deploy.loading import (
    SettingsError,
    Source,
    engine_config,
    engine_limits,
    find_source,
    load_model,
    resolve_device,
    resolve_dtype,
    shape_of,
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


CUDA = torch.device("cuda", 0)


@pytest.fixture
def small_gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A GPU with 1000 free bytes, which nothing is loaded onto."""
    monkeypatch.setattr(loading, "find_device", lambda name: CUDA)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(loading, "free_bytes", lambda device: 1000)
    for load in ("load_bundle", "load_plain_model"):
        monkeypatch.setattr(loading, load, _loaded)
    return monkeypatch


def _loaded(*_: object, **__: object) -> LoadedModel:
    raise AssertionError("was loaded")


@pytest.mark.parametrize(
    ("given", "remedies"),
    [
        (
            {},
            "free some there, or serve the INT4 weights of a bundle alone (--weights int4), or choose another",
        ),
        ({"weights": "int4"}, "free some there, or choose another"),
    ],
)
def test_weights_that_do_not_fit_a_gpu_are_not_read(
    small_gpu: pytest.MonkeyPatch, bundle: Path, given: dict[str, object], remedies: str
) -> None:
    with pytest.raises(SettingsError) as caught:
        load_model(find_source(str(bundle)), load_settings(given))
    line = str(caught.value)
    assert re.match(rf"cuda:0 has 1000 bytes free, the weights of {bundle} need at least \d{{5,6}}: ", line)
    assert line.endswith(f": {remedies} --device.")


def test_a_checkpoint_that_does_not_fit_a_gpu_is_not_read(
    small_gpu: pytest.MonkeyPatch, bundle: Path
) -> None:
    source = find_source(str(bundle.parent / "checkpoint"))
    with pytest.raises(
        SettingsError, match=r"^cuda:0 has 1000 bytes free, the weights of .*checkpoint need at"
    ):
        load_model(source, load_settings({}))


def test_what_pytorch_keeps_for_later_is_given_back_before_free_bytes_are_counted(
    small_gpu: pytest.MonkeyPatch, bundle: Path
) -> None:
    free = [1000]
    small_gpu.setattr(torch.cuda, "empty_cache", lambda: free.append(2**30))
    small_gpu.setattr(loading, "free_bytes", lambda device: free[-1])
    with pytest.raises(AssertionError, match="was loaded"):
        load_model(find_source(str(bundle)), load_settings({}))


def test_memory_that_runs_out_while_loading_is_one_line(small_gpu: pytest.MonkeyPatch) -> None:
    def out(*_: object, **__: object) -> LoadedModel:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. And much more")

    small_gpu.setattr(loading, "load_plain_model", out)
    with pytest.raises(SettingsError) as caught:
        load_model(Source("owner/name", is_bundle=False), load_settings({}))
    assert str(caught.value) == (
        "owner/name does not fit cuda:0, which had 1000 bytes free before it was loaded: free some there, or serve "
        "the INT4 weights of a bundle alone (--weights int4), or choose another --device."
    )


@pytest.mark.parametrize(
    ("given", "least", "remedies"),
    [
        ({}, 2, "free some there, or serve the INT4"),
        ({"weights": "int4"}, 2, "free some there, or choose"),
        ({"max_model_len": 3000}, 3000, "lower --max-model-len, or free some there, or serve"),
    ],
)
def test_a_gpu_without_room_for_a_sequence_is_named_and_no_flag_that_nobody_gave(
    model: LoadedModel, small_gpu: pytest.MonkeyPatch, given: dict[str, object], least: int, remedies: str
) -> None:
    shape = replace(shape_of(model, load_settings({})), device=CUDA)
    with pytest.raises(SettingsError) as caught:
        engine_limits(shape, load_settings(given))
    line = str(caught.value)
    assert line.startswith(
        "cuda:0 has 1000 bytes free, of which keys and values take 800 at most, and a sequence of "
        f"{least} tokens needs "
    )
    assert f": {remedies}" in line
    assert line.endswith("choose another --device.")
    assert "--kv-cache-memory" not in line


def test_a_cache_that_was_asked_for_is_blamed_on_a_gpu_too(
    model: LoadedModel, small_gpu: pytest.MonkeyPatch
) -> None:
    shape = replace(shape_of(model, load_settings({})), device=CUDA)
    with pytest.raises(SettingsError, match=r"^--kv-cache-memory is 500 bytes, which hold 0 tokens"):
        engine_limits(shape, load_settings({"kv_cache_memory": "500"}))
    with pytest.raises(SettingsError, match=r"cuda:0 has 1000 bytes free, ask for less"):
        engine_limits(shape, load_settings({"kv_cache_memory": "2kB"}))


def test_a_machine_without_memory_is_named_too(model: LoadedModel, small_gpu: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        SettingsError, match=r"^this machine has 1000 bytes free, .* take 250 at most, .* alone \("
    ):
        engine_limits(shape_of(model, load_settings({})), load_settings({}))
