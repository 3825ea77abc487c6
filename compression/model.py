"""A model ready to serve: its decoders by variant, exits, tokenizer, and the manifest of its bundle."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import torch

from exeunt.compression.architecture import Architecture, ConfigError, UnsupportedModelError
from exeunt.compression.block_weights import read_int4_output
from exeunt.compression.bundle import Bundle, BundleError, open_bundle
from exeunt.compression.bundle_weights import full_source, int4_source
from exeunt.compression.checkpoint import open_checkpoint
from exeunt.compression.decoder import Decoder
from exeunt.compression.exits import ExitHead
from exeunt.compression.graph_pool import GraphPool
from exeunt.compression.kv_format import KVLayout, kv_layout
from exeunt.compression.linear import Linear
from exeunt.compression.row_graphs import StepGraphs
from exeunt.compression.tokenizer import TokenizerError, load_tokenizer
from exeunt.compression.variant import KVFormat, Variant, WeightFormat
from exeunt.compression.weights import WeightError

if TYPE_CHECKING:  # it imports pydantic, which plain models do without
    from exeunt.compression.manifest import ExitRecord, Manifest

WeightChoice = Literal["int4", "full", "both"]

_SHARED: Final = frozenset(
    ("embedding", "norms", "rope", "linear_block", "exit_output", "exit_shortlists", "cuda_graphs")
)
"""Kinds of resident bytes that decoders have in common."""


class ModelLoadError(ValueError):
    """A model that cannot be made ready; the message is one sentence that says why."""


class NotHeldError(ValueError):
    """A variant that the loaded model does not hold; the message lists those that it does."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model on one device in one dtype. `decoders` is keyed by (weights, whether the linear block is in).

    All decoders share embedding, norms and biases, and those of one weight format everything but the linear block.
    Exits read one form of the output matrix in all of them, INT4 where the bundle holds that. `exits` are
    shallowest first; a plain model has none, no manifest, and nothing certified. `files` are a plain model's weights.
    """

    name: str
    spec: Architecture
    tokenizer: Any  # transformers' PreTrainedTokenizerBase
    decoders: dict[tuple[WeightFormat, bool], Decoder]
    kv_formats: tuple[KVFormat, ...]
    exits: tuple[ExitHead, ...]
    manifest: "Manifest | None"
    device: torch.device
    dtype: torch.dtype
    files: tuple[Path, ...] = ()

    @property
    def variants(self) -> tuple[Variant, ...]:
        """Every variant that can be served."""
        return tuple(
            Variant(weights, kv, linear) for weights, linear in self.decoders for kv in self.kv_formats
        )

    @property
    def default_variant(self) -> Variant:
        """What a request gets that asks for nothing: no linear block; INT4 where a bundle holds it.

        A plain model is served at full precision unless asked otherwise: nobody has looked at its INT4 cache.
        """
        if self.manifest is None:
            return Variant("full", "full", False)
        weights: WeightFormat = "int4" if ("int4", False) in self.decoders else "full"
        kv: KVFormat = "int4" if "int4" in self.kv_formats else "full"
        return Variant(weights, kv, False)

    @property
    def certified_exits(self) -> tuple[int, ...]:
        """The exits at which tokens of the approximate mode may leave, by their place in `exits`.

        The thresholds of the risk table hold when these are asked, and no others.
        """
        apart = {record.block for record in self._exit_records if not record.certified}
        return tuple(place for place, head in enumerate(self.exits) if head.block not in apart)

    @property
    def drafting_exit(self) -> int | None:
        """The exit that calibration chose to draft for the verified mode, by its place in `exits`.

        None where it chose none: a plain model, or a bundle that was made before, or without, that choice.
        """
        chosen = {record.block for record in self._exit_records if record.drafting}
        return next((place for place, head in enumerate(self.exits) if head.block in chosen), None)

    @property
    def _exit_records(self) -> "tuple[ExitRecord, ...]":
        return () if self.manifest is None else self.manifest.exits

    def decoder(self, variant: Variant) -> Decoder:
        """The decoder that runs `variant`; raises NotHeldError."""
        self._check_held(variant)
        return self.decoders[variant.weights, variant.linear_block]

    def kv_layout(self, variant: Variant, page_bytes: int) -> KVLayout:
        """The layout of `variant`'s pages of `page_bytes` each; raises NotHeldError, KVLayoutError."""
        block = self.decoder(variant).linear_block
        return kv_layout(
            self.spec, variant.kv_cache, self.dtype, page_bytes, None if block is None else block.index
        )

    def resident_bytes(self) -> dict[str, int]:
        """Bytes held by kind, tensors that several decoders share counted once; exits under "exits"."""
        total: dict[str, int] = {}
        for (_, linear), decoder in self.decoders.items():
            for kind, size in decoder.resident_bytes().items():
                own = not linear
                if kind in _SHARED:
                    total[kind] = max(total.get(kind, 0), size)
                else:
                    total[kind] = total.get(kind, 0) + (size if own else 0)
        if ("int4", False) in self.decoders:
            total["exit_output"] = 0  # it is that decoder's own output matrix
        total["exits"] = sum(head.nbytes for head in self.exits)
        return total

    def capture(self, most_context: int) -> StepGraphs | None:
        """Have all decoders' passes of up to 512 tokens run as CUDA graphs, which share what they can.

        None where none can; see `Decoder.capture`.
        """
        self.release_graphs()
        graphs = StepGraphs(GraphPool(self.device))
        captured = [decoder.capture(most_context, graphs) for decoder in self.decoders.values()]
        return graphs if any(each is not None for each in captured) else None

    def release_graphs(self) -> None:
        """Let go of captured graphs and the pages they hold."""
        for decoder in self.decoders.values():
            decoder.release_graphs()

    def _check_held(self, variant: Variant) -> None:
        if (variant.weights, variant.linear_block) in self.decoders and variant.kv_cache in self.kv_formats:
            return
        held = "; ".join(str(each) for each in self.variants)
        raise NotHeldError(f"the loaded model does not hold {variant}; it holds {held}")


