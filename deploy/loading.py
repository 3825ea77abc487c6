"""Finds the model that the settings name, loads it, and sizes the engine for it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from exeunt.compression.architecture import Architecture
from exeunt.compression.bundle import is_bundle
from exeunt.compression.checkpoint import is_hub_id
from exeunt.compression.device import DeviceError, find_device
from exeunt.compression.kv_format import kv_layout, page_bytes_for
from exeunt.compression.memory import free_bytes, named
from exeunt.compression.model import LoadedModel, load_bundle, load_plain_model
from exeunt.compression.variant import Variant
from exeunt.deploy.tuning import tune_launches
from exeunt.deploy.weight_bytes import held_weights, least_weight_bytes
from exeunt.server.engine_config import EngineConfig
from exeunt.server.settings import Settings

BUNDLE_SIGNS: Final = (
    "manifest.json",
    "weights.int4.safetensors",
    "exits.safetensors",
    "linear_block.safetensors",
)
_MOST_DEFAULT_CACHE: Final = 2**30  # bytes, on a CPU: more must be asked for
_SHARE_OF_MEMORY: Final = 0.25  # of a CPU machine's free memory that the cache takes unasked
_SHARE_OF_GPU: Final = 0.8  # of a GPU's free memory, once the weights are there
_FEWEST_TOKENS: Final = 2  # a sequence of one prompt token and one answer token


class SettingsError(ValueError):
    """Settings that contradict each other, the machine or the model; one sentence says which and what to do."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where a model comes from. `path` is a bundle's directory, a checkpoint's directory, or a hub id."""

    path: str
    is_bundle: bool


@dataclass(frozen=True, slots=True)
class Shape:
    """What the engine is sized by: known of a model before it is loaded.

    `default` is what a request runs through that asks for nothing; `linear_block` the number of the block that is
    then a linear map, None where none is.
    """

    spec: Architecture
    dtype: torch.dtype
    device: torch.device
    default: Variant
    linear_block: int | None


def find_source(model: str) -> Source:
    """What the words on the command line name.

    Raises SettingsError for a folder that is not there, or is neither a bundle nor a checkpoint.
    """
    if (path := find_folder(model)) is None:
        return Source(model, is_bundle=False)
    signs = any((path / name).exists() for name in BUNDLE_SIGNS)  # a bundle even where its manifest is gone
    if signs or is_bundle(path):
        return Source(str(path), is_bundle=True)
    if not (path / "config.json").is_file():
        raise SettingsError(
            f"{path} is neither a bundle (it has no manifest.json) nor a checkpoint (it has no config.json); give the "
            "folder that `exeunt calibrate --out` wrote or one of a Hugging Face checkpoint."
        )
    return Source(str(path), is_bundle=False)


