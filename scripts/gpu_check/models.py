"""Models to check and to time: known shapes with random weights, and the packaged model with INT4 weights beside."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from exeunt.calibration.weights_int4 import Int4Plan
from exeunt.compression.architecture import Architecture, read_architecture
from exeunt.compression.checkpoint import open_checkpoint
from exeunt.compression.checkpoint_names import block_shapes, linear_names, linear_shapes, shared_shapes
from exeunt.compression.decoder import Decoder
from exeunt.compression.variant import WeightFormat
from exeunt.compression.weights import LazyTensors, WeightSource
from exeunt.deploy.packaged_model import path as packaged_checkpoint
from exeunt.kernels.int4_linear import quantize

GROUP_SIZE = Int4Plan().group_size  # of INT4 weights: what a calibration makes unless it is told otherwise
_SPREAD = 0.02  # standard deviation of random weights, transformers' own initializer_range
Loaders = dict[str, Callable[[], Tensor]]
Decoders = dict[tuple[WeightFormat, bool], Decoder]


@dataclass(frozen=True, slots=True)
class Shape:
    """A model's sizes, as the keyword arguments of its transformers config."""

    name: str
    family: str  # "mistral" or "llama"
    sizes: Mapping[str, Any]

    def config(self) -> Any:
        """The transformers config."""
        from transformers import LlamaConfig, MistralConfig

        kind = MistralConfig if self.family == "mistral" else LlamaConfig
        extra = {"sliding_window": None} if self.family == "mistral" else {}
        return kind(
            **self.sizes,
            **extra,
            vocab_size=32000,
            rms_norm_eps=1e-5,
            tie_word_embeddings=False,
            dtype="bfloat16",
        )

    def spec(self, blocks: int | None = None) -> Architecture:
        """Its architecture, with so many blocks or its own number."""
        config = self.config()
        if blocks is not None:
            config.num_hidden_layers = blocks
        return read_architecture(config)


def _sizes(hidden: int, inner: int, blocks: int, heads: int, kv_heads: int, longest: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": longest,
    }


MISTRAL = Shape("mistral-7b", "mistral", _sizes(4096, 14336, 32, 32, 8, 32768))
LLAMA = Shape("llama-1.1b", "llama", _sizes(2048, 5632, 22, 32, 4, 32768))
TOY = Shape("toy", "llama", _sizes(64, 128, 2, 4, 2, 1024))


class RandomWeights:
    """Random tensors under canonical names, made on the device as they are read: no file, nothing on the host.

    With a group size the linears are there as codes, scales and offsets too, of about the same spread.
    """

    def __init__(
        self, spec: Architecture, device: torch.device, dtype: torch.dtype, group_size: int | None
    ) -> None:
        self._spec, self._device, self._dtype, self._group_size = spec, device, dtype, group_size

    def shared(self) -> Mapping[str, Tensor]:
        """The tensors outside the blocks."""
        spec = self._spec
        loaders = self._tensors(shared_shapes(spec))
        return LazyTensors(loaders | self._int4("output", (spec.vocab_size, spec.hidden_size)))

    def block(self, index: int) -> Mapping[str, Tensor]:
        """One block's tensors."""
        loaders = self._tensors(block_shapes(self._spec))
        for name, shape in linear_shapes(self._spec).items():
            loaders |= self._int4(name, shape)
        return LazyTensors(loaders)

    def _tensors(self, shapes: Mapping[str, tuple[int, ...]]) -> Loaders:
        return {name: partial(self._tensor, name, shape) for name, shape in shapes.items()}

    def _tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        tensor = torch.empty(shape, device=self._device, dtype=self._dtype)
        return tensor.normal_(1.0 if name.endswith("norm.weight") else 0.0, _SPREAD)

    def _int4(self, name: str, shape: tuple[int, int]) -> Loaders:
        if self._group_size is None:
            return {}
        outputs, inputs = shape
        groups = -(-inputs // self._group_size)
        step = _SPREAD * 12**0.5 / 15  # sixteen even steps of this spread
        return {
            f"{name}.codes": lambda: torch.randint(
                256, (outputs, inputs // 2), dtype=torch.uint8, device=self._device
            ),
            f"{name}.scales": lambda: self._half(outputs, groups, step),
            f"{name}.offsets": lambda: self._half(outputs, groups, -7.5 * step),
        }

    def _half(self, rows: int, columns: int, mean: float) -> Tensor:
        tensor = torch.empty(rows, columns, dtype=torch.float16, device=self._device)
        return tensor.normal_(mean, abs(mean) / 20)


def random_decoders(
    spec: Architecture,
    device: torch.device,
    dtype: torch.dtype,
    *,
    formats: tuple[WeightFormat, ...] = ("full", "int4"),
) -> Decoders:
    """Decoders of a model with random weights; the two formats share embedding and norms, and are different models."""
    found: Decoders = {}
    full = None
    if "full" in formats:
        full = Decoder.from_weights(
            spec, RandomWeights(spec, device, dtype, None), device=device, dtype=dtype
        )
        found["full", False] = full
    if "int4" in formats:
        source = RandomWeights(spec, device, dtype, GROUP_SIZE)
        found["int4", False] = Decoder.from_weights(
            spec, source, device=device, dtype=dtype, int4_group_size=GROUP_SIZE, share_with=full
        )
    return found


class QuantisedWeights:
    """A checkpoint's tensors with its linears rounded to the nearest INT4 as they are read."""

    def __init__(
        self, source: WeightSource, spec: Architecture, device: torch.device, group_size: int
    ) -> None:
        self._source, self._spec, self._device, self._group_size = source, spec, device, group_size

    def shared(self) -> Mapping[str, Tensor]:
        """The tensors outside the blocks, the output matrix in INT4 too."""
        tensors = dict(self._source.shared())
        output = tensors["embedding.tokens" if self._spec.tied else "output.weight"]
        return tensors | self._codes("output", output)

    def block(self, index: int) -> Mapping[str, Tensor]:
        """One block's tensors."""
        tensors = dict(self._source.block(index))
        for name in linear_names(self._spec):
            tensors |= self._codes(name, tensors[f"{name}.weight"])
        return tensors

    def _codes(self, name: str, weight: Tensor) -> dict[str, Tensor]:
        packed = quantize(weight.to(self._device, torch.float32), self._group_size)
        return {
            f"{name}.codes": packed.codes,
            f"{name}.scales": packed.scales,
            f"{name}.offsets": packed.offsets,
        }


def packaged_decoders(device: torch.device, dtype: torch.dtype) -> tuple[Architecture, Decoders]:
    """The packaged model's decoders: its full weights, and the same rounded to INT4 (no calibration)."""
    checkpoint = open_checkpoint(packaged_checkpoint())
    spec, weights = checkpoint.spec, checkpoint.weights()
    full = Decoder.from_weights(spec, weights, device=device, dtype=dtype)
    int4 = Decoder.from_weights(
        spec,
        QuantisedWeights(weights, spec, device, GROUP_SIZE),
        device=device,
        dtype=dtype,
        int4_group_size=GROUP_SIZE,
        share_with=full,
    )
    return spec, {("full", False): full, ("int4", False): int4}
