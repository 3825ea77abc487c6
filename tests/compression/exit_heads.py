"""Random exit heads, and their gate as a plain formula, row by row: for the tests of exits."""

import math
from typing import Literal

import torch
from torch import Tensor

from exeunt.compression.exit_output import ExitOutput, Shortlist
from exeunt.compression.exits import (
    ExitConfirmation,
    ExitHead,
    ExitJudge,
    ExitProbe,
)
from exeunt.compression.linear import FullLinear, Int4Linear
from exeunt.compression.norm import Norm
from exeunt.kernels.int4_linear import quantize

NormKind = Literal["rms", "layer"]
HIDDEN, UNITS, VOCAB = 24, 16, 37


def exit_head(kind: NormKind = "rms", block: int = 3, screen_ratio: float = 0.5, seed: int = 0) -> ExitHead:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    norm = Norm(kind, 1 + 0.1 * random(HIDDEN), random(HIDDEN) if kind == "layer" else None, 1e-5)
    probe = ExitProbe(random(UNITS, HIDDEN) / 5, random(UNITS), random(UNITS) / 2, random())
    combine = torch.tensor([0.7, 0.4, 0.2, -0.3])
    return ExitHead(block, norm, random(HIDDEN, HIDDEN) / 10, probe, combine, screen_ratio)


def exit_judge(seed: int = 2) -> ExitJudge:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return ExitJudge(random(5, UNITS) / 5, random(UNITS) / 5, random(UNITS) / 2, random())


def exit_confirmation(list_ratio: float = 0.6, seed: int = 3) -> ExitConfirmation:
    return ExitConfirmation(exit_judge(seed), torch.tensor([0.5, 0.3, 0.1, -0.2]), list_ratio)


SHORTLIST = Shortlist(torch.tensor([0, 3, 4, 8, 9, 17, 21, 30, 36]))


class CountingOutput:
    """An output matrix that counts the rows it is asked for."""

    def __init__(self) -> None:
        self.weight = torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(9))
        self.calls: list[int] = []

    def __call__(self, state: Tensor) -> Tensor:
        self.calls.append(state.shape[0])
        return state @ self.weight.T


def naive_gate(head: ExitHead, hidden: Tensor, output: Tensor) -> tuple[list[float], list[float], Tensor]:
    """Probe probability, confidence and logits of each row, in float64, from the formulas alone."""
    probes, confidences, all_logits = [], [], []
    for row in hidden.double():
        if head.norm.kind == "layer":
            normed = (row - row.mean()) / (row.var(unbiased=False) + head.norm.eps).sqrt()
        else:
            normed = row / (row.pow(2).mean() + head.norm.eps).sqrt()
        normed = normed * head.norm.weight.double()
        if head.norm.bias is not None:
            normed = normed + head.norm.bias.double()
        state = normed + head.adapter.double() @ normed
        units = head.probe.hidden_weight.double() @ state + head.probe.hidden_bias.double()
        units = units * 0.5 * (1 + torch.erf(units / math.sqrt(2)))
        probe = float(units @ head.probe.output_weight.double() + head.probe.output_bias)
        logits = output.double() @ state
        ordered = sorted(logits.tolist(), reverse=True)
        p = math.exp(ordered[0]) / sum(math.exp(value) for value in ordered)
        features = [probe, math.log(p / (1 - p)), ordered[0] - ordered[1], 1.0]
        score = sum(w * f for w, f in zip(head.combine.tolist(), features, strict=True))
        probes.append(1 / (1 + math.exp(-probe)))
        confidences.append(1 / (1 + math.exp(-score)))
        all_logits.append(logits)
    return probes, confidences, torch.stack(all_logits)


def exit_outputs(dtype: torch.dtype) -> list[ExitOutput]:
    """The output matrix in full precision and in INT4."""
    weight = torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(9))
    return [
        ExitOutput(FullLinear(weight.to(dtype)), dtype),
        ExitOutput(Int4Linear(quantize(weight, 8)), dtype),
    ]


def counted_output() -> tuple[ExitOutput, list[tuple[int, int]]]:
    """A random output matrix, and the rows and outputs of every projection with it or with some of its rows."""
    asked: list[tuple[int, int]] = []

    class Counted(FullLinear):
        def __call__(self, x: Tensor) -> Tensor:
            asked.append((len(x), self.out_features))
            return super().__call__(x)

        def pick(self, outputs: Tensor) -> "Counted":
            return Counted(self.weight[outputs])

    weight = torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(9))
    return ExitOutput(Counted(weight), torch.float32), asked
