"""What the two papers behind the method report, beside which figures of one's own are shown."""

from typing import Final

EXITS_SOURCE: Final = "“Variance Is Not Importance”, arXiv 2604.20682"
EXITS_PERPLEXITY: Final = 11.32
EXITS_TRADE_OFF: Final = ((0.064, 4.31), (0.133, 10.66), (0.174, 16.04), (0.269, 35.75))
"""Softmax routing on Mistral 7B: share of compute saved, and perplexity over `EXITS_PERPLEXITY`, for confidences of
0.95, 0.80, 0.70 and 0.50."""

KV_SOURCE: Final = "“Quantization Dominates Rank Reduction for KV-Cache Compression”, arXiv 2604.11501"
KV_JOINT: Final = (9.19, 9.37)
"""Perplexity of Mistral 7B with full keys and values, and with both in INT4."""

LINEAR_REDUCTION: Final = 34
"""Parameters of Mistral's block 31 for each of the map that replaced it, at +1.71 perplexity."""
