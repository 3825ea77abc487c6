"""Loaded models: what a bundle gives to a server, variant by variant, and what asking for more is answered with."""

import gc
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from exeunt.compression.bundle import BundleError, open_bundle
from exeunt.compression.bundle_format import JUDGED_VERSION, PLAIN_VERSION
from exeunt.compression.checkpoint_names import linear_shapes
from exeunt.compression.decoder import Decoder
from exeunt.compression.kv_format import page_bytes_for
from exeunt.compression.manifest import ExitRecord
from exeunt.compression.model import (
    LoadedModel,
    NotHeldError,
    load_bundle,
    load_plain_model,
)
from exeunt.compression.tokenizer import TokenizerError
from exeunt.compression.variant import Variant
from exeunt.kernels.int4_linear import dequantize, quantize
from tests.compression.decoder_twin import block_linears, resident_blocks
from tests.compression.paged_generation import chunked_logits
from tests.compression.small_bundles import GROUP, small_bundle, small_checkpoint

TEXT = torch.tensor([1, 5, 9, 100, 3, 3, 77])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Path:
    return small_bundle(tmp_path_factory.mktemp("both") / "bundle", checkpoint).path


@pytest.fixture(scope="module")
def model(bundle: Path) -> LoadedModel:
    return load_bundle(bundle)


def _logits(decoder: Decoder) -> Tensor:
    return chunked_logits(decoder, TEXT, [len(TEXT)])


def _tensors_alive() -> list[Tensor]:
    gc.collect()
    # not isinstance: that would ask every object for its __class__, which some deprecated ones answer with a warning
    return [each for each in gc.get_objects() if issubclass(type(each), Tensor)]


def test_it_holds_what_the_bundle_holds(model: LoadedModel) -> None:
    assert model.name == "small"
    assert set(model.variants) == {
        Variant(weights, kv, linear)
        for weights in ("int4", "full")
        for kv in ("int4", "full")
        for linear in (False, True)
    }
    assert len(model.variants) == 8
    assert [head.name for head in model.exits] == ["block_1"]
    assert model.tokenizer.decode([5]) == "w5"
    assert model.dtype == torch.float32
    assert model.default_variant == Variant("int4", "int4", False)


def test_each_exit_is_known_by_its_use(model: LoadedModel) -> None:
    assert model.manifest is not None
    assert (model.certified_exits, model.drafting_exit) == ((0,), None)  # as in a bundle without that choice
    late = replace(model.exits[0], block=2)
    first, second = (
        ExitRecord(block=1, name="block_1", agreement=0.5, certified=False, drafting=True),
        ExitRecord(block=2, name="block_2", agreement=0.6),
    )

    def uses(*records: ExitRecord) -> tuple[tuple[int, ...], int | None]:
        manifest = model.manifest.model_copy(update={"exits": records})  # type: ignore[union-attr]
        own = replace(model, exits=(model.exits[0], late), manifest=manifest)
        return own.certified_exits, own.drafting_exit

    assert uses(first, second) == ((1,), 0)
    assert uses(second, first) == ((1,), 0), "records may stand in any order"
    both = second.model_copy(update={"drafting": True})
    assert uses(first.model_copy(update={"certified": True, "drafting": False}), both) == ((0, 1), 1)


def test_full_weights_are_the_checkpoints(model: LoadedModel, checkpoint: Path) -> None:
    expected = _logits(Decoder.load(checkpoint))
    assert torch.equal(_logits(model.decoder(Variant("full", "full"))), expected)


def test_int4_weights_are_the_checkpoints_rounded(model: LoadedModel, checkpoint: Path) -> None:
    rounded = Decoder.load(checkpoint)
    for block in range(rounded.spec.blocks):
        for linear in block_linears(rounded, block).values():
            weight = linear.weight  # type: ignore[attr-defined]
            weight.copy_(dequantize(quantize(weight, GROUP), torch.float32))
    output = rounded._output.weight  # type: ignore[attr-defined]
    output.copy_(dequantize(quantize(output, GROUP), torch.float32))
    actual = _logits(model.decoder(Variant("int4", "full")))
    error = (actual - _logits(rounded)).norm() / actual.norm()
    assert error < 0.05  # a fast kernel may round activations; a wrong weight would give about 1
    assert (actual - _logits(model.decoder(Variant("full", "full")))).norm() / actual.norm() > 0.05


