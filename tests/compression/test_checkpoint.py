"""Checkpoints of every shape load alike; what is missing, misshapen, extra or not finite is refused by name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils import filter_repo_objects  # type: ignore[attr-defined]  # public, and not in its __all__
from safetensors.torch import load_file, save_file
from torch import Tensor

from exeunt.compression.architecture import UnsupportedModelError
from exeunt.compression.checkpoint import CheckpointError, open_checkpoint
from exeunt.compression.checkpoint_names import block_shapes, shared_shapes
from exeunt.compression.decoder import Decoder
from exeunt.compression.linear import FullLinear, Int4Linear, Linear
from exeunt.compression.weights import CanonicalWeights, WeightError
from exeunt.kernels.int4_linear import quantize
from tests.compression.decoder_twin import block_linears, twin
from tests.compression.paged_generation import chunked_logits
from tests.compression.reference_models import build_model, save

TOKENS = torch.arange(3, 20)
Tensors = dict[str, Tensor]


def _logits(directory: Path) -> Tensor:
    return chunked_logits(Decoder.load(directory, dtype=torch.float32), TOKENS, [17])


def _rewrite(directory: Path, change: Callable[[Tensors], Tensors]) -> None:
    file = directory / "model.safetensors"
    save_file(change(load_file(file)), file)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_sharded_and_single_files_hold_the_same_model(family: str, tmp_path: Path) -> None:
    model = build_model(family)
    single = save(model, tmp_path / "single")
    sharded = save(model, tmp_path / "sharded", max_shard_size="40KB")
    assert len(open_checkpoint(sharded).files) > 3
    assert torch.equal(_logits(single), _logits(sharded))
    open_checkpoint(sharded).files[1].unlink()
    with pytest.raises(CheckpointError, match="the checkpoint is incomplete"):
        open_checkpoint(sharded)


@pytest.mark.parametrize(("family", "prefix"), [("gpt2", "transformer."), ("llama", "model.")])
def test_names_with_and_without_the_familys_prefix_load(family: str, prefix: str, tmp_path: Path) -> None:
    directory = save(build_model(family, tie_word_embeddings=True), tmp_path)
    expected = _logits(directory)
    _rewrite(directory, lambda tensors: {name.removeprefix(prefix): each for name, each in tensors.items()})
    assert torch.equal(_logits(directory), expected)


def test_masks_and_frequencies_of_old_checkpoints_are_passed_over(tmp_path: Path) -> None:
    directory = save(build_model("gpt2"), tmp_path)
    expected = _logits(directory)
    extra = {"h.0.attn.bias": torch.ones(1, 1, 4, 4), "transformer.h.1.attn.masked_bias": torch.tensor(-1e4)}
    _rewrite(directory, lambda tensors: {**tensors, **extra})
    assert torch.equal(_logits(directory), expected)


def test_a_tied_output_matrix_may_be_repeated_but_not_differ(tmp_path: Path) -> None:
    directory = save(build_model("llama", tie_word_embeddings=True), tmp_path)
    expected = _logits(directory)
    _rewrite(
        directory, lambda tensors: {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    )
    assert torch.equal(_logits(directory), expected)
    _rewrite(directory, lambda tensors: {**tensors, "lm_head.weight": tensors["lm_head.weight"] + 1})
    with pytest.raises(WeightError, match="set tie_word_embeddings to false"):
        Decoder.load(directory)


def _drop(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: each for key, each in tensors.items() if key != name}


def _put(name: str, value: Callable[[Tensors], Tensor]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, name: value(tensors)}


def _with(name: str, number: float) -> Callable[[Tensors], Tensors]:
    def change(tensors: Tensors) -> Tensors:
        tensors[name].view(-1)[-1] = number
        return tensors

    return change


K_PROJ = "model.layers.1.self_attn.k_proj.weight"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_drop(K_PROJ), f"'{K_PROJ}' is missing"),
        (_drop("lm_head.weight"), "'lm_head.weight' is missing"),
        (_drop("model.embed_tokens.weight"), "'model.embed_tokens.weight' is missing"),
        (
            _put(K_PROJ, lambda _: torch.ones(16, 47)),
            rf"'{K_PROJ}' is \[16, 47\]; the config asks for \[16, 48\]",
        ),
        (
            _put("model.norm.weight", lambda _: torch.ones(48, dtype=torch.int8)),
            "'model.norm.weight' is torch.int8",
        ),
        (
            lambda tensors: {**tensors, K_PROJ: tensors[K_PROJ].to(torch.float8_e4m3fn)},
            f"'{K_PROJ}' is torch.float8_e4m3fn; weights must be .* float16, so give the full-precision",
        ),
        (_put("model.layers.1.self_attn.q_proj.bias", lambda _: torch.ones(48)), "q_proj.bias' has no place"),
        (
            _put("model.layers.4.mlp.up_proj.weight", lambda _: torch.ones(2)),
            "layers.4.mlp.up_proj.weight' has no",
        ),
        (_with(K_PROJ, float("nan")), f"'{K_PROJ}' holds NaN or infinity"),
        (
            _with("model.layers.3.mlp.down_proj.weight", float("inf")),
            "down_proj.weight' holds NaN or infinity",
        ),
        (_with("model.embed_tokens.weight", float("-inf")), "embed_tokens.weight' holds NaN or infinity"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(
    change: Callable[[Tensors], Tensors], reason: str, tmp_path: Path
) -> None:
    directory = save(build_model("llama"), tmp_path)
    _rewrite(directory, change)
    with pytest.raises(WeightError, match=reason):
        Decoder.load(directory)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_nan_is_found_in_every_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    directory = save(build_model("qwen2", dtype), tmp_path)
    assert Decoder.load(directory).dtype == dtype
    _rewrite(directory, _with("model.layers.0.self_attn.q_proj.bias", float("nan")))
    with pytest.raises(WeightError, match=r"q_proj.bias' holds NaN"):
        Decoder.load(directory)


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    directory = save(build_model("llama"), tmp_path)
    weights = directory / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(WeightError, match=r"model.safetensors cannot be read as safetensors"):
        Decoder.load(directory)
    weights.rename(directory / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"only as pytorch_model.bin; convert them to safetensors"):
        Decoder.load(directory)
    (directory / "pytorch_model.bin").unlink()
    with pytest.raises(CheckpointError, match=r"neither model.safetensors nor"):
        Decoder.load(directory)
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))
    with pytest.raises(CheckpointError, match="not a file beside it"):
        Decoder.load(directory)
    for shards, named in (({"a": 5}, "5"), ({"a": 5, "b": "x.safetensors"}, "5"), ({"a": [1]}, None)):
        index.write_text(json.dumps({"weight_map": shards}))
        with pytest.raises(
            CheckpointError, match=f"names {named}, which is not a file" if named else "not an index"
        ):
            Decoder.load(directory)
    for text in ("{}", "[" * 200_000):
        index.write_text(text)
        with pytest.raises(CheckpointError, match="not an index"):
            Decoder.load(directory)
    with pytest.raises(CheckpointError, match="neither a checkpoint directory nor a Hugging Face id"):
        Decoder.load(directory / "absent")


def test_loaded_weights_do_not_hang_on_the_file(tmp_path: Path) -> None:
    directory = save(build_model("llama"), tmp_path)
    decoder = Decoder.load(directory)
    expected = chunked_logits(decoder, TOKENS, [17])
    file = directory / "model.safetensors"
    with file.open("r+b") as handle:
        handle.write(b"\xff" * file.stat().st_size)
    assert torch.equal(chunked_logits(decoder, TOKENS, [17]), expected)


class _Hub:
    """huggingface_hub.snapshot_download over a local folder: copies what the patterns let through."""

    def __init__(self, source: Path, cache: Path) -> None:
        self.source, self.cache = source, cache
        self.downloaded: list[str] = []

    def __call__(self, repo_id: str, *, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        self.cache.mkdir(exist_ok=True)
        for path in self.source.rglob("*"):
            name = str(path.relative_to(self.source))
            if path.is_file() and list(
                filter_repo_objects([name], allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
            ):
                shutil.copy(path, self.cache / name)
                self.downloaded.append(name)
        return str(self.cache)


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "40KB"}])
def test_a_hub_id_brings_only_the_files_that_are_needed(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save(build_model("llama"), tmp_path / "source", **options)
    for name in (
        "pytorch_model.bin",
        "consolidated.safetensors",
        "README.md",
        "onnx/model.onnx",
        "onnx/config.json",
    ):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text("{}")
    hub = _Hub(source, tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    assert torch.equal(
        chunked_logits(Decoder.load("owner/name", dtype=torch.float32), TOKENS, [17]), _logits(source)
    )
    kinds = {Path(name).suffix for name in hub.downloaded}
    assert kinds == {".json", ".safetensors"}
    assert "consolidated.safetensors" not in hub.downloaded
    assert not any("onnx" in name for name in hub.downloaded)


@pytest.mark.parametrize(("name", "level"), [("owner/name", "INFO"), ("my-bundle", "WARNING")])
def test_it_is_said_that_the_hub_is_asked(
    name: str, level: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def offline(*asked: object, **how: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with caplog.at_level("INFO"), pytest.raises(CheckpointError):
        open_checkpoint(name)
    ((said, message),) = ((record.levelname, record.getMessage()) for record in caplog.records)
    assert said == level
    assert message == f"There is no folder {name} here, the Hugging Face Hub is asked for a model of that id."


def test_an_unsupported_hub_model_is_refused_before_its_weights_are_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps({"model_type": "mixtral"}))
    (source / "model.safetensors").write_bytes(b"gigabytes")
    hub = _Hub(source, tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    with pytest.raises(UnsupportedModelError, match="mixtral"):
        Decoder.load("owner/name")
    assert hub.downloaded == ["config.json"]


def test_a_hub_that_does_not_answer_gives_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> str:
        raise LocalEntryNotFoundError("Outgoing traffic has been disabled.\nMore lines follow.")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(CheckpointError) as refusal:
        Decoder.load("owner/name")
    assert str(refusal.value) == (
        "'owner/name' is no local directory, and the Hugging Face Hub did not give it either: "
        "Outgoing traffic has been disabled."
    )


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
def test_canonical_files_rebuild_full_and_int4_decoders(family: str, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"attention_bias": True} if family != "gpt2" else {}
    checkpoint = open_checkpoint(save(build_model(family, **changes), tmp_path / "model"))
    spec, weights = checkpoint.spec, checkpoint.weights()
    shared = {name: tensor.contiguous() for name, tensor in weights.shared().items()}
    assert {name: tuple(tensor.shape) for name, tensor in shared.items()} == shared_shapes(spec)
    full, int4 = dict(shared), dict[str, Tensor]()
    decoder = Decoder.load(tmp_path / "model")
    quantised: dict[int, dict[str, Linear]] = {}
    for block in range(spec.blocks):
        tensors = dict(weights.block(block))
        assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == block_shapes(spec)
        full |= {f"blocks.{block}.{name}": tensor.contiguous() for name, tensor in tensors.items()}
        quantised[block] = {}
        for name, linear in block_linears(decoder, block).items():
            assert isinstance(linear, FullLinear)
            packed = quantize(linear.weight, 16)
            int4 |= {
                f"blocks.{block}.{name}.{part}": getattr(packed, part)
                for part in ("codes", "scales", "offsets")
            }
            quantised[block][name] = Int4Linear(packed, linear.bias)
    save_file(full, tmp_path / "full.safetensors")
    save_file(int4, tmp_path / "int4.safetensors")

    again = Decoder.from_weights(spec, CanonicalWeights([tmp_path / "full.safetensors"]), dtype=torch.float32)
    assert torch.equal(chunked_logits(again, TOKENS, [17]), chunked_logits(decoder, TOKENS, [17]))
    source = CanonicalWeights([tmp_path / "full.safetensors", tmp_path / "int4.safetensors"])
    alone = Decoder.from_weights(spec, source, dtype=torch.float32, int4_group_size=16)
    beside = Decoder.from_weights(spec, source, dtype=torch.float32, int4_group_size=16, share_with=again)
    wanted = chunked_logits(twin(decoder, quantised), TOKENS, [17])
    assert torch.equal(chunked_logits(alone, TOKENS, [17]), wanted)
    assert torch.equal(chunked_logits(beside, TOKENS, [17]), wanted)
    assert beside._embedding is again._embedding
    assert alone._embedding is not again._embedding

    for name, reason in (("blocks.2.down.codes", "missing"), ("final_norm.weight", "missing")):
        pruned = {key: each for key, each in (full | int4).items() if key != name}
        save_file(pruned, tmp_path / "pruned.safetensors")
        with pytest.raises(WeightError, match=f"'{name}' is {reason}"):
            Decoder.from_weights(
                spec,
                CanonicalWeights([tmp_path / "pruned.safetensors"]),
                dtype=torch.float32,
                int4_group_size=16,
            )
    with pytest.raises(WeightError, match="INT4 scales are"):
        Decoder.from_weights(spec, source, dtype=torch.float32, int4_group_size=32)
