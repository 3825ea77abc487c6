"""All exits of a model from the deployed stack's hidden states: heads, gates, and how good each is."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from exeunt.calibration.block_fit import Moments, ridge_map
from exeunt.calibration.compute import counted_costs
from exeunt.calibration.exit_choice import ExitCosts
from exeunt.calibration.exit_records import FittedExit as FittedExit
from exeunt.calibration.exit_records import read_exit, read_head, write_exit, write_head
from exeunt.calibration.exit_training import (
    HeadTraining,
    Labelled,
    Loss,
    Project,
    TrainedHead,
    planned_visits,
    train_head,
)
from exeunt.calibration.exit_worth import ExitWorth
from exeunt.calibration.gate_training import TOPS, ProbeTraining, planned_gate_tokens, train_gate
from exeunt.calibration.journal import Journal, NoJournal
from exeunt.calibration.loss_comparison import LossComparison, compare_losses
from exeunt.calibration.progress import ProgressReport
from exeunt.calibration.shortlist_choice import choose_shortlist, planned_shortlist_tokens
from exeunt.calibration.teacher_forcing import ForcedModel
from exeunt.compression.decoder import Decoder
from exeunt.compression.exit_output import Shortlist
from exeunt.compression.exits import ExitNorm
from exeunt.compression.linear import FullLinear
from exeunt.kernels.native.build import processor

HEAD_SHARE: Final = 0.6
"""Share of the fit split's tokens that heads are trained on; gates are trained on the others, which heads never saw."""
RIDGE_STRENGTH: Final = 1e-3
LOSSES: Final[tuple[Loss, ...]] = ("both", "top token", "distribution")
"""What heads are trained by: the first, and where losses are compared all of them."""
_BF16_FEATURES: Final = {
    "avx512_bf16",
    "amx_bf16",
    "bf16",
}  # as processors call the multiplication of bfloat16


@dataclass(frozen=True, slots=True)
class ExitData:
    """The deployed stack's states behind each exit's block, [tokens, H] on the CPU, and its top tokens [tokens].

    The first `fit_tokens` tokens are those of the fit split, the others those of the select split.
    """

    states: Mapping[int, Tensor]
    final: Tensor  # [tokens, H] behind the last block
    top: Tensor
    fit_tokens: int

    def fit(self, block: int) -> Labelled:
        """The fit split behind `block`, and behind the last one."""
        part = slice(0, self.fit_tokens)
        return Labelled(self.states[block][part], self.top[part], self.final[part])

    def select(self, block: int) -> Labelled:
        """The select split behind `block`."""
        return Labelled(self.states[block][self.fit_tokens :], self.top[self.fit_tokens :])

    def only(self, blocks: Collection[int]) -> "ExitData":
        """The same behind some of the blocks."""
        return ExitData(
            {block: self.states[block] for block in blocks}, self.final, self.top, self.fit_tokens
        )

    @property
    def head_tokens(self) -> int:
        """Tokens that heads are trained on, the first of the fit split."""
        return int(self.fit_tokens * HEAD_SHARE)


def fit_exits(
    model: ForcedModel,
    norm: ExitNorm,
    data: ExitData,
    head_training: HeadTraining,
    probe_training: ProbeTraining,
    seed: int,
    progress: ProgressReport,
    teacher: Decoder,
    *,
    compared: Collection[int] = (),
    risks: Sequence[float] = (),
    journal: Journal | None = None,
    costs: ExitCosts | None = None,
) -> tuple[FittedExit, ...]:
    """Train an exit behind every block of `data.states`, shallowest first. `norm` is the model's final one.

    Gradients need a full-precision output matrix, `teacher`'s; what is judged goes through the deployed one, `model`'s.
    Behind the blocks `compared` heads are trained by each loss alone, too, and what may leave at `risks` is compared;
    the best head serves. What `journal` knows is not done again, heads and exits one by one. With `costs` a shortlist
    of tokens may be looked at first at all exits, where that is expected to save more; all logits decide in any case.
    """
    journal = journal or NoJournal()
    project, spec = training_projection(model, teacher), model.decoder.spec
    held = {block: read_exit(journal, norm, block) for block in sorted(data.states)}
    missing = [block for block, found in held.items() if found is None]
    heads = _heads(norm, data.only(missing), project, head_training, seed, progress, compared, risks, journal)
    trained = {block: head for block, (head, _) in heads.items()}
    trained |= {block: found.training for block, found in held.items() if found is not None}
    unseen = {block: _unseen(trained[block], norm, data) for block in missing}
    select_tokens = len(data.top) - data.fit_tokens
    listing = costs if len(missing) == len(held) else None  # or those that are held say what decides
    work = 0 if listing is None else planned_shortlist_tokens(len(trained), select_tokens)
    work += sum(
        planned_gate_tokens(data.fit_tokens - unseen[block], select_tokens, probe_training)
        for block in missing
    )
    with progress.phase("Training exit gates", work) as advance:
        shortlist = next((found.head.shortlist for found in held.values() if found is not None), None)
        if listing is not None:
            shortlist = choose_shortlist(
                trained,
                data.select,
                data.top[: data.fit_tokens],
                spec.vocab_size,
                project,
                model.blocks,
                listing,
                counted_costs(spec, probe_training.units, TOPS, [size for size, _ in listing.looks]),
                risks,
                advance,
            ).shortlist
        for block in missing:
            rest, select = data.fit(block).rows(slice(unseen[block], None)), data.select(block)
            generator = _generator(seed, block, 1)
            head, quality = train_gate(
                block,
                trained[block],
                rest,
                select,
                project,
                probe_training,
                generator,
                advance,
                shortlist,
                _worth(block, model.blocks, costs, shortlist, risks),
            )
            fitted = FittedExit(head.to("cpu", torch.float32), trained[block], quality, heads[block][1])
            write_exit(journal, fitted)
            held[block] = fitted
    return tuple(found for found in held.values() if found is not None)