def test_the_linear_block_replaces_its_block(model: LoadedModel) -> None:
    replaced, whole = model.decoder(Variant("full", "full", True)), model.decoder(Variant("full", "full"))
    assert replaced.linear_block is not None
    assert replaced.linear_block.index == 2
    assert not torch.allclose(_logits(replaced), _logits(whole))
    page_bytes = page_bytes_for(model.spec, model.dtype)
    assert model.kv_layout(Variant("full", "full", True), page_bytes).blocks == (0, 1, 3)
    layout = model.kv_layout(Variant("full", "int4", False), page_bytes)
    assert (layout.format, layout.blocks) == ("int4", (0, 1, 2, 3))


def test_decoders_share_what_they_can(model: LoadedModel) -> None:
    full, int4 = model.decoder(Variant("full", "full")), model.decoder(Variant("int4", "full"))
    linear = model.decoder(Variant("int4", "full", True))
    assert full._embedding is int4._embedding is linear._embedding
    for shared, other in zip(resident_blocks(int4), resident_blocks(linear), strict=True):
        assert shared is other
    sizes = model.resident_bytes()
    assert sizes["embedding"] == full.resident_bytes()["embedding"]
    assert sizes["full"] == full.resident_bytes()["full"]
    assert sizes["int4"] == int4.resident_bytes()["int4"]
    assert sizes["linear_block"] > 0
    assert sizes["exits"] > 0


def test_a_bundle_with_a_shortlist_says_so_and_all_decoders_share_it(tmp_path: Path) -> None:
    checkpoint = small_checkpoint(tmp_path / "checkpoint")
    plain = small_bundle(tmp_path / "plain", checkpoint)
    listed = small_bundle(tmp_path / "listed", checkpoint, shortlist=(1, 5, 6, 20))
    assert open_bundle(plain.path).manifest.format_version == PLAIN_VERSION, "older readers take it"
    assert open_bundle(listed.path).manifest.format_version == JUDGED_VERSION > PLAIN_VERSION
    model = load_bundle(listed.path)
    shortlist = model.exits[0].shortlist
    assert shortlist is not None
    assert shortlist.ids.tolist() == [1, 5, 6, 20]
    assert len({id(decoder.project_exit.only(shortlist)) for decoder in model.decoders.values()}) == 1
    picked = model.decoder(Variant("int4", "full")).project_exit.only(shortlist)
    assert model.resident_bytes()["exit_shortlists"] == picked.linear.nbytes > 0
    assert load_bundle(plain.path).resident_bytes()["exit_shortlists"] == 0


def test_a_shortlist_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    checkpoint = small_checkpoint(tmp_path / "checkpoint")
    path = small_bundle(tmp_path / "bundle", checkpoint, shortlist=(1, 5, 1_000_000)).path
    with pytest.raises(BundleError, match="the shortlist of block_1 names token 1000000, the model has "):
        load_bundle(path)


@pytest.mark.parametrize("held", [("int4", "full"), ("int4",)])
def test_int4_alone_keeps_no_full_precision_weight(held: tuple[str, ...], tmp_path: Path) -> None:
    # heads wider than the model, so that no linear has the shape of an exit's adapter
    checkpoint = small_checkpoint(tmp_path / "checkpoint", head_dim=10)
    path = small_bundle(tmp_path / "bundle", checkpoint, held).path  # type: ignore[arg-type]
    others = {id(tensor): tensor for tensor in _tensors_alive()}
    model = load_bundle(path, weights="int4")
    decoder = model.decoder(Variant("int4", "int4"))
    sizes = decoder.resident_bytes()
    weights = sum(
        out * fan_in for _ in range(model.spec.blocks) for out, fan_in in linear_shapes(model.spec).values()
    )
    assert sizes["full"] == 0
    assert weights / 2 < sizes["int4"] < weights  # half a byte each, and scales
    shapes = set(linear_shapes(model.spec).values())
    loaded = [tensor for tensor in _tensors_alive() if id(tensor) not in others]
    assert any(tensor.dtype == torch.uint8 for tensor in loaded)  # the codes: this does see what was loaded
    assert not [tensor for tensor in loaded if tensor.is_floating_point() and tuple(tensor.shape) in shapes]
    assert set(model.decoders) == {("int4", False), ("int4", True)}


@pytest.mark.parametrize("family", ["gpt2", "qwen2", "qwen3"])
def test_a_bundle_of_int4_weights_only_equals_one_of_both(family: str, tmp_path: Path) -> None:
    checkpoint = small_checkpoint(tmp_path / "checkpoint", family)
    torch.manual_seed(0)
    both = load_bundle(small_bundle(tmp_path / "both", checkpoint).path, weights="int4")
    alone = load_bundle(small_bundle(tmp_path / "alone", checkpoint, ("int4",)).path)
    variant = Variant("int4", "int4")
    assert torch.equal(_logits(both.decoder(variant)), _logits(alone.decoder(variant)))


