"""Operators in plain PyTorch that stand for the Triton kernels: row-invariant as those are, and quick.

A sum is made in float64 and rounded once. In what order it was added then shows in one value of some hundred million,
and of bfloat16 numbers in none to speak of: what a row gets does not depend on its company. Rows that are missing get
NaN from a linear layer, so that whoever reads one shows.
"""

from collections.abc import Callable, Mapping
from typing import Any, Final

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import exeunt.kernels.gpu
import exeunt.kernels.native.library
from exeunt.kernels.exit_gate.reference import gate_confidence_reference
from exeunt.kernels.int4_linear.weight import unpack_nibbles
from exeunt.kernels.paged_batch import KVBlock
from exeunt.kernels.token_draw.reference import draw_tokens_reference
from exeunt.kernels.token_draw.scores import penalise_scores_reference, truncate_scores_reference
from exeunt.kernels.write_kv.hadamard import rotate
from exeunt.kernels.write_kv.reference import write_kv_reference
from exeunt.kernels.write_kv.turn import turn_and_write_kv_reference

_ACTIVATIONS: Final[Mapping[str, Callable[[Tensor], Tensor]]] = {
    "silu": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def install_stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have CPU tensors go a GPU's way while a test lasts, with these operators in the place of its kernels.

    The project's own operators stay, with what they say of what they write: each runs another function.
    """
    from exeunt.kernels.exit_gate import triton as gate
    from exeunt.kernels.full_linear import triton as full
    from exeunt.kernels.int4_linear import triton as int4
    from exeunt.kernels.paged_attention import triton as attention
    from exeunt.kernels.rows import triton as rows
    from exeunt.kernels.token_draw import scores_triton as scores
    from exeunt.kernels.token_draw import triton as draw
    from exeunt.kernels.write_kv import triton as write

    stand_ins: list[tuple[Any, Callable[..., Any]]] = [
        (full._full_linear_op, full_linear),
        (int4._int4_linear_op, int4_linear),
        (rows._rms_norm_op, rms_norm),
        (rows._layer_norm_op, layer_norm),
        (attention._paged_attention, paged_attention),
        (write._write_kv, write_kv),
        (write._turn_and_write_kv, turn_and_write_kv),
        (write._rotate_heads, rotate_heads),
        (gate._probe_logit_op, probe_logit),
        (gate._gate_op, exit_gate),
        (draw._draw_op, draw_tokens),
        (scores._truncate_op, truncate_scores_reference),
        (scores._penalise_op, penalise_scores_reference),
    ]
    for operator, function in stand_ins:
        monkeypatch.setitem(operator._backend_fns, None, function)
    monkeypatch.setattr(exeunt.kernels.gpu, "interpreted", True)
    monkeypatch.setattr(exeunt.kernels.native.library, "_loaded", [None])


def full_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    positions: Tensor | None,
    out: Tensor,
    activation: str | None,
    gated: bool,
    added: bool,
) -> None:
    """`exeunt::full_linear`, for a weight of any dtype."""
    value = F.linear(x.double(), weight.double(), None if bias is None else bias.double()).to(x.dtype)
    if activation is not None:
        gate, up = value.chunk(2, dim=1) if gated else (value, None)
        value = _ACTIVATIONS[activation](gate.double()).to(x.dtype)
        value = value if up is None else value * up
    if positions is not None:
        value = value.masked_fill((positions < 0)[:, None], torch.nan)
    out.copy_(out + value if added else value)


def int4_linear(
    x: Tensor,
    codes: Tensor,
    params: Tensor,
    bias: Tensor | None,
    positions: Tensor | None,
    out: Tensor,
    group_size: int,
    activation: str | None,
    gated: bool,
    added: bool,
) -> None:
    """`exeunt::int4_linear`."""
    pairs, outputs, _ = codes.shape
    scales, offsets = params.contiguous().view(torch.float16).view(pairs, 2, outputs, 2).double().unbind(-1)
    nibbles = torch.stack((codes & 15, codes >> 4), dim=1).double()  # [pairs, 2, outputs, group]
    weight = (nibbles * scales[..., None] + offsets[..., None]).permute(2, 0, 1, 3).reshape(outputs, -1)
    full_linear(x, weight[:, : x.shape[1]], bias, positions, out, activation, gated, added)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`exeunt::rms_norm`."""
    wide = x.double()
    return (
        (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype).mul(weight).contiguous()
    )


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """`exeunt::layer_norm`."""
    wide_weight, wide_bias = (None if each is None else each.double() for each in (weight, bias))
    return F.layer_norm(x.double(), x.shape[-1:], wide_weight, wide_bias, eps).to(x.dtype)


def paged_attention(
    queries: Tensor,
    page_keys: Tensor,
    page_values: Tensor,
    key_params: Tensor | None,
    value_params: Tensor | None,
    positions: Tensor,
    query_starts: Tensor,
    page_tables: Tensor,
    max_context: int,
    scale: float,
    window: int,
) -> Tensor:
    """`exeunt::paged_attention`, each token over its own row's keys: zeros where the token is missing."""
    out = torch.zeros(queries.shape, dtype=queries.dtype)
    tokens = (positions >= 0).nonzero().flatten()
    if not len(tokens):
        return out
    ends = positions[tokens, None]
    if int(ends.max()) >= max_context:
        raise ValueError(f"a token is at {int(ends.max())}, the longest context is {max_context}")
    places = torch.arange(int(ends.max()) + 1)
    seen = places <= ends
    if window:
        seen &= places > ends - window
    rows = torch.searchsorted(query_starts, tokens, right=True) - 1
    page, offset = places // page_keys.shape[2], places % page_keys.shape[2]
    pages = page_tables[rows].long()[:, page].masked_fill(~seen, 0)  # behind a row's end stands anything

    def gathered(codes: Tensor, params: Tensor | None) -> Tensor:
        """[tokens, context, kv_heads, head_dim] of pages, zeros where nothing is seen."""
        found = codes[pages, :, offset]
        if params is None:
            wide = found.double()
        else:
            scales, minima = params.view(torch.float16)[pages, :, offset].double().split(1, dim=-1)
            wide = unpack_nibbles(found).double() * scales + minima
        return wide.masked_fill(~seen[..., None, None], 0.0)

    keys, values = gathered(page_keys, key_params), gathered(page_values, value_params)
    grouped = queries[tokens].double().view(len(tokens), keys.shape[2], -1, queries.shape[2])
    scores = torch.einsum("nhgd,nchd->nhgc", grouped, keys) * scale
    weights = scores.masked_fill(~seen[:, None, None], -torch.inf).softmax(-1)
    out[tokens] = torch.einsum("nhgc,nchd->nhgd", weights, values).reshape(-1, *out.shape[1:]).to(out.dtype)
    return out


def write_kv(
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    page_keys: Tensor,
    page_values: Tensor,
    key_params: Tensor | None,
    value_params: Tensor | None,
) -> None:
    """`exeunt::write_kv`."""
    there = slots >= 0
    block = KVBlock(page_keys, page_values, key_params, value_params)
    write_kv_reference(keys[there], values[there], slots[there], block)


def turn_and_write_kv(
    qkv: Tensor,
    table: Tensor | None,
    positions: Tensor,
    slots: Tensor,
    page_keys: Tensor,
    page_values: Tensor,
    key_params: Tensor | None,
    value_params: Tensor | None,
    heads: int,
    head_norm: Tensor | None,
    eps: float,
) -> Tensor:
    """`exeunt::turn_and_write_kv`."""
    if head_norm is not None:
        turning = len(head_norm)
        qkv = torch.cat((rms_norm(qkv[:, :turning], head_norm, eps), qkv[:, turning:]), dim=1)
    block = KVBlock(page_keys, page_values, key_params, value_params)
    return turn_and_write_kv_reference(qkv, table, positions, slots, block, heads, None, eps).clone()


def rotate_heads(x: Tensor) -> Tensor:
    """`exeunt::rotate_heads`."""
    return rotate(x).to(x.dtype).clone()


def probe_logit(units: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`exeunt::probe_logit`."""
    return (F.gelu(units.double()) * weight.double()).sum(1).add(bias).float()


def exit_gate(
    probe_logit: Tensor,
    logits: Tensor,
    thresholds: Tensor | None,
    screen_ratio: float,
    combine: Tensor,
    units: Tensor | None,
    judge_tops: Tensor | None,
    judge_bias: Tensor | None,
    judge_weight: Tensor | None,
    judge_output_bias: Tensor | None,
    listed: Tensor | None,
    list_ratio: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`exeunt::exit_gate`."""
    sure = _confidence(
        probe_logit, logits, combine, units, (judge_tops, judge_bias, judge_weight, judge_output_bias)
    )
    if thresholds is None:
        nobody = torch.zeros(len(logits), dtype=torch.bool)
        return sure, nobody, nobody.clone(), nobody.clone()
    looked = probe_logit.double().sigmoid().float() >= thresholds * screen_ratio
    decides = looked if listed is None else looked & (listed >= thresholds * list_ratio)
    leaves = decides & (sure >= thresholds)
    told = sure if listed is None else torch.where(decides, sure, listed)
    return torch.where(looked, told, 0.0), leaves, looked, (leaves if listed is None else decides).clone()


def _confidence(
    opinion: Tensor,
    logits: Tensor,
    combine: Tensor,
    units: Tensor | None,
    judge: tuple[Tensor | None, ...],
) -> Tensor:
    """The gate's confidence [rows] float32."""
    parts: Any = None if judge[0] is None else tuple(each.double() for each in judge if each is not None)
    wide = None if units is None else units.double()
    given = (opinion.double(), logits.double(), combine.double(), wide, parts)
    return gate_confidence_reference(*given).float()


def draw_tokens(
    logits: Tensor, scores: Tensor, temperatures: Tensor, keys: Tensor, token_keys: Tensor
) -> tuple[Tensor, Tensor]:
    """`exeunt::draw_tokens`, which leaves an id of the vocabulary in any case."""
    return draw_tokens_reference(logits, scores, temperatures, keys, token_keys)
