"""All blocks of a model, the exits on the way and its own head, in one native call."""

from exeunt.kernels.decode_pass.batch import AtExit, PassBatch, PassRows, PassTokens
from exeunt.kernels.decode_pass.native import NativePass, Passed

__all__ = ["AtExit", "NativePass", "PassBatch", "PassRows", "PassTokens", "Passed"]
