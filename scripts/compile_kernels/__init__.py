"""Compiles every Triton kernel to machine code for several GPUs, without one, and tells what it takes there."""