def test_shards_become_one_file(tmp_path: Path) -> None:
    checkpoint = small_checkpoint(tmp_path / "checkpoint", shard="60KB")
    assert len(list(checkpoint.glob("model-*.safetensors"))) > 1
    path = small_bundle(tmp_path / "bundle", checkpoint, ("full",)).path
    model = load_bundle(path)
    assert torch.equal(_logits(model.decoder(Variant("full", "full"))), _logits(Decoder.load(checkpoint)))
    assert model.default_variant == Variant("full", "int4", False)


def test_weights_that_the_bundle_lacks_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    path = small_bundle(tmp_path / "bundle", checkpoint, ("int4",)).path
    with pytest.raises(BundleError, match="holds no full weights, only int4"):
        load_bundle(path, weights="full")


def test_a_bundle_from_before_the_int4_output_matrix_loads_in_every_choice(
    checkpoint: Path, tmp_path: Path
) -> None:
    path = small_bundle(tmp_path / "bundle", checkpoint).path
    file = path / "weights.int4.safetensors"
    tensors = {name: tensor for name, tensor in load_file(file).items() if not name.startswith("output.")}
    save_file(tensors, file)
    _reseal(path)
    state = torch.randn(3, open_bundle(path).exits()[0].adapter.shape[0])
    for choice in ("both", "int4", "full"):
        model = load_bundle(path, weights=choice)
        for decoder in model.decoders.values():
            assert torch.equal(decoder.project_exit(state), decoder.project(state))
            assert decoder.output.format == "full"


@pytest.mark.parametrize("remembered", [True, False])
def test_a_bundle_that_contradicts_its_config_is_refused(
    bundle: Path, tmp_path: Path, remembered: bool
) -> None:
    wider = small_checkpoint(tmp_path / "wider", hidden_size=60)
    copy = small_bundle(tmp_path / "bundle", wider)
    # the parts of one bundle under the checksums of another: intact, and still wrong
    (copy.path / "config.json").write_bytes((bundle / "config.json").read_bytes())
    _reseal(copy.path, architecture=open_bundle(bundle).architecture() if remembered else None)
    with pytest.raises(BundleError, match="the config asks for"):
        load_bundle(copy.path)


def _reseal(path: Path, **changes: object) -> None:
    from exeunt.compression.bundle import file_sha256
    from exeunt.compression.manifest import FileRecord, manifest_json, read_manifest

    manifest = read_manifest((path / "manifest.json").read_text())
    files = {
        name: FileRecord(sha256=file_sha256(path / name), bytes=(path / name).stat().st_size)
        for name in manifest.files
    }
    (path / "manifest.json").write_text(
        manifest_json(manifest.model_copy(update={"files": files, **changes}))
    )
    open_bundle(path)


def test_variants_that_are_not_held_are_refused_with_those_that_are(model: LoadedModel, bundle: Path) -> None:
    int4 = load_bundle(bundle, weights="int4")
    with pytest.raises(
        NotHeldError, match=r"does not hold weights=full .* it holds weights=int4 kv_cache=int4"
    ):
        int4.decoder(Variant("full", "full"))
    assert model.decoder(Variant("full", "full")) is model.decoders["full", False]


def test_a_plain_model_runs_at_full_depth(checkpoint: Path) -> None:
    model = load_plain_model(checkpoint)
    assert model.name == checkpoint.name
    assert model.manifest is None
    assert model.exits == ()
    assert set(model.variants) == {Variant("full", "full"), Variant("full", "int4")}
    assert model.default_variant == Variant("full", "full")
    assert torch.equal(_logits(model.decoder(Variant("full", "int4"))), _logits(Decoder.load(checkpoint)))


def test_a_model_without_a_tokenizer_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((checkpoint / name).read_bytes())
    with pytest.raises(TokenizerError, match="no tokenizer"):
        load_plain_model(tmp_path)


def test_half_precision_is_kept_on_request(bundle: Path) -> None:
    model = load_bundle(bundle, dtype=torch.bfloat16)
    assert model.exits[0].adapter.dtype == torch.bfloat16
    linear_block = model.decoder(Variant("int4", "int4", True)).linear_block
    assert linear_block is not None
    assert linear_block.down.dtype == torch.bfloat16
    assert torch.isfinite(_logits(model.decoder(Variant("int4", "int4", True)))).all()
