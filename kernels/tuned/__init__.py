"""Launches of the GPU's linear layers that were measured: a file per kind of GPU, their look-up, and the search."""
