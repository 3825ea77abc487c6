"""A bundle's weight files: what calibration puts into them, and what a decoder reads from them.

`weights.safetensors` holds the checkpoint's own tensors, names and dtype. `weights.int4.safetensors` holds canonical
names (`exeunt.compression.checkpoint_names`): every block's linears and the output matrix as codes, scales and offsets
and, in a bundle with no full weights, all other tensors in the checkpoint's dtype beside them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from exeunt.compression.architecture import Architecture
from exeunt.compression.bundle import FULL_WEIGHTS, INT4_WEIGHTS, Bundle
from exeunt.compression.checkpoint_names import is_derived, linear_names
from exeunt.compression.weights import CanonicalWeights, CheckpointWeights, LazyTensors, WeightSource
from exeunt.kernels.int4_linear import Int4Weight


def int4_tensors(
    weights: Mapping[tuple[int, str], Int4Weight], output: Int4Weight | None = None
) -> dict[str, Tensor]:
    """The tensors of INT4 linears, keyed by (block, canonical name of the linear), under their bundle names.

    `output` is the output matrix, where that is INT4 too.
    """
    named = {f"blocks.{block}.{name}.": weight for (block, name), weight in weights.items()}
    if output is not None:
        named["output."] = output
    tensors: dict[str, Tensor] = {}
    for prefix, weight in named.items():
        tensors[prefix + "codes"] = weight.codes
        tensors[prefix + "scales"] = weight.scales
        tensors[prefix + "offsets"] = weight.offsets
    return tensors


def tensors_beside_int4(spec: Architecture, weights: WeightSource) -> Mapping[str, Tensor]:
    """Everything of a model that INT4 does not replace, lazily: embeddings, norms, biases.

    What an INT4 file needs to stand alone; `weights` is the checkpoint's.
    """
    shared = weights.shared()
    loaders: dict[str, Callable[[], Tensor]] = {
        name: partial(shared.__getitem__, name) for name in shared if name != "output.weight"
    }
    quantised = {f"{name}.weight" for name in linear_names(spec)}
    for index in range(spec.blocks):
        block = weights.block(index)
        loaders |= {
            f"blocks.{index}.{name}": partial(block.__getitem__, name)
            for name in block
            if name not in quantised
        }
    return LazyTensors(loaders)


def checkpoint_tensors(files: Sequence[Path]) -> Mapping[str, Tensor]:
    """The tensors of a checkpoint's safetensors files as they are, lazily; masks and frequencies are left out."""
    loaders: dict[str, Callable[[], Tensor]] = {}
    for path in files:
        handle: Any = safe_open(path, framework="pt")
        names = [name for name in handle.keys() if not is_derived(name)]  # noqa: SIM118 - not a mapping
        loaders |= {name: partial(handle.get_tensor, name) for name in names}
    return LazyTensors(loaders)


def full_source(bundle: Bundle, spec: Architecture) -> WeightSource:
    """Where a full-precision decoder of the bundle gets its tensors; WeightError where they do not fit."""
    return CheckpointWeights([bundle.path / FULL_WEIGHTS], spec)


def int4_source(bundle: Bundle, spec: Architecture) -> WeightSource:
    """Where an INT4 decoder of the bundle gets its tensors; no full-precision weight of a block is read for it."""
    int4 = CanonicalWeights([bundle.path / INT4_WEIGHTS])
    if "full" not in bundle.manifest.weights:
        return int4
    return _Layered(int4, full_source(bundle, spec))


class _Layered:
    """Tensors of `first`, and of `second` where `first` has none."""

    def __init__(self, first: WeightSource, second: WeightSource) -> None:
        self._first, self._second = first, second

    def shared(self) -> Mapping[str, Tensor]:
        return _LayeredTensors(self._first.shared(), self._second.shared())

    def block(self, index: int) -> Mapping[str, Tensor]:
        return _LayeredTensors(self._first.block(index), self._second.block(index))


class _LayeredTensors(Mapping[str, Tensor]):
    def __init__(self, first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> None:
        self._first, self._second = first, second

    def __getitem__(self, name: str) -> Tensor:
        return self._first[name] if name in self._first else self._second[name]

    def __iter__(self) -> Iterator[str]:
        yield from self._first
        yield from (name for name in self._second if name not in self._first)

    def __len__(self) -> int:
        return sum(1 for _ in self)
