"""How each family names and shapes its tensors in a Hugging Face checkpoint, against our canonical names.

Canonical names (what the decoder, calibration and bundles use; `i` counts blocks from 0):

    embedding.tokens                 [vocab, hidden]
    embedding.positions              [max positions, hidden]            learned positions only (GPT-2)
    final_norm.weight, .bias         [hidden]                           bias: layer norms only
    output.weight                    [vocab, hidden]                    untied models only
    blocks.i.attention_norm.weight, .bias    [hidden]
    blocks.i.mlp_norm.weight, .bias          [hidden]
    blocks.i.query_norm.weight, blocks.i.key_norm.weight    [head_dim]  Qwen3 only
    blocks.i.qkv.weight, .bias       [query + 2 × kv sizes, hidden]     queries, keys, values stacked
    blocks.i.out.weight, .bias       [hidden, query size]
    blocks.i.gate_up.weight, .bias   [2 × intermediate, hidden]         gated MLPs: gate, then up
    blocks.i.up.weight, .bias        [intermediate, hidden]             plain MLPs
    blocks.i.down.weight, .bias      [hidden, intermediate]

An INT4 linear stands as .codes, .scales and .offsets (see `exeunt.kernels.int4_linear.Int4Weight`) in place of
.weight; its bias keeps its name. The output matrix may stand so in a tied model too. Every weight is [out, in].
"""

import re
from dataclasses import dataclass

from exeunt.compression.architecture import Architecture


@dataclass(frozen=True, slots=True)
class TensorSource:
    """Which checkpoint tensors make up one canonical tensor: stacked along the outputs, or one that is transposed."""

    parts: tuple[tuple[str, tuple[int, ...]], ...]  # (name, shape in the checkpoint)
    transposed: bool = False  # GPT-2's Conv1D holds [in, out]


def linear_names(spec: Architecture) -> tuple[str, ...]:
    """The canonical names of a block's linear layers, in the order in which a token passes them."""
    return ("qkv", "out", "gate_up" if spec.gated else "up", "down")


def linear_shapes(spec: Architecture) -> dict[str, tuple[int, int]]:
    """[out, in] of each of a block's linear layers."""
    hidden, inner = spec.hidden_size, spec.intermediate_size
    shapes = {"qkv": (spec.query_size + 2 * spec.kv_size, hidden), "out": (hidden, spec.query_size)}
    if spec.gated:
        return {**shapes, "gate_up": (2 * inner, hidden), "down": (hidden, inner)}
    return {**shapes, "up": (inner, hidden), "down": (hidden, inner)}


def shared_shapes(spec: Architecture) -> dict[str, tuple[int, ...]]:
    """Canonical names and shapes of the tensors outside the blocks."""
    return {name: _canonical_shape(source) for name, source in shared_sources(spec).items()}


def block_shapes(spec: Architecture) -> dict[str, tuple[int, ...]]:
    """Canonical names (without `blocks.i.`) and shapes of one block's full-precision tensors."""
    return {name: _canonical_shape(source) for name, source in block_sources(spec).items()}


def shared_sources(spec: Architecture) -> dict[str, TensorSource]:
    """Where the tensors outside the blocks come from; names without the family's prefix."""
    matrix, hidden = (spec.vocab_size, spec.hidden_size), (spec.hidden_size,)
    if spec.family == "gpt2":
        sources = {
            "embedding.tokens": _one("wte.weight", matrix),
            "embedding.positions": _one("wpe.weight", (spec.max_position_embeddings, spec.hidden_size)),
            "final_norm.weight": _one("ln_f.weight", hidden),
            "final_norm.bias": _one("ln_f.bias", hidden),
        }
    else:
        sources = {
            "embedding.tokens": _one("embed_tokens.weight", matrix),
            "final_norm.weight": _one("norm.weight", hidden),
        }
    if not spec.tied:
        sources["output.weight"] = _one("lm_head.weight", matrix)
    return sources


