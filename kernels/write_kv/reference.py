"""Writing keys and values into pages in plain PyTorch: what every fast version is tested against."""

import torch
from torch import Tensor

from exeunt.kernels.int4_linear.weight import FP16_MAX, pack_nibbles, round_groups, unpack_nibbles
from exeunt.kernels.paged_batch import KVBlock
from exeunt.kernels.write_kv.hadamard import rotate


def write_kv_reference(keys: Tensor, values: Tensor, slots: Tensor, block: KVBlock) -> None:
    """Write keys and values [tokens, kv_heads, head_dim] to `slots` [tokens] of the block's pages.

    INT4 pages: keys are rotated first; see `quantize_heads` for the rounding.
    """
    pages = torch.div(slots, block.page_tokens, rounding_mode="floor")
    offsets = slots % block.page_tokens
    if block.key_params is None or block.value_params is None:
        block.keys[pages, :, offsets] = keys.to(block.keys.dtype)
        block.values[pages, :, offsets] = values.to(block.values.dtype)
        return
    for x, codes_of, params_of in (
        (rotate(keys), block.keys, block.key_params),
        (values.float(), block.values, block.value_params),
    ):
        codes, params = quantize_heads(x)
        codes_of[pages, :, offsets] = codes
        params_of[pages, :, offsets] = params


def quantize_heads(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return (packed codes [..., head_dim / 2] uint8, params [..., 2] float16) of x [..., head_dim] float32.

    Asymmetric over the last dimension, params = (scale, minimum), codes rounded to nearest with the float16
    params that are stored. The error is at most scale / 2, plus 2⁻¹¹ of (|minimum| + 15 scale) for their
    rounding.
    """
    low, high = x.amin(-1).clamp(min=-FP16_MAX), x.amax(-1).clamp(max=FP16_MAX)
    codes, scale, minimum = round_groups(x, low, high)
    return pack_nibbles(codes.to(torch.uint8)), torch.stack((scale, minimum), dim=-1)


def dequantize_heads(codes: Tensor, params: Tensor) -> Tensor:
    """Return x [..., head_dim] float32 of what `quantize_heads` gave: code × scale + minimum."""
    return torch.addcmul(params[..., 1:].float(), unpack_nibbles(codes).float(), params[..., :1].float())
