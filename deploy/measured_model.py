"""Which model a result is about, so that figures cannot be taken for another's."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from exeunt.compression.bundle import checkpoint_sha256
from exeunt.compression.model import LoadedModel


@dataclass(frozen=True, slots=True)
class MeasuredModel:
    """The model behind a result, by its weights and by how its bundle was made.

    `sha256` is over the base model's weight files, as in a bundle's manifest; None where a server does not tell.
    """

    name: str
    sha256: str | None
    parameters: int
    blocks: int
    exits: tuple[str, ...]
    bundle_version: str | None  # the Exeunt that made the bundle; None of a plain checkpoint
    server_versions: Mapping[str, str] | None = None  # of a server that was asked; None in this process


def measured_model(model: LoadedModel) -> MeasuredModel:
    """What a loaded model is. Hashes the weight files of a plain checkpoint. Raises BundleError where it cannot."""
    manifest = model.manifest
    return MeasuredModel(
        name=model.name if manifest is None else manifest.base_model.name,
        sha256=checkpoint_sha256(model.files) if manifest is None else manifest.base_model.sha256,
        parameters=model.spec.parameters,
        blocks=model.spec.blocks,
        exits=tuple(head.name for head in model.exits),
        bundle_version=None if manifest is None else manifest.exeunt_version,
    )


def served_model(info: Mapping[str, Any]) -> MeasuredModel:
    """What the model of a running server is, from the answer of its `/info`."""
    model, bundle = info["model"], info["bundle"]
    base = None if bundle is None else bundle["base_model"]
    return MeasuredModel(
        name=model["name"] if base is None else base["name"],
        sha256=None if base is None else base["sha256"],
        parameters=model["parameters"],
        blocks=model["blocks"],
        exits=tuple(info["exits"]),
        bundle_version=None if bundle is None else bundle["exeunt_version"],
        server_versions=info["versions"],
    )
