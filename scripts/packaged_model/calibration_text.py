"""Text the model wrote itself, on which its exits and quantized weights are calibrated."""

from pathlib import Path

import numpy as np
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from scripts.packaged_model.corpus import SEPARATOR
from scripts.packaged_model.sampler import Sampler, documents
from scripts.packaged_model.tokens import SOURCES

START = 8
"""Tokens of a training document that a prompted row begins with (the separator included)."""


def calibration_starts(run: Path, rows: int, seed: int) -> torch.Tensor:
    """Return int64 [rows, START]: the first words of random training documents, half stories and half novels."""
    generator = np.random.default_rng(seed)
    parts = []
    for index, source in enumerate(SOURCES):
        tokens = np.load(run / f"{source}.train.npy", mmap_mode="r")
        firsts = np.flatnonzero(tokens[: len(tokens) - START] == 0)
        chosen = generator.choice(firsts, size=(rows + index) // 2, replace=False)
        parts.append(np.stack([tokens[first : first + START] for first in chosen]))
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))


def write_calibration_text(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    run: Path,
    path: Path,
    *,
    tokens: int,
    length: int,
    batch: int,
    seed: int,
) -> int:
    """Write at least ``tokens`` sampled tokens (temperature 1) with separators between documents; return how many.

    Of every three rows one starts from the separator alone and two from the first words of training documents.
    """
    sampler = Sampler(model)
    written = 0
    partial = path.with_suffix(".partial")
    with partial.open("w", encoding="utf-8") as file:
        for round_number in range(-(-tokens // (batch * length))):
            prompted = calibration_starts(run, batch - batch // 3, seed + round_number)
            bare = torch.zeros(batch // 3, 1, dtype=torch.int64)
            for starts in (prompted, bare):
                rows = sampler.rows(starts, length, 1.0, seed + round_number)
                written += rows.numel()
                for document in documents(rows):
                    file.write(tokenizer.decode(document).strip() + f"\n{SEPARATOR}\n")
    partial.replace(path)
    return written
