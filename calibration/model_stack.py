"""The variants of the model being calibrated: decoders that share every tensor they can."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import torch

from exeunt.calibration.memory_plan import full_batch_tokens, streams
from exeunt.calibration.page_arena import PageArena
from exeunt.calibration.teacher_forcing import ForcedModel
from exeunt.calibration.weights_int4 import Int4Weights
from exeunt.compression.checkpoint import Checkpoint
from exeunt.compression.decoder import Decoder
from exeunt.compression.exits import ExitHead, ExitNorm
from exeunt.compression.linear_block import LinearBlock
from exeunt.compression.variant import KVFormat, Variant, WeightFormat

FULL_ALONE: Final[tuple[WeightFormat, ...]] = ("full",)


@dataclass(frozen=True, slots=True)
class ModelStack:
    """A full-precision decoder, its INT4 twin where asked for, and the linear block once there is one.

    `weight_formats` and `kv_formats` are those that the bundle is to hold; the full decoder is there in any case, as
    what the others are compared with. Where its blocks would crowd the memory they are streamed: of the model in full
    precision there is then its embedding, its output matrix, and one block. All variants keep a batch's keys and
    values in one `arena`.
    """

    full: Decoder
    int4: Decoder | None
    weight_formats: tuple[WeightFormat, ...]
    kv_formats: tuple[KVFormat, ...]
    linear_block: LinearBlock | None = None
    arena: PageArena = field(default_factory=PageArena)

    @classmethod
    def build(
        cls,
        checkpoint: Checkpoint,
        int4: Int4Weights | None,
        kv_cache: KVFormat,
        device: torch.device,
        dtype: torch.dtype,
        advance: Callable[[int], None] = lambda _decoders: None,
        *,
        int4_alone: bool = False,
        streamed: bool | None = None,
    ) -> "ModelStack":
        """Load `checkpoint` on `device`; `int4` are its quantised linears, `kv_cache` the smallest format held.

        `int4_alone` says that full weights are not to be held beside `int4` in the bundle. `streamed` says whether
        full-precision blocks are read when they are run; None decides by the free memory. `advance` is told each
        decoder: two with `int4`, else one.
        """
        spec = checkpoint.spec
        if streamed is None:
            streamed = streams(spec, device, dtype)
        full = Decoder.from_weights(spec, checkpoint.weights(), device=device, dtype=dtype, streamed=streamed)
        advance(1)
        small, formats = None, FULL_ALONE
        if int4 is not None:
            small = Decoder.from_weights(
                spec, int4, device=device, dtype=dtype, int4_group_size=int4.group_size, share_with=full
            )
            full.let_exits_read(small.output)
            advance(1)
            formats = ("int4",) if int4_alone else ("int4", "full")
        return cls(full, small, formats, ("int4", "full") if kv_cache == "int4" else ("full",))

    @property
    def deployed(self) -> Variant:
        """The most compressed variant without the linear block: what exits are trained on."""
        return Variant(self.weight_formats[0], self.kv_formats[0], False)

    @property
    def reference(self) -> Variant:
        """Nothing saved: what the variants are compared with, held or not."""
        return Variant("full", "full", False)

    @property
    def variants(self) -> tuple[Variant, ...]:
        """Every variant, the deployed one first."""
        linear = (False,) if self.linear_block is None else (False, True)
        return tuple(
            Variant(weights, kv, block)
            for block in linear
            for weights in self.weight_formats
            for kv in self.kv_formats
        )

    def with_linear_block(self, block: LinearBlock | None) -> "ModelStack":
        """The same stack with `block` (float32, on the CPU) in the variants that ask for it."""
        placed = None if block is None else block.to(self.full.device, self.full.dtype)
        return replace(self, linear_block=placed)

    def forced(self, variant: Variant, exits: Sequence[ExitHead]) -> ForcedModel:
        """`variant` with `exits`, for teacher-forced passes."""
        decoder = self.full if variant.weights == "full" or self.int4 is None else self.int4
        if variant.linear_block and self.linear_block is not None:
            decoder = decoder.with_linear_block(self.linear_block)
        return ForcedModel(decoder, variant.kv_cache, exits, self.arena)

    def batch_tokens(self, weights: WeightFormat, least: int) -> int:
        """Tokens of a batch through `weights`, at least `least`; through full ones more, for they may be streamed.

        The same whether they are, so that sums come out alike.
        """
        if weights == "full":
            return full_batch_tokens(self.full.spec, self.full.dtype, least)
        return least


def final_exit_norm(checkpoint: Checkpoint, device: torch.device) -> ExitNorm:
    """The model's final norm in float32, as a head's norm begins."""
    shared = checkpoint.weights().shared()
    spec = checkpoint.spec
    bias = shared["final_norm.bias"] if spec.norm == "layer" else None

    def copied(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(device, torch.float32, copy=True)

    return ExitNorm(
        spec.norm, copied(shared["final_norm.weight"]), None if bias is None else copied(bias), spec.norm_eps
    )
