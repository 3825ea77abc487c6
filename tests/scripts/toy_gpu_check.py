"""What tests of the GPU check share: toy sizes on a CPU."""

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from scripts.gpu_check.report import Clock, Context, Report

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
check: Any = importlib.import_module("scripts.gpu_check.__main__")


def toy_context(tmp_path: Path, seconds: float = 100.0) -> Context:
    """Toy sizes on a CPU, with a report of their own."""
    return Context(CPU, True, Report(tmp_path / "out.json"), Clock(seconds))


def quick_run(*said: str) -> "subprocess.CompletedProcess[str]":
    """The script itself, at toy sizes on a CPU."""
    command = [sys.executable, "-m", "scripts.gpu_check", "--device", "cpu", "--quick", *said]
    around = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=ROOT, env=around, capture_output=True, text=True, timeout=280, check=False
    )


def breaks(context: Context, found: dict[str, Any]) -> None:
    """A section that breaks half-way."""
    found["half"] = 1
    raise RuntimeError("out of luck")
