"""A lean forward pass over the parameters of a transformers ``LlamaForCausalLM``, for training.

The parameters live in the transformers model, so that export is only saving; a test holds the logits against
transformers' own. What this file adds is row-wise layer dropout, states of every depth, and ``torch.compile`` of one
block's code for all blocks.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from scripts.packaged_model.recipe import Recipe

BlockWeights = tuple[torch.Tensor, ...]
"""Input norm, q, k, v, o, post-attention norm, gate, up, down."""


def build_model(recipe: Recipe) -> LlamaForCausalLM:
    """Return a freshly initialised model in fp32, the same for every call with one recipe."""
    config = LlamaConfig(
        vocab_size=recipe.vocabulary,
        hidden_size=recipe.hidden,
        intermediate_size=recipe.mlp,
        num_hidden_layers=recipe.blocks,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        max_position_embeddings=recipe.context,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=None,
    )
    torch.manual_seed(recipe.seed)
    model = LlamaForCausalLM(config).float()
    with torch.no_grad():
        for layer in model.model.layers:
            # Residual outputs start small, so that depth does not blow up the state (GPT-2's rule).
            layer.self_attn.o_proj.weight.mul_((2 * recipe.blocks) ** -0.5)
            layer.mlp.down_proj.weight.mul_((2 * recipe.blocks) ** -0.5)
    return model


def norm(state: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return the RMS norm of a state in fp32, cast to the state's type."""
    wide = state.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6) * weight).to(state.dtype)


