"""One look at every tensor before the long work."""

from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from exeunt.calibration.weight_check import check_weights
from exeunt.compression.architecture import Architecture
from exeunt.compression.checkpoint import Checkpoint, open_checkpoint
from exeunt.compression.checkpoint_names import block_shapes, shared_shapes
from exeunt.compression.weights import LazyTensors, WeightError
from tests.compression.reference_models import build_model, save


@pytest.fixture(scope="module", params=["gpt2", "llama", "qwen3"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp(request.param)
    return open_checkpoint(save(build_model(request.param, tie_word_embeddings=False), folder))


def test_a_sound_checkpoint_is_looked_at_whole(checkpoint: Checkpoint) -> None:
    seen: list[int] = []
    check_weights(checkpoint.weights(), checkpoint.spec, seen.append)
    assert seen == [1] * (checkpoint.spec.blocks + 1)


def test_nan_in_any_tensor_is_found_and_named(checkpoint: Checkpoint, tmp_path: Path) -> None:
    (file,) = checkpoint.files
    tensors, bad = load_file(file), tmp_path / "model.safetensors"
    assert len(tensors) > 4 * checkpoint.spec.blocks
    for place, (name, tensor) in enumerate(tensors.items()):
        spoilt = tensor.clone()
        spoilt.view(-1)[-1] = float("nan") if place % 2 else float("-inf")
        save_file({**tensors, name: spoilt}, bad)
        damaged = Checkpoint("", tmp_path, checkpoint.spec, (bad,))
        with pytest.raises(WeightError) as refusal:
            check_weights(damaged.weights(), checkpoint.spec)
        assert str(refusal.value).startswith(f"Tensor {name!r} holds NaN or infinity, ")


class _Plain:
    """A source without parts, one of whose tensors is missing or has another shape."""

    def __init__(self, spec: Architecture, changed: str, shape: tuple[int, ...] | None) -> None:
        self._spec, self._changed, self._shape = spec, changed, shape

    def shared(self) -> LazyTensors:
        return self._tensors(shared_shapes(self._spec), "")

    def block(self, index: int) -> LazyTensors:
        return self._tensors(block_shapes(self._spec), f"blocks.{index}.")

    def _tensors(self, shapes: dict[str, tuple[int, ...]], prefix: str) -> LazyTensors:
        def read(name: str) -> Tensor:
            changed = prefix + name == self._changed and self._shape is not None
            return torch.zeros(self._shape if changed and self._shape else shapes[name])

        names = [name for name in shapes if self._shape is not None or prefix + name != self._changed]
        return LazyTensors({name: partial(read, name) for name in names})


@pytest.mark.parametrize(
    ("name", "shape", "told"),
    [
        ("", None, None),
        ("blocks.3.down.weight", None, "'blocks.3.down.weight' is missing"),
        ("final_norm.weight", None, "'final_norm.weight' is missing"),
        (
            "blocks.2.out.weight",
            (48, 9),
            r"'blocks.2.out.weight' is \[48, 9\]; the config asks for \[48, ",
        ),
        ("embedding.tokens", (7, 48), r"'embedding.tokens' has 7 outputs; the config asks for \[131, 48\]"),
    ],
)
def test_what_any_source_lacks_is_named(
    checkpoint: Checkpoint, name: str, shape: tuple[int, ...] | None, told: str | None
) -> None:
    source = _Plain(checkpoint.spec, name, shape)
    if told is None:
        check_weights(source, checkpoint.spec)
    else:
        with pytest.raises(WeightError, match=told):
            check_weights(source, checkpoint.spec)