def block_sources(spec: Architecture) -> dict[str, TensorSource]:
    """Where one block's tensors come from; names without the family's prefix and the block's number."""
    return _gpt2_block(spec) if spec.family == "gpt2" else _llama_block(spec)


def checkpoint_prefixes(spec: Architecture) -> tuple[str, ...]:
    """What may stand before every name but the output matrix's: a model saved without its head has none."""
    return ("transformer.", "") if spec.family == "gpt2" else ("model.", "")


def block_prefix(spec: Architecture, block: int) -> str:
    """What stands between the family's prefix and the name of a block's tensor."""
    return f"h.{block}." if spec.family == "gpt2" else f"layers.{block}."


def is_derived(name: str) -> bool:
    """Whether a checkpoint tensor only repeats what the config says: old checkpoints hold masks and frequencies."""
    return re.fullmatch(r"(.*\.)?(rotary_emb\.inv_freq|h\.\d+\.attn\.(bias|masked_bias))", name) is not None


def _one(name: str, shape: tuple[int, ...]) -> TensorSource:
    return TensorSource(((name, shape),))


def _canonical_shape(source: TensorSource) -> tuple[int, ...]:
    first = source.parts[0][1]
    if source.transposed:
        return first[::-1]
    return (sum(shape[0] for _, shape in source.parts), *first[1:])


def _gpt2_block(spec: Architecture) -> dict[str, TensorSource]:
    hidden, inner = spec.hidden_size, spec.intermediate_size
    sources: dict[str, TensorSource] = {}
    for ours, theirs in (("attention_norm", "ln_1"), ("mlp_norm", "ln_2")):
        sources[f"{ours}.weight"] = _one(f"{theirs}.weight", (hidden,))
        sources[f"{ours}.bias"] = _one(f"{theirs}.bias", (hidden,))
    for ours, theirs, fan_out, fan_in in (
        ("qkv", "attn.c_attn", 3 * hidden, hidden),
        ("out", "attn.c_proj", hidden, hidden),
        ("up", "mlp.c_fc", inner, hidden),
        ("down", "mlp.c_proj", hidden, inner),
    ):
        sources[f"{ours}.weight"] = TensorSource(((f"{theirs}.weight", (fan_in, fan_out)),), transposed=True)
        sources[f"{ours}.bias"] = _one(f"{theirs}.bias", (fan_out,))
    return sources


def _llama_block(spec: Architecture) -> dict[str, TensorSource]:
    hidden, inner = spec.hidden_size, spec.intermediate_size
    sources = {
        "attention_norm.weight": _one("input_layernorm.weight", (hidden,)),
        "mlp_norm.weight": _one("post_attention_layernorm.weight", (hidden,)),
    }
    if spec.qk_norm:
        sources["query_norm.weight"] = _one("self_attn.q_norm.weight", (spec.head_dim,))
        sources["key_norm.weight"] = _one("self_attn.k_norm.weight", (spec.head_dim,))
    qkv = (("q", spec.query_size), ("k", spec.kv_size), ("v", spec.kv_size))
    linears: tuple[tuple[str, tuple[tuple[str, int], ...], int, bool], ...] = (
        ("qkv", tuple((f"self_attn.{x}_proj", size) for x, size in qkv), hidden, spec.qkv_bias),
        ("out", (("self_attn.o_proj", hidden),), spec.query_size, spec.out_bias),
        ("gate_up", (("mlp.gate_proj", inner), ("mlp.up_proj", inner)), hidden, spec.mlp_bias),
        ("down", (("mlp.down_proj", hidden),), inner, spec.mlp_bias),
    )
    for ours, parts, fan_in, biased in linears:
        sources[f"{ours}.weight"] = TensorSource(tuple((f"{p}.weight", (size, fan_in)) for p, size in parts))
        if biased:
            sources[f"{ours}.bias"] = TensorSource(tuple((f"{p}.bias", (size,)) for p, size in parts))
    return sources
