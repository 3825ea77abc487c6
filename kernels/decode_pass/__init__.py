"""A decode step of all blocks, the exits on the way and the model's own head, in one native call."""

from exeunt.kernels.decode_pass.native import NativePass, Passed

__all__ = ["NativePass", "Passed"]
