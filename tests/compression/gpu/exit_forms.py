"""Exits of every form that a gate takes, with random weights."""

from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import Tensor

from exeunt.compression.decoder import Decoder
from exeunt.compression.exit_output import Shortlist
from exeunt.compression.exits import ExitConfirmation, ExitHead, ExitJudge, ExitProbe
from exeunt.compression.norm import Norm

Form = Literal["whole", "listed", "confirmed"]
FORMS: tuple[Form, ...] = get_args(Form)


def exit_of_form(decoder: Decoder, block: int, form: Form, *, seed: int, units: int, listed: int) -> ExitHead:
    """An exit behind `block` that looks at all logits, at a list of every third below `listed`, or has it confirmed."""
    generator, hidden = torch.Generator().manual_seed(seed), decoder.spec.hidden_size

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    head = ExitHead(
        block,
        Norm("rms", torch.ones(hidden), None, 1e-5),
        random(hidden, hidden) / 9,
        ExitProbe(random(units, hidden) / 7, random(units), random(units), torch.tensor(0.5)),
        torch.tensor([0.8, 0.3, 0.2, 0.0]),
        0.3,
    )
    if form != "whole":
        judge = ExitJudge(random(4, units) / 5, random(units) / 5, random(units), torch.tensor(0.0))
        head = replace(head, judge=judge, shortlist=Shortlist(torch.arange(0, listed, 3)))
        if form == "confirmed":
            last = ExitConfirmation(judge, torch.tensor([0.6, 0.3, 0.2, 0.3]), 0.8)
            head = replace(head, confirmation=last)
    return head.to(decoder.device, decoder.dtype)
