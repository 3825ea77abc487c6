"""Drawing tokens in plain PyTorch: what the native version is tested against."""

import torch
from torch import Tensor


def exponential_noise(keys: Tensor, token_keys: Tensor) -> Tensor:
    """Return standard exponential noise [rows, vocab] float32 of the rows' keys [rows, 2] and the tokens' [vocab].

    Keys are int32. Minus its logarithm is Gumbel noise. Values lie in 1.2e-10 .. 23, never 0 or infinite. The hash is
    integer arithmetic, exact everywhere; the logarithm is taken in float64 and rounded to float32, so that the last
    bits in which devices' logarithms differ are rounded away.
    """
    bits = token_keys[None] ^ keys[:, :1]  # [rows, vocab] int32
    bits ^= (bits >> 16) & 0xFFFF  # int32 shifts drag the sign along: the masks make them logical
    bits *= 0x21F0AAAD
    bits += keys[:, 1:]
    bits ^= (bits >> 15) & 0x1FFFF
    bits *= 0x735A2D97
    bits ^= (bits >> 15) & 0x1FFFF
    uniform = bits.double().add_(2.0**31 + 0.5).mul_(2.0**-32)  # exact, strictly between 0 and 1
    return uniform.log_().neg_().float()


def draw_tokens_reference(
    logits: Tensor, scores: Tensor, temperatures: Tensor, keys: Tensor, token_keys: Tensor
) -> tuple[Tensor, Tensor]:
    """Return what `draw_tokens` returns."""
    greedy = temperatures <= 0
    divisor = torch.where(greedy, 1.0, temperatures)[:, None]
    weights = ((scores - scores.amax(dim=-1, keepdim=True)) / divisor).softmax(dim=-1)
    drawn = (weights / exponential_noise(keys, token_keys)).argmax(dim=-1)
    ids = torch.where(greedy, scores.argmax(dim=-1), drawn)
    chosen, total = scores.gather(1, ids[:, None]).squeeze(1), scores.logsumexp(dim=-1)
    logprobs = logits.log_softmax(dim=-1).gather(1, ids[:, None]).squeeze(1)
    usable = chosen.isfinite() & total.isfinite()
    return ids, torch.where(usable, logprobs, torch.nan)