def load_bundle(
    path: Path | str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    weights: WeightChoice = "both",
) -> LoadedModel:
    """The bundle at `path`, verified, on `device`.

    `dtype` None is float32 on a CPU and the checkpoint's own elsewhere. `weights` says which formats to hold:
    "both" is whatever the bundle has, and "int4" holds no full-precision copy of an INT4 weight. Raises
    BundleError for a bundle that is broken or does not have what is asked for.
    """
    bundle = open_bundle(path)
    manifest = bundle.manifest
    if weights != "both" and weights not in manifest.weights:
        raise BundleError(
            f"{bundle.path} holds no {weights} weights, only {' and '.join(manifest.weights)}; ask for those or "
            "calibrate anew"
        )
    formats = manifest.weights if weights == "both" else (weights,)
    place = torch.device(device)
    try:
        spec = bundle.architecture()
        dtype = dtype or default_dtype(spec, place)
        decoders = _bundle_decoders(bundle, spec, formats, place, dtype)
        exits = tuple(_fitting(head, spec).to(place, dtype) for head in bundle.exits())
        _pick_shortlists(exits, decoders.values())
        tokenizer = load_tokenizer(bundle.path, manifest.tokenizer_class)
    except (ConfigError, UnsupportedModelError, WeightError, ModelLoadError, TokenizerError) as error:
        raise BundleError(f"{bundle.path}: {error}") from error
    return LoadedModel(
        name=manifest.base_model.name,
        spec=spec,
        tokenizer=tokenizer,
        decoders=decoders,
        kv_formats=manifest.kv_cache,
        exits=exits,
        manifest=manifest,
        device=place,
        dtype=dtype,
    )


