"""How many bytes of a device a model's weights take at least, as far as that is known before they are read."""

from pathlib import Path
from typing import Final

import torch

from exeunt.compression.architecture import (
    Architecture,
    ConfigError,
    UnsupportedModelError,
    load_architecture,
)
from exeunt.compression.bundle import MANIFEST
from exeunt.compression.checkpoint_names import linear_shapes
from exeunt.compression.manifest import Manifest, ManifestError, read_manifest
from exeunt.compression.model import WeightChoice, default_dtype
from exeunt.compression.variant import WeightFormat

_INT4_BYTES: Final = 0.5  # of a code
_GROUP_BYTES: Final = 4  # a float16 scale and offset, which a group of weights shares


def least_weight_bytes(
    folder: Path,
    weights: WeightChoice,
    device: torch.device,
    dtype: torch.dtype | None,
    *,
    is_bundle: bool,
) -> int | None:
    """Bytes that loading the bundle, or else checkpoint, in `folder` takes on `device`, a little less than it will be.

    `weights` says which of a bundle's are loaded, `dtype` None is the one that they are loaded in unless told
    otherwise. None where that cannot be told: no such folder, or one whose loading will say what is wrong with it.
    """
    if not folder.is_dir():
        return None
    manifest = _manifest(folder) if is_bundle else None
    if is_bundle and manifest is None:
        return None
    try:
        spec = (None if manifest is None else manifest.architecture) or load_architecture(folder)
    except (ConfigError, UnsupportedModelError):
        return None
    dense = spec.parameters * (dtype or default_dtype(spec, device)).itemsize
    if manifest is None:
        return dense
    held, group = manifest.weights, manifest.int4_group_size
    formats = set(held) if weights == "both" else {weights}.intersection(held)
    if "int4" not in formats:
        return dense if "full" in formats else None
    codes = _int4_bytes(_linears(spec), group)
    if "full" in formats:
        return dense + codes
    output = 0 if spec.tied else spec.vocab_size * spec.hidden_size  # INT4 too, but in the oldest bundles
    beside = spec.parameters - _linears(spec) - output
    return beside * dense // spec.parameters + codes + _int4_bytes(output, group)


def held_weights(folder: Path) -> tuple[WeightFormat, ...] | None:
    """The forms of the weights that the bundle in `folder` holds; None where loading will say what is wrong with it."""
    manifest = _manifest(folder)
    return None if manifest is None else manifest.weights


def _manifest(folder: Path) -> Manifest | None:
    try:
        return read_manifest((folder / MANIFEST).read_text(encoding="utf-8"))
    except (ManifestError, OSError, UnicodeDecodeError):
        return None


def _linears(spec: Architecture) -> int:
    """Weights of all blocks' linear layers."""
    return spec.blocks * sum(outputs * inputs for outputs, inputs in linear_shapes(spec).values())


def _int4_bytes(weights: int, group: int | None) -> int:
    """Bytes of so many INT4 weights; `group` is how many share a scale and an offset."""
    shared = _GROUP_BYTES / group if group else 0.0
    return int(weights * (_INT4_BYTES + shared))