def rotate(heads: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Return heads [rows, heads, length, size] under rotary position embedding [length, size]."""
    half = heads.shape[-1] // 2
    turned = torch.cat((-heads[..., half:], heads[..., :half]), dim=-1)
    return (heads * cosine + turned * sine).to(heads.dtype)


def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Return causal attention [rows, heads, length, size] with keys and values [rows, kv_heads, length, size].

    On a CPU the queries go in chunks, so that inductor's softmax does half the work a full score matrix would need,
    which pays with heads this small.
    """
    if query.is_cuda:
        return functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    rows, heads, length, size = query.shape
    kv_heads = key.shape[1]
    group = heads // kv_heads
    grouped = (query * size**-0.5).view(rows, kv_heads, group, length, size)
    chunk = max(64, length // 8)
    parts = []
    for start in range(0, length, chunk):
        stop = min(length, start + chunk)
        part = grouped[:, :, :, start:stop].reshape(rows, kv_heads, group * (stop - start), size)
        scores = (part @ key[:, :, :stop].transpose(-1, -2)).float()
        place = torch.arange(start, stop, device=query.device).repeat(group)[:, None]
        scores = torch.where(torch.arange(stop, device=query.device) <= place, scores, -1e9)
        mixed = torch.softmax(scores, -1).to(value.dtype) @ value[:, :, :stop]
        parts.append(mixed.view(rows, kv_heads, group, stop - start, size))
    return torch.cat(parts, dim=3).view(rows, heads, length, size)


def block_pass(
    state: torch.Tensor,
    keep: torch.Tensor,
    weights: BlockWeights,
    cosine: torch.Tensor,
    sine: torch.Tensor,
    size: int,
) -> torch.Tensor:
    """Return the fp32 state [rows, length, hidden] after one block; ``keep`` [rows, 1, 1] scales what it adds."""
    first_norm, q, k, v, o, second_norm, gate, up, down = weights
    rows, length, _ = state.shape
    normed = norm(state, first_norm)

    def split(projected: torch.Tensor) -> torch.Tensor:
        return projected.view(rows, length, -1, size).transpose(1, 2)

    query = rotate(split(functional.linear(normed, q)), cosine, sine)
    key = rotate(split(functional.linear(normed, k)), cosine, sine)
    value = split(functional.linear(normed, v))
    mixed = attention(query, key, value)
    attended = state + keep * functional.linear(mixed.transpose(1, 2).reshape(rows, length, -1), o)
    normed = norm(attended, second_norm)
    mixed = functional.silu(functional.linear(normed, gate)) * functional.linear(normed, up)
    return attended + keep * functional.linear(mixed, down)


def head_loss(
    state: torch.Tensor, norm_weight: torch.Tensor, output: torch.Tensor, target: torch.Tensor
) -> torch.Tensor:
    """Return the mean cross-entropy of a state [rows, length, hidden] through the shared final norm and head."""
    logits = functional.linear(norm(state, norm_weight), output)
    return functional.cross_entropy(logits.float().flatten(0, 1), target.flatten())


def distillation_loss(
    state: torch.Tensor, teacher: torch.Tensor, norm_weight: torch.Tensor, output: torch.Tensor
) -> torch.Tensor:
    """Return the mean cross-entropy of one state's distribution to another's, both through the shared head.

    No gradient reaches the teacher, [rows, length, hidden] like the state.
    """
    wanted = functional.linear(norm(teacher.detach(), norm_weight.detach()), output.detach()).float()
    logits = functional.linear(norm(state, norm_weight), output).float()
    return -(wanted.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()


class Decoder:
    """Runs a ``LlamaForCausalLM``'s parameters forward."""

    def __init__(self, model: LlamaForCausalLM, compiled: bool = False) -> None:
        """Keep the model; with ``compiled``, one compiled block serves all of them."""
        self.model = model
        config: Any = model.config
        self._size = config.hidden_size // config.num_attention_heads
        self._block: Callable[..., torch.Tensor] = (
            torch.compile(block_pass, dynamic=False) if compiled else block_pass
        )
        self._loss: Callable[..., torch.Tensor] = (
            torch.compile(head_loss, dynamic=False) if compiled else head_loss
        )
        self._distillation: Callable[..., torch.Tensor] = (
            torch.compile(distillation_loss, dynamic=False) if compiled else distillation_loss
        )
        device = model.model.embed_tokens.weight.device
        power = torch.arange(0, self._size, 2, dtype=torch.float32, device=device) / self._size
        angle = torch.arange(config.max_position_embeddings, device=device)[:, None] / 10000.0**power
        angle = torch.cat((angle, angle), dim=-1)
        self._cosine, self._sine = angle.cos(), angle.sin()

    def rotation(self, place: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cosine and sine [size] of the rotary embedding at one place."""
        return self._cosine[place], self._sine[place]

    def states(self, tokens: torch.Tensor, keeps: Sequence[torch.Tensor] | None = None) -> list[torch.Tensor]:
        """Return the fp32 states [rows, length, hidden] after the embedding and after each block.

        ``keeps`` holds for each block what its contribution is multiplied by, [rows, 1, 1]: 0 drops it.
        """
        length = tokens.shape[1]
        cosine, sine = self._cosine[:length], self._sine[:length]
        state = functional.embedding(tokens, self.model.model.embed_tokens.weight)
        ones = torch.ones(tokens.shape[0], 1, 1, device=tokens.device)
        states = [state]
        for index, layer in enumerate(self.model.model.layers):
            keep = ones if keeps is None else keeps[index]
            state = self._block(state, keep, block_weights(layer), cosine, sine, self._size)
            states.append(state)
        return states

    def loss(self, state: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return the mean cross-entropy of one depth's state through the shared final norm and head."""
        return self._loss(state, self.model.model.norm.weight, self.model.model.embed_tokens.weight, target)

    def distillation_loss(self, state: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """Return the mean cross-entropy of one depth's distribution to another's, which is left as it is."""
        return self._distillation(
            state, teacher, self.model.model.norm.weight, self.model.model.embed_tokens.weight
        )

    def logits(self, state: torch.Tensor) -> torch.Tensor:
        """Return the logits [rows, length, vocabulary] of one depth's state through the shared norm and head."""
        return functional.linear(
            norm(state, self.model.model.norm.weight), self.model.model.embed_tokens.weight
        )


def block_weights(layer: Any) -> BlockWeights:
    """Return the parameters of a transformers Llama block in ``BlockWeights`` order."""
    attention, mlp = layer.self_attn, layer.mlp
    return (
        layer.input_layernorm.weight,
        attention.q_proj.weight,
        attention.k_proj.weight,
        attention.v_proj.weight,
        attention.o_proj.weight,
        layer.post_attention_layernorm.weight,
        mlp.gate_proj.weight,
        mlp.up_proj.weight,
        mlp.down_proj.weight,
    )