def _bundle_decoders(
    bundle: Bundle,
    spec: Architecture,
    formats: tuple[WeightFormat, ...],
    device: torch.device,
    dtype: torch.dtype,
) -> dict[tuple[WeightFormat, bool], Decoder]:
    decoders: dict[tuple[WeightFormat, bool], Decoder] = {}
    full: Decoder | None = None
    if "full" in formats:
        full = Decoder.from_weights(spec, full_source(bundle, spec), device=device, dtype=dtype)
        decoders["full", False] = full
    if "int4" in formats:
        decoders["int4", False] = Decoder.from_weights(
            spec,
            int4_source(bundle, spec),
            device=device,
            dtype=dtype,
            int4_group_size=bundle.manifest.int4_group_size,
            share_with=full,
        )
    if full is not None and bundle.manifest.int4_group_size is not None:
        full.let_exits_read(_exit_output(bundle, spec, full, decoders.get(("int4", False)), device))
    linear_block = bundle.linear_block()
    if linear_block is not None:
        if not (linear_block.index < spec.blocks and linear_block.hidden_size == spec.hidden_size):
            raise ModelLoadError(
                f"the linear block replaces block {linear_block.index} at width {linear_block.hidden_size}; the "
                f"model has {spec.blocks} blocks of width {spec.hidden_size}"
            )
        placed = linear_block.to(device, dtype)
        decoders |= {
            (weights, True): decoder.with_linear_block(placed) for (weights, _), decoder in decoders.items()
        }
    return decoders


def _exit_output(
    bundle: Bundle, spec: Architecture, full: Decoder, int4: Decoder | None, device: torch.device
) -> Linear:
    """The output matrix that exits read in every variant: certificates are about the gates that read it.

    INT4, unless the bundle was made before that matrix was quantised too.
    """
    if int4 is not None:
        return int4.output
    shared = int4_source(bundle, spec).shared()
    if "output.codes" not in shared:
        return full.output
    group_size = bundle.manifest.int4_group_size or 0  # validated with the manifest
    return read_int4_output(spec, shared, device, group_size)


def _pick_shortlists(exits: Iterable[ExitHead], decoders: Iterable[Decoder]) -> None:
    """Copy the rows of the output matrix that exits look at, before anybody waits for it."""
    shortlists = [head.shortlist for head in exits if head.shortlist is not None]
    for decoder in decoders:
        for shortlist in shortlists:
            decoder.project_exit.only(shortlist)


def _fitting(head: ExitHead, spec: Architecture) -> ExitHead:
    if head.block >= spec.blocks - 1 or head.adapter.shape[0] != spec.hidden_size:
        raise ModelLoadError(
            f"the exit {head.name} of width {head.adapter.shape[0]} does not fit a model of {spec.blocks} blocks "
            f"of width {spec.hidden_size}"
        )
    if head.shortlist is not None and int(head.shortlist.ids[-1]) >= spec.vocab_size:
        raise ModelLoadError(
            f"the shortlist of {head.name} names token {int(head.shortlist.ids[-1])}, the model has {spec.vocab_size}"
        )
    return head


def load_plain_model(
    model: Path | str, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> LoadedModel:
    """A Hugging Face checkpoint as it is, at full depth and full weights.

    Its KV cache may be INT4, which needs no calibration, where the head size is even. `dtype` as in
    `load_bundle`. Raises CheckpointError, ConfigError, UnsupportedModelError, WeightError or TokenizerError.
    """
    checkpoint = open_checkpoint(model)
    spec, place = checkpoint.spec, torch.device(device)
    dtype = dtype or default_dtype(spec, place)
    decoder = Decoder.from_weights(spec, checkpoint.weights(), device=place, dtype=dtype)
    return LoadedModel(
        name=Path(checkpoint.name).resolve().name if Path(checkpoint.name).is_dir() else checkpoint.name,
        spec=spec,
        tokenizer=load_tokenizer(checkpoint.directory),
        decoders={("full", False): decoder},
        kv_formats=("full", "int4") if spec.head_dim % 2 == 0 else ("full",),
        exits=(),
        manifest=None,
        device=place,
        dtype=dtype,
        files=checkpoint.files,
    )


def default_dtype(spec: Architecture, device: torch.device) -> torch.dtype:
    """What a model runs in unless told otherwise: float32 on a CPU, the checkpoint's own dtype elsewhere."""
    if device.type == "cpu":
        return torch.float32
    own: torch.dtype = getattr(torch, spec.dtype)
    return own
