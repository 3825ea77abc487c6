"""Checks and speeds on a GPU, in one bounded run: `python -m scripts.gpu_check`, which `make gpu-check` calls."""
