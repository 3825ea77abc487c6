"""What calibration holds in memory at once, by arithmetic: for models that this machine has no time for."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch
from transformers import LlamaConfig, MistralConfig

from exeunt.calibration.memory_plan import batch_token_bytes, block_bytes, full_batch_tokens
from exeunt.calibration.teacher_forcing import LOGITS_AT_ONCE
from exeunt.compression.architecture import Architecture, read_architecture
from exeunt.compression.checkpoint_names import linear_shapes

GROUP: Final = 32  # inputs that share a scale and an offset, float16 each
EXITS: Final = 7  # the most that are fitted unless others are asked for
FORMS: Final = 4  # of weights whose states pass a block together: full, to nearest, GPTQ, NF4
SHAPES: Final[Mapping[str, Architecture]] = {
    "Mistral-7B": read_architecture(MistralConfig()),
    "Llama-70B": read_architecture(
        LlamaConfig(
            vocab_size=128_256,
            hidden_size=8192,
            intermediate_size=28_672,
            num_hidden_layers=80,
            num_attention_heads=64,
            num_key_value_heads=8,
            max_position_embeddings=8192,
        )
    ),
}


@dataclass(frozen=True, slots=True)
class Needs:
    """Bytes by what they are for: held throughout, and what each part of calibration takes beside that."""

    held: Mapping[str, int]
    phases: Mapping[str, Mapping[str, int]]

    @property
    def peak(self) -> int:
        """Bytes at the worst moment."""
        return sum(self.held.values()) + max(sum(parts.values()) for parts in self.phases.values())


def needs(
    spec: Architecture,
    dtype: torch.dtype,
    *,
    batch_tokens: int = 4096,
    tokens: int = 48_000,
    study_tokens: int = 2_000,
) -> Needs:
    """What a calibration of `spec` holds where it computes in `dtype`; states of whole splits lie in files.

    `study_tokens` are those that roundings of weights are compared on.
    """
    matrix = spec.vocab_size * spec.hidden_size
    squares = [fan_in**2 for _, fan_in in linear_shapes(spec).values()]
    wide = full_batch_tokens(spec, dtype, batch_tokens)
    certified = int(0.35 * tokens)  # of the certify split
    adapter = spec.hidden_size**2
    logits = 3 * 4 * LOGITS_AT_ONCE
    return Needs(
        held={
            "INT4 weights": int4_bytes(spec),
            "embedding, output matrix": (1 if spec.tied else 2) * matrix * dtype.itemsize,
        },
        phases={
            "quantising": {
                "one full block": block_bytes(spec, dtype),
                "a batch": batch_tokens * batch_token_bytes(spec, dtype),
                "second moments": 4 * sum(squares),
                "their factor": 2 * 8 * max(squares) + 4 * max(squares),
            },
            "fitting linear maps": {
                "a batch": batch_tokens * batch_token_bytes(spec, dtype),
                "moments, two splits": 2 * 2 * 8 * adapter,
            },
            "training heads": {
                "starts and results": (EXITS + 3)
                * 4
                * adapter,  # a start goes when its heads, three at most, are trained
                "gradient, Adam's two, the best yet": 4 * 4 * adapter,
                "logits": logits,
            },
            "certifying, full weights": {
                "one full block": block_bytes(spec, dtype),
                "a batch": wide * batch_token_bytes(spec, dtype),
                # behind each of two exits, in front of the linear block, and half of one for the variant with it
                "states behind exits and in front of the linear block": int(3.5 * certified)
                * spec.hidden_size
                * dtype.itemsize,
                "logits": logits,
            },
            "comparing roundings, blocks": {
                **_comparing(spec, dtype, study_tokens),
                "one full block": block_bytes(spec, dtype),
                "another restored from four bits": block_bytes(spec, dtype),
                "a layer held against it": _compared(
                    max(out * fan_in for out, fan_in in linear_shapes(spec).values())
                ),
                "second moments": 4 * sum(squares),
                "a batch": min(batch_tokens, study_tokens) * _one_block_token_bytes(spec, dtype),
            },
            "comparing roundings, output matrix": {
                **_comparing(spec, dtype, study_tokens),
                "the matrix again, and restored": (1 if spec.tied else 2) * matrix * dtype.itemsize,
                "held against each other": _compared(matrix),
                "second moments": 4 * adapter,
                # two distributions, one of them as chances too, their difference, and its product with these
                "logits": 5 * 4 * min(LOGITS_AT_ONCE, study_tokens * spec.vocab_size),
            },
        },
    )


def _comparing(spec: Architecture, dtype: torch.dtype, study_tokens: int) -> dict[str, int]:
    """What is held all the while that roundings of weights are compared."""
    width = spec.hidden_size
    return {
        "every form's states": FORMS * study_tokens * width * dtype.itemsize,
        "embedding, read again": spec.vocab_size * width * dtype.itemsize,
        "exit heads": EXITS * 4 * width**2,
    }


def _compared(weights: int) -> int:
    """A layer of `weights` weights held against what a rounding restores: that, the difference, its square, float32."""
    return 3 * 4 * weights


def _one_block_token_bytes(spec: Architecture, dtype: torch.dtype) -> int:
    """Bytes of a token of a batch that passes one block at a time: of keys and values there are that block's alone."""
    others = (spec.blocks - 1) * 2 * spec.kv_size
    return batch_token_bytes(spec, dtype) - others * dtype.itemsize


def int4_bytes(spec: Architecture) -> int:
    """Bytes of the INT4 linears of all blocks and of the INT4 output matrix."""
    shapes = [*linear_shapes(spec).values()] * spec.blocks + [(spec.vocab_size, spec.hidden_size)]
    return sum(fan_out * (fan_in // 2 + 4 * -(-fan_in // GROUP)) for fan_out, fan_in in shapes)
