"""What is told of a model's size before it is read is never more than what it then takes, and not much less."""

import json
from pathlib import Path

import pytest
import torch

from exeunt.compression.model import LoadedModel, WeightChoice, load_bundle, load_plain_model
from exeunt.deploy.weight_bytes import held_weights, least_weight_bytes
from tests.compression.small_bundles import small_bundle, small_checkpoint
from tests.deploy.server_process import byte_bundle

CPU = torch.device("cpu")


def _weights(model: LoadedModel) -> int:
    """Bytes of what was read, without what was made of it."""
    made = ("rope", "kv_projection", "exit_shortlists", "linear_block", "exits", "cuda_graphs")
    return sum(size for kind, size in model.resident_bytes().items() if kind not in made)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_bundle(tmp_path_factory.mktemp("weight_bytes"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, None])
@pytest.mark.parametrize("weights", ["int4", "full", "both"])
def test_a_bundles_weights(bundle: Path, weights: WeightChoice, dtype: torch.dtype | None) -> None:
    told = least_weight_bytes(bundle, weights, CPU, dtype, is_bundle=True)
    taken = _weights(load_bundle(bundle, weights=weights, dtype=dtype))
    assert told is not None
    assert 0.8 * taken < told <= taken


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "qwen2", "qwen3"])
def test_a_checkpoints_weights(tmp_path: Path, family: str) -> None:
    folder = small_checkpoint(tmp_path / "checkpoint", family)
    for dtype in (torch.float32, torch.bfloat16):
        taken = _weights(load_plain_model(folder, dtype=dtype))
        told = least_weight_bytes(folder, "both", CPU, dtype, is_bundle=False)
        assert told is not None
        assert 0.98 * taken < told <= taken  # norms of queries and keys are repeated for every head


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_bundle_of_int4_weights_alone(tmp_path: Path, family: str) -> None:
    bundle = small_bundle(
        tmp_path / "bundle", small_checkpoint(tmp_path / "checkpoint", family), ("int4",)
    ).path
    told = least_weight_bytes(bundle, "both", CPU, torch.float32, is_bundle=True)
    assert told == least_weight_bytes(bundle, "int4", CPU, torch.float32, is_bundle=True)
    assert told is not None
    assert 0.8 * _weights(load_bundle(bundle, dtype=torch.float32)) < told
    assert told <= _weights(load_bundle(bundle, dtype=torch.float32))
    assert (
        least_weight_bytes(bundle, "full", CPU, None, is_bundle=True) is None
    )  # loading says that it has none


def test_what_cannot_be_told_is_left_to_loading(bundle: Path, tmp_path: Path) -> None:
    for is_bundle in (False, True):
        for folder in (Path("owner/name"), tmp_path):
            assert least_weight_bytes(folder, "both", CPU, None, is_bundle=is_bundle) is None
    (tmp_path / "config.json").write_bytes((bundle / "config.json").read_bytes())
    text = (bundle / "manifest.json").read_text(encoding="utf-8")
    fields = json.loads(text)
    altered = ({"weights": 4}, {"weights": [{"a": 1}]}, {"int4_group_size": 1}, {"format_version": 99})
    for broken in (text[:100], "", *(json.dumps(fields | each) for each in altered)):
        (tmp_path / "manifest.json").write_text(broken, encoding="utf-8")
        assert held_weights(tmp_path) is None
        assert least_weight_bytes(tmp_path, "int4", CPU, None, is_bundle=True) is None
    (tmp_path / "manifest.json").write_text(text, encoding="utf-8")
    assert held_weights(tmp_path) == held_weights(bundle) is not None