def find_folder(model: str) -> Path | None:
    """The folder that `model` names; None for what may be a model's id on the Hugging Face Hub. Raises SettingsError.

    A name without an owner may be an old model's (gpt2) or a misspelt folder's: the Hub alone can tell.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise SettingsError(f"{model} is a file; give the folder of a bundle or of a checkpoint.")
    if is_hub_id(model):
        return None
    raise SettingsError(
        f"There is no folder {model}; give the folder of a bundle or of a checkpoint, or a Hugging Face id such as "
        "owner/name."
    )


def resolve_device(device: str) -> torch.device:
    """The device that the settings mean; raises SettingsError where this machine has it not."""
    try:
        return find_device(device)
    except DeviceError as error:
        raise SettingsError(f"--device is {device}; {error}.") from error


def resolve_dtype(dtype: str) -> torch.dtype | None:
    """The dtype that the settings mean; None leaves it to the device and the checkpoint."""
    chosen = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    return chosen.get(dtype)


def load_model(source: Source, settings: Settings) -> LoadedModel:
    """The model, ready to run, its fastest launches searched for where a GPU's are not known.

    Raises what `load_bundle` and `load_plain_model` raise, and SettingsError.
    """
    model = _loaded(source, settings)
    tune_launches(model, settings.tuning_seconds)
    return model


def _loaded(source: Source, settings: Settings) -> LoadedModel:
    device, dtype = resolve_device(settings.device), resolve_dtype(settings.dtype)
    if not source.is_bundle:
        check_plain(source, settings)
    free = _free_for_weights(source, settings, device, dtype)
    try:
        if source.is_bundle:
            return load_bundle(source.path, device=device, dtype=dtype, weights=settings.weights)
        return load_plain_model(source.path, device=device, dtype=dtype)
    except torch.OutOfMemoryError as error:
        raise SettingsError(
            f"{source.path} does not fit {named(device)}, which had {free} bytes free before it was loaded: "
            f"{_remedies(device, int4_helps=_int4_helps(source, settings))}."
        ) from error


def _free_for_weights(
    source: Source, settings: Settings, device: torch.device, dtype: torch.dtype | None
) -> int:
    """The device's free bytes. Raises SettingsError where a GPU has too few for the weights that will be loaded.

    A CPU may have its weights where it can drop them again, in the cache of files.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what PyTorch keeps of earlier work, calibration's say, is free too
    free = free_bytes(device)
    if device.type == "cuda":
        where, weights = Path(source.path), settings.weights
        needed = least_weight_bytes(where, weights, device, dtype, is_bundle=source.is_bundle)
        if needed is not None and needed > free:
            raise SettingsError(
                f"{named(device)} has {free} bytes free, the weights of {source.path} need at least {needed}: "
                f"{_remedies(device, int4_helps=_int4_helps(source, settings))}."
            )
    return free


def _int4_helps(source: Source, settings: Settings) -> bool:
    """Whether INT4 weights alone would be fewer bytes than what is loaded."""
    held = held_weights(Path(source.path)) if source.is_bundle else None
    return settings.weights != "int4" and held != ("int4",)


def _remedies(device: torch.device, *, int4_helps: bool) -> str:
    """What to do where a device has too little memory, whatever the reason."""
    ways = ["free some there"]
    if int4_helps:
        ways.append("serve the INT4 weights of a bundle alone (--weights int4)")
    if device.type == "cuda":
        ways.append("choose another --device")
    return ", or ".join(ways)


def check_plain(source: Source, settings: Settings) -> None:
    """Raise SettingsError where a plain model is asked for what only a bundle can hold."""
    if settings.weights == "int4":
        raise SettingsError(
            f"--weights is int4 and {source.path} is a plain model; make a bundle of it with `exeunt calibrate`."
        )


def default_variant(own: Variant, settings: Settings) -> Variant:
    """What a request runs through that asks for nothing: the server's defaults, else `own`, the model's."""
    asked = settings.default_compression
    return Variant(
        weights=asked.weights or own.weights,
        kv_cache=asked.kv_cache or own.kv_cache,
        linear_block=own.linear_block if asked.linear_block is None else asked.linear_block,
    )


def shape_of(model: LoadedModel, settings: Settings) -> Shape:
    """What the engine is sized by, of a loaded model. Raises NotHeldError for a default that it does not hold."""
    default = default_variant(model.default_variant, settings)
    block = model.decoder(default).linear_block
    return Shape(model.spec, model.dtype, model.device, default, None if block is None else block.index)


def engine_config(model: LoadedModel, settings: Settings) -> EngineConfig:
    """The engine's limits for a loaded model, see `engine_limits`."""
    return engine_limits(shape_of(model, settings), settings)


