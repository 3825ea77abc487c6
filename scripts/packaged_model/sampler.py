"""Samples text from the model, many rows at once: unedited examples, and the calibration text."""

from collections.abc import Iterator

import torch
from torch.nn import functional
from transformers import LlamaForCausalLM

from scripts.packaged_model.decoder import Decoder, block_weights, norm, rotate


class Sampler:
    """Draws tokens at a temperature with a cache of keys and values; the same for the same seed and machine."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        """Keep the model; it computes in the type of its weights."""
        self._decoder = Decoder(model)
        self._layers = list(model.model.layers)
        self._context = int(model.config.max_position_embeddings)

    @torch.no_grad()
    def rows(self, starts: torch.Tensor, length: int, temperature: float, seed: int) -> torch.Tensor:
        """Return int64 [rows, length] tokens that continue the starts [rows, start]; documents follow each other."""
        if not starts.shape[1] <= length <= self._context:
            raise ValueError(f"cannot sample {length} tokens from {starts.shape[1]} within {self._context}")
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.zeros(starts.shape[0], length, dtype=torch.int64)
        tokens[:, : starts.shape[1]] = starts
        caches = [self._empty_cache(starts.shape[0], length) for _ in self._layers]
        for place in range(length - 1):
            logits = self._step(tokens[:, place], place, caches)
            if place + 1 >= starts.shape[1]:
                tokens[:, place + 1] = drawn(logits / temperature, generator)
        return tokens

    def _empty_cache(self, rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        config = self._decoder.model.config
        size = config.hidden_size // config.num_attention_heads
        shape = (rows, config.num_key_value_heads, length, size)
        return torch.zeros(shape), torch.zeros(shape)

    def _step(
        self, tokens: torch.Tensor, place: int, caches: list[tuple[torch.Tensor, torch.Tensor]]
    ) -> torch.Tensor:
        """Return the logits [rows, vocabulary] after one token [rows] at a place, and fill the caches there."""
        cosine, sine = self._decoder.rotation(place)
        state = functional.embedding(tokens, self._decoder.model.model.embed_tokens.weight)
        for layer, (keys, values) in zip(self._layers, caches, strict=True):
            first_norm, q, k, v, o, second_norm, gate, up, down = block_weights(layer)
            normed = norm(state, first_norm)
            rows, kv_heads, _, size = keys.shape
            # Query heads that share a KV head stand together: [rows, kv_heads, group, size].
            query = rotate(functional.linear(normed, q).view(rows, kv_heads, -1, size), cosine, sine)
            keys[:, :, place] = rotate(functional.linear(normed, k).view(rows, kv_heads, size), cosine, sine)
            values[:, :, place] = functional.linear(normed, v).view(rows, kv_heads, size)
            mixed = functional.scaled_dot_product_attention(
                query, keys[:, :, : place + 1], values[:, :, : place + 1]
            )
            state = state + functional.linear(mixed.reshape(rows, -1), o)
            normed = norm(state, second_norm)
            state = state + functional.linear(
                functional.silu(functional.linear(normed, gate)) * functional.linear(normed, up), down
            )
        return self._decoder.logits(state)


def drawn(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return one token a row, int64 [rows], drawn from the softmax of logits [rows, vocabulary].

    It inverts the cumulated odds at one random number a row; ``multinomial`` would draw one for every token there is.
    """
    odds = torch.softmax(logits, -1).cumsum(-1)
    points = torch.rand(logits.shape[0], 1, generator=generator) * odds[:, -1:]
    return torch.searchsorted(odds, points, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)


def documents(rows: torch.Tensor, separator: int = 0) -> Iterator[list[int]]:
    """Yield the documents in sampled rows [rows, length]: the runs of tokens between separators."""
    for row in rows.tolist():
        document: list[int] = []
        for token in [*row, separator]:
            if token != separator:
                document.append(token)
            elif document:
                yield document
                document = []
