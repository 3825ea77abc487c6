"""A pass through a whole model in one native call: embedding, blocks, the exits on the way, head and draws."""

from exeunt.kernels.model_pass.batch import AtExit, PassBatch, PassRows, PassTokens
from exeunt.kernels.model_pass.native import MOST_EXITS, NativePass, Passed, PassOutcome

__all__ = [
    "MOST_EXITS",
    "AtExit",
    "NativePass",
    "PassBatch",
    "PassOutcome",
    "PassRows",
    "PassTokens",
    "Passed",
]
