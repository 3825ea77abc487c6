"""A small architecture for tests that need a spec and no model."""

from dataclasses import replace
from typing import Any

from exeunt.compression.architecture import Architecture, read_architecture


def tiny_spec(**changes: Any) -> Architecture:
    """A Llama's spec with some fields changed."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=131,
        hidden_size=48,
        intermediate_size=100,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=160,
    )
    return replace(read_architecture(config), **changes)