def engine_limits(shape: Shape, settings: Settings) -> EngineConfig:
    """The engine's limits: as asked, else what the model and the machine's memory allow.

    Raises SettingsError where what is asked for cannot be.
    """
    check_batch(settings)
    longest = shape.spec.max_position_embeddings
    if settings.max_model_len is not None and settings.max_model_len > longest:
        raise SettingsError(f"--max-model-len is {settings.max_model_len}; this model's limit is {longest}.")
    wanted = settings.max_model_len or longest
    page_bytes = page_bytes_for(shape.spec, shape.dtype)
    layout = kv_layout(shape.spec, shape.default.kv_cache, shape.dtype, page_bytes, shape.linear_block)
    page_tokens = layout.page_tokens
    free = free_bytes(shape.device)
    cache = _cache_bytes(shape.device, free, settings, page_bytes * -(-wanted // page_tokens))
    held = cache // page_bytes * page_tokens
    least = settings.max_model_len or _FEWEST_TOKENS
    if held < least and settings.kv_cache_memory is not None:
        raise SettingsError(
            f"--kv-cache-memory is {cache} bytes, which hold {held} tokens; a sequence of {wanted} needs "
            f"{page_bytes * -(-wanted // page_tokens)} bytes, raise it or lower --max-model-len."
        )
    if held < least:
        shorter = "" if settings.max_model_len is None else "lower --max-model-len, or "
        raise SettingsError(
            f"{named(shape.device)} has {free} bytes free, of which keys and values take {cache} at most, and a "
            f"sequence of {least} tokens needs {page_bytes * -(-least // page_tokens)}: "
            f"{shorter}{_remedies(shape.device, int4_helps=settings.weights != 'int4')}."
        )
    return EngineConfig(
        max_model_len=min(wanted, held),
        max_num_seqs=settings.max_num_seqs,
        max_num_queued_reqs=settings.max_num_queued_reqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        kv_cache_bytes=cache,
        audit_share=settings.audit_share,
        scheduling=settings.scheduling,
        longest_wait_s=settings.longest_wait,
        cuda_graphs=not settings.enforce_eager,
        async_scheduling=settings.async_scheduling,
    )


def check_guard(settings: Settings) -> None:
    """Raise SettingsError where the exit guard would never hear of an audit."""
    if settings.exit_guard and settings.audit_share == 0:
        raise SettingsError(
            "--exit-guard judges by audits, and --audit-share is 0: raise it or leave the guard out."
        )


def check_waiting(settings: Settings) -> None:
    """Raise SettingsError where a longest wait is given and no row ever waits."""
    if "longest_wait" in settings.model_fields_set and settings.scheduling == "run-through":
        raise SettingsError(
            f"--longest-wait is {settings.longest_wait:g} and --scheduling run-through, in which no row waits: give "
            "--scheduling queues or leave --longest-wait out."
        )


def check_batch(settings: Settings) -> None:
    """Raise SettingsError where a step could not advance every running sequence."""
    if settings.max_num_batched_tokens < settings.max_num_seqs:
        raise SettingsError(
            f"--max-num-batched-tokens is {settings.max_num_batched_tokens}; it must be at least --max-num-seqs, "
            f"{settings.max_num_seqs}, so that every running sequence advances in a step: raise it or lower the other."
        )


def _cache_bytes(device: torch.device, free: int, settings: Settings, sequence_bytes: int) -> int:
    """Bytes of the KV cache: as asked, else for every sequence at full length, within a share of `free` bytes."""
    if settings.kv_cache_memory is not None:
        if settings.kv_cache_memory > free:
            raise SettingsError(
                f"--kv-cache-memory is {int(settings.kv_cache_memory)} bytes; {named(device)} has {free} bytes "
                "free, ask for less."
            )
        return int(settings.kv_cache_memory)
    wanted = sequence_bytes * settings.max_num_seqs
    if device.type == "cuda":
        return min(wanted, int(free * _SHARE_OF_GPU))
    share = min(int(free * _SHARE_OF_MEMORY), _MOST_DEFAULT_CACHE)
    if settings.max_model_len is not None:
        share = max(share, sequence_bytes)  # an explicit length is a wish for at least one such sequence
    return min(wanted, share)