def _worth(
    block: int, blocks: int, costs: ExitCosts | None, shortlist: Shortlist | None, risks: Sequence[float]
) -> ExitWorth | None:
    """What an exit behind `block` saves and costs with looks at a shortlist; None where nothing is known of that."""
    if costs is None or shortlist is None or not risks:
        return None
    return ExitWorth(block + 1, blocks, costs.with_shortlist(len(shortlist)), risks)


def _unseen(head: TrainedHead, norm: ExitNorm, data: ExitData) -> int:
    """The first token of the fit split that `head` was not trained on: 0 where it is still the model's own."""
    own = not bool(head.adapter.any()) and torch.equal(head.norm.weight, norm.weight)
    return 0 if own else data.head_tokens


def _heads(
    norm: ExitNorm,
    data: ExitData,
    project: Project,
    training: HeadTraining,
    seed: int,
    progress: ProgressReport,
    compared: Collection[int],
    risks: Sequence[float],
    journal: Journal,
) -> dict[int, tuple[TrainedHead, LossComparison | None]]:
    """A head behind every block of `data`, and how the losses compare where they were compared."""
    heads = {block: read_head(journal, norm, block) for block in sorted(data.states)}
    missing = [block for block, found in heads.items() if found is None]
    cut = data.head_tokens
    with progress.phase("Fitting where exit heads start", len(missing) * cut) as advance:
        ridges = {block: ridge_start(norm, data, block, cut, advance) for block in missing}
    rounds = sum(len(LOSSES) if block in compared else 1 for block in missing)
    with progress.phase("Training exit heads", rounds * planned_visits(cut, training)) as advance:
        for block in missing:
            learned, select = data.fit(block).rows(slice(0, cut)), data.select(block)
            start = ridges.pop(block)  # H × H of every candidate are much of a large model's memory
            tried = {
                loss: train_head(
                    norm,
                    start,
                    learned,
                    select,
                    project,
                    training,
                    _generator(seed, block, 0),
                    advance,
                    loss,
                )
                for loss in (LOSSES if block in compared else LOSSES[:1])
            }
            head, losses = tried[LOSSES[0]], None
            if block in compared:
                head, losses = compare_losses(block, tried, norm, start, select, project, risks)
            write_head(journal, block, head, losses)
            heads[block] = head, losses
    return {block: found for block, found in heads.items() if found is not None}


def training_projection(model: ForcedModel, teacher: Decoder) -> Project:
    """What heads are trained through, `teacher`'s matrix, where gradients are on; else `model`'s for exits.

    Where the processor multiplies bfloat16 by itself, gradients go through the matrix in that form: heads come out as
    good, and the product, most of what training costs, takes a third of the time.
    """
    decoder, output = model.decoder, teacher.output
    matrix: Tensor | None = None
    fast = decoder.device.type == "cpu" and not _BF16_FEATURES.isdisjoint(processor().split())
    if fast and isinstance(output, FullLinear) and output.bias is None:
        matrix = output.weight.to(torch.bfloat16)

    def project(state: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return decoder.project_exit(state.to(decoder.dtype))
        if matrix is None:
            return teacher.project(state.to(decoder.dtype))
        return F.linear(state.to(torch.bfloat16), matrix).float()

    return project


@torch.no_grad()
def ridge_start(
    norm: ExitNorm,
    data: ExitData,
    block: int,
    tokens: int,
    advance: Callable[[int], None] = lambda _tokens: None,
) -> Tensor:
    """The map from the normalised state behind `block` to what it lacks of the last block's: [H, H] float32.

    Of the first `tokens` tokens, which `advance` is told.
    """
    device, hidden = norm.weight.device, norm.weight.shape[0]
    moments = Moments.zeros(hidden, hidden, device)
    for part in _chunks(tokens):
        early, late = (
            norm(states[part].to(device, torch.float32)) for states in (data.states[block], data.final)
        )
        moments.add(early, late - early)
        advance(len(early))
    return ridge_map(moments, RIDGE_STRENGTH).float()


def top_tokens(model: ForcedModel, final: Tensor, advance: Callable[[int], None]) -> Tensor:
    """The model's own top token for states [tokens, H] behind the last block: [tokens] int64 on the CPU."""
    parts = []
    for part in _chunks(len(final)):
        parts.append(model.top_tokens(final[part].to(model.decoder.device)).cpu())
        advance(len(parts[-1]))
    return torch.cat(parts)


def _generator(seed: int, block: int, use: int) -> torch.Generator:
    """A generator of its own for each use, so that what is read from a journal changes no other's draws."""
    return torch.Generator().manual_seed((seed * 1000 + block) * 2 + use)


def _chunks(tokens: int, size: int = 4096) -> list[slice]:
    return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]
