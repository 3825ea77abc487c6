"""Training state on disk: weights, optimizers, position; replaced atomically, so a crash leaves the older one."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from scripts.packaged_model.recipe import Recipe, Stage


@dataclass(slots=True)
class Checkpoint:
    """Where a stage of training stands.

    ``step`` counts all optimizer steps since the beginning and is also the position in the data and the state of the
    random numbers: batches, sampled depths and dropped blocks are functions of the seed and the step.
    ``first`` is the step at which this stage began, ``steps`` how many it has in all, ``seconds`` its wall time.
    """

    recipe: dict[str, Any]
    stage: Stage
    step: int
    first: int
    steps: int
    seconds: float
    trunk_seconds: float
    model: dict[str, torch.Tensor]
    muon: dict[str, Any]
    adam: dict[str, Any]

    def save(self, path: Path) -> None:
        """Write the checkpoint beside its path and move it there in one step."""
        partial = path.with_suffix(".partial")
        with partial.open("wb") as file:
            torch.save({name: getattr(self, name) for name in self.__slots__}, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)


def load_checkpoint(path: Path, recipe: Recipe, device: torch.device) -> Checkpoint:
    """Return a saved checkpoint; raise ValueError if it was made with other sizes or another seed."""
    checkpoint = Checkpoint(**torch.load(path, map_location=device, weights_only=True))
    for name in ("blocks", "hidden", "heads", "kv_heads", "mlp", "vocabulary", "context", "seed"):
        if checkpoint.recipe[name] != getattr(recipe, name):
            raise ValueError(
                f"{path} has {name} {checkpoint.recipe[name]}, the recipe says {getattr(recipe, name)}"
            )
    return checkpoint
