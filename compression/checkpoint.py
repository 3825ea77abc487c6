"""Finding a Hugging Face checkpoint: a local directory, or a repository on the Hub."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from exeunt.compression.architecture import Architecture, load_architecture
from exeunt.compression.weights import CheckpointWeights

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_SMALL_FILES = ["*.json", "*.model", "*.txt", "*.jinja"]  # config, tokenizer, index
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


class CheckpointError(ValueError):
    """There is no usable checkpoint at the name given; the message says what is missing."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint whose files are on this machine."""

    name: str  # as it was asked for
    directory: Path
    spec: Architecture
    files: tuple[Path, ...]  # safetensors

    def weights(self) -> CheckpointWeights:
        """Its weights under canonical names; WeightError where they do not fit the config."""
        return CheckpointWeights(self.files, self.spec)


def open_checkpoint(model: str | Path) -> Checkpoint:
    """The checkpoint in a local directory, or downloaded from the Hub (only the files that are needed).

    The config is read, and refused, before any weights are downloaded. Raises CheckpointError, and ConfigError or
    UnsupportedModelError for what the config says.
    """
    path = Path(model)
    if path.is_dir():
        return Checkpoint(str(model), path, load_architecture(path), _weight_files(path))
    if path.exists() or isinstance(model, Path) or not _HUB_ID.fullmatch(str(model)):
        raise CheckpointError(
            f"{model} is neither a checkpoint directory nor a Hugging Face id like owner/name."
        )
    directory = _download(str(model), _SMALL_FILES)
    spec = load_architecture(directory)
    index = directory / _INDEX
    wanted = [file.name for file in _shards(index)] if index.exists() else [_SINGLE]
    directory = _download(str(model), [*_SMALL_FILES, *wanted])
    return Checkpoint(str(model), directory, spec, _weight_files(directory))


def _weight_files(directory: Path) -> tuple[Path, ...]:
    index = directory / _INDEX
    if index.exists():
        files = _shards(index)
        for file in files:
            if not file.is_file():
                raise CheckpointError(
                    f"{index} names {file.name}, which is not there; the checkpoint is incomplete."
                )
        return files
    if (directory / _SINGLE).is_file():
        return (directory / _SINGLE,)
    old = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in directory.glob(pattern))
    if old:
        raise CheckpointError(
            f"{directory} holds its weights only as {old[0]}; convert them to safetensors "
            "(`AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)`): pickled weights can run code."
        )
    raise CheckpointError(f"{directory} has neither {_SINGLE} nor {_INDEX}.")


def _shards(index: Path) -> tuple[Path, ...]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = sorted(set(weight_map.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is not an index of safetensors files: {error!r}") from error
    for shard in shards:
        if Path(shard).name != shard:
            raise CheckpointError(f"{index} names {shard!r}, which is not a file beside it.")
    return tuple(index.parent / shard for shard in shards)


def _download(model: str, patterns: list[str]) -> Path:
    from httpx import HTTPError
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=patterns, ignore_patterns=["*/*"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, HTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{model!r} is no local directory, and the Hugging Face Hub did not give it either: {reason}"
        ) from error
