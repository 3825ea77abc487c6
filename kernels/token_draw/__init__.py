"""Drawing tokens from rows of logits."""

from exeunt.kernels.token_draw.dispatch import draw_tokens

__all__ = ["draw_tokens"]
