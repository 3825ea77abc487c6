"""Finding a Hugging Face checkpoint: a local directory, or a repository on the Hub."""

import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path

from exeunt.compression.architecture import Architecture, load_architecture
from exeunt.compression.weights import CheckpointWeights

log = logging.getLogger("exeunt.checkpoint")

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_SMALL_FILES = ["*.json", "*.model", "*.txt", "*.jinja"]  # config, tokenizer, index
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")  # the oldest models have no owner: gpt2
_FILE_ENDINGS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".json", ".zip", ".tar", ".gz")


class CheckpointError(ValueError):
    """There is no usable checkpoint at the name given; the message says what is missing."""


class NoCheckpointError(CheckpointError):
    """There is nothing at the name given, neither on this machine nor on the Hub: the name is likely wrong."""


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


def is_hub_id(name: str) -> bool:
    """Whether `name` could be a model's id on the Hub: `owner/name`, or `name` alone, and not that of a file."""
    return _HUB_ID.fullmatch(name) is not None and not name.endswith(_FILE_ENDINGS)


def open_checkpoint(model: str | Path) -> Checkpoint:
    """The checkpoint in a local directory, or downloaded from the Hub (only the files that are needed).

    The config is read, and refused, before any weights are downloaded. Raises CheckpointError (NoCheckpointError where
    the name is likely wrong), and ConfigError or UnsupportedModelError for what the config says.
    """
    path = Path(model)
    if path.is_dir():
        return Checkpoint(str(model), path, load_architecture(path), _weight_files(path))
    if path.exists() or isinstance(model, Path) or not is_hub_id(str(model)):
        raise NoCheckpointError(
            f"{model} is neither a checkpoint directory nor a Hugging Face id like owner/name."
        )
    # a name without an owner is more often a folder's, misspelt, and the Hub may take long to say so
    level = logging.INFO if "/" in str(model) else logging.WARNING
    log.log(level, "There is no folder %s here, the Hugging Face Hub is asked for a model of that id.", model)
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
        shards = sorted(set(weight_map.values()), key=str)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index} is not an index of safetensors files: {error!r}") from error
    for shard in shards:
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise CheckpointError(f"{index} names {shard!r}, which is not a file beside it.")
    return tuple(index.parent / shard for shard in shards)


def _download(model: str, patterns: list[str]) -> Path:
    from httpx import HTTPError
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(snapshot_download(model, allow_patterns=patterns, ignore_patterns=["*/*"]))
    except GatedRepoError as error:
        raise _not_given(model, error) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise _nowhere(model, error) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, HTTPError, OSError) as error:
        # A name without an owner is that of a folder, misspelt, far more often than an old model's.
        raise (_not_given if "/" in model else _nowhere)(model, error) from error


def _not_given(model: str, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{model!r} is no local directory, and the Hugging Face Hub did not give it either: {_reason(error)}"
    )


def _nowhere(model: str, error: Exception) -> NoCheckpointError:
    return NoCheckpointError(
        f"There is no folder {model}, and the Hugging Face Hub gives no model of that id either "
        f"({_reason(error).rstrip('.')}); give the folder of a bundle or of a checkpoint, or an id such as owner/name."
    )


def _reason(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
