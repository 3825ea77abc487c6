"""Drawing tokens from rows of logits."""

from exeunt.kernels.token_draw.dispatch import draw_tokens
from exeunt.kernels.token_draw.scores import penalise_scores, truncate_scores

__all__ = ["draw_tokens", "penalise_scores", "truncate_scores"]
