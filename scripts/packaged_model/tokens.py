"""Token streams on disk, and the batches a step draws from them as a pure function of the step's number."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from scripts.packaged_model.corpus import read_novels, read_stories
from scripts.packaged_model.recipe import Recipe
from scripts.packaged_model.tokenizer import load_tokenizer, train_tokenizer

SOURCES = ("stories", "novels")


def encode_documents(tokenizer: Tokenizer, documents: Iterable[str]) -> NDArray[np.uint16]:
    """Return all documents as one stream of token numbers, each document behind its separator."""
    encodings = tokenizer.encode_batch_fast(list(documents))
    parts = [np.asarray(encoding.ids, dtype=np.uint16) for encoding in encodings]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.uint16)


def prepare(data: Path, run: Path, recipe: Recipe) -> None:
    """Write the tokenizer and the token streams of both sources into a run's folder, unless they are there."""
    if (run / "novels.held_out.npy").exists():
        return
    splits = {
        "stories": read_stories(data / "tinystories" / "train_4M.txt"),
        "novels": read_novels(data / "novels"),
    }
    # The stories are a twentieth of the text but a third of the training: weigh them alike in the vocabulary.
    sample = splits["stories"].train + splits["novels"].train[:: max(1, len(splits["novels"].train) // 1400)]
    train_tokenizer(sample, recipe.vocabulary, recipe.context).save_pretrained(run / "tokenizer")
    tokenizer = load_tokenizer(run / "tokenizer").backend_tokenizer
    for source in SOURCES:
        split = splits[source]
        np.save(run / f"{source}.train.npy", encode_documents(tokenizer, split.train))
        np.save(run / f"{source}.held_out.npy", encode_documents(tokenizer, split.held_out))


@dataclass(slots=True)
class WindowStream:
    """Windows of one token stream in an order shuffled anew each epoch, addressed by their running number."""

    tokens: NDArray[np.uint16]
    length: int
    seed: int
    _epoch: int = -1
    _order: NDArray[np.int64] | None = None
    _offset: int = 0

    def window(self, number: int) -> NDArray[np.uint16]:
        """Return ``length + 1`` tokens: the inputs and, shifted by one, the targets."""
        count = (len(self.tokens) - self.length - 1) // self.length
        if count < 1:
            raise ValueError(f"a stream of {len(self.tokens)} tokens holds no window of {self.length}")
        epoch, place = divmod(number, count)
        if epoch != self._epoch or self._order is None:
            generator = np.random.default_rng((self.seed, epoch))
            self._epoch, self._order = epoch, generator.permutation(count)
            self._offset = int(generator.integers(self.length))
        start = int(self._order[place]) * self.length + self._offset
        return self.tokens[start : start + self.length + 1]


class Batches:
    """The training batches of a recipe; batch ``step`` is the same whenever and wherever it is asked for."""

    def __init__(self, run: Path, recipe: Recipe) -> None:
        """Open the training streams of a run's folder."""
        self._recipe = recipe
        self._streams = {
            source: WindowStream(
                np.load(run / f"{source}.train.npy", mmap_mode="r"), recipe.context, recipe.seed + index
            )
            for index, source in enumerate(SOURCES)
        }

    def batch(self, step: int, rows: int, branched: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return inputs and targets of a step, both int64 [windows * rows, context / rows].

        From step ``branched`` on the branches' mixture holds, before it (or without it) the trunk's; either way a
        source goes on where it stood.
        """
        recipe = self._recipe
        in_trunk = step if branched is None else min(step, branched)
        stories = (
            recipe.story_windows if in_trunk == step and step != branched else recipe.branch_story_windows
        )
        earlier = in_trunk * recipe.story_windows + (step - in_trunk) * recipe.branch_story_windows
        spans = {
            "stories": (earlier, stories),
            "novels": (step * recipe.windows - earlier, recipe.windows - stories),
        }
        windows = [
            self._streams[source].window(first + index)
            for source, (first, count) in spans.items()
            for index in range(count)
        ]
        tokens = torch.from_numpy(np.stack(windows).astype(np.int64))  # [windows, context + 1]
        length = recipe.context // rows
        return tokens[:, :-1].reshape(-1, length), tokens[:, 1:].reshape(-1, length)


def held_out_rows(run: Path, source: str, length: int, limit: int | None = None) -> torch.Tensor:
    """Return consecutive held-out windows of a source, int64 [rows, length + 1], at most ``limit`` of them."""
    tokens = np.load(run / f"{source}.held_out.npy")
    count = (len(tokens) - 1) // length
    rows = [tokens[index * length : (index + 1) * length + 1] for index in range(count)]
    if limit is not None and count > limit:
        rows = [rows[index * count // limit] for index in range(limit)]
    return torch.from_numpy(np.stack(rows).astype(np.int64))
