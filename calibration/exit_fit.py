"""All exits of a model from the deployed stack's hidden states: heads, gates, and how good each is."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from exeunt.calibration.block_fit import Moments, ridge_map
from exeunt.calibration.exit_training import HeadTraining, Labelled, TrainedHead, planned_visits, train_head
from exeunt.calibration.gate_training import GateQuality, ProbeTraining, planned_gate_tokens, train_gate
from exeunt.calibration.progress import ProgressReport
from exeunt.calibration.teacher_forcing import ForcedModel
from exeunt.compression.decoder import Decoder
from exeunt.compression.exits import ExitHead, ExitNorm

HEAD_SHARE: Final = 0.6
"""Share of the fit split's tokens that heads are trained on; gates are trained on the others, which heads never saw."""
RIDGE_STRENGTH: Final = 1e-3


@dataclass(frozen=True, slots=True)
class FittedExit:
    """An exit in float32 on the CPU, and how good it is on the select split."""

    head: ExitHead
    training: TrainedHead
    gate: GateQuality


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
        """The fit split behind `block`."""
        return Labelled(self.states[block][: self.fit_tokens], self.top[: self.fit_tokens])

    def select(self, block: int) -> Labelled:
        """The select split behind `block`."""
        return Labelled(self.states[block][self.fit_tokens :], self.top[self.fit_tokens :])


def fit_exits(
    model: ForcedModel,
    norm: ExitNorm,
    data: ExitData,
    head_training: HeadTraining,
    probe_training: ProbeTraining,
    seed: int,
    progress: ProgressReport,
    teacher: Decoder,
) -> tuple[FittedExit, ...]:
    """Train an exit behind every block of `data.states`, shallowest first. `norm` is the model's final one.

    Gradients need a full-precision output matrix, `teacher`'s; what is judged goes through the deployed one, `model`'s.
    """
    decoder = model.decoder
    blocks = sorted(data.states)
    cut = int(data.fit_tokens * HEAD_SHARE)

    def project(state: Tensor) -> Tensor:
        wanted = state.to(decoder.dtype)
        return teacher.project(wanted) if torch.is_grad_enabled() else decoder.project_exit(wanted)

    generators = {block: torch.Generator().manual_seed(seed * 1000 + block) for block in blocks}
    with progress.phase("Fitting where exit heads start", len(blocks) * cut) as advance:
        ridges = _ridge_maps(norm, data, blocks, cut, advance)
    trained = {}
    with progress.phase("Training exit heads", len(blocks) * planned_visits(cut, head_training)) as advance:
        for block in blocks:
            learned, select = data.fit(block).rows(slice(0, cut)), data.select(block)
            trained[block] = train_head(
                norm, ridges[block], learned, select, project, head_training, generators[block], advance
            )
    fitted = []
    rest_tokens, select_tokens = data.fit_tokens - cut, len(data.top) - data.fit_tokens
    work = len(blocks) * planned_gate_tokens(rest_tokens, select_tokens, probe_training)
    with progress.phase("Training exit gates", work) as advance:
        for block in blocks:
            rest, select = data.fit(block).rows(slice(cut, None)), data.select(block)
            head, quality = train_gate(
                block, trained[block], rest, select, project, probe_training, generators[block], advance
            )
            fitted.append(FittedExit(head.to("cpu", torch.float32), trained[block], quality))
    return tuple(fitted)


@torch.no_grad()
def _ridge_maps(
    norm: ExitNorm, data: ExitData, blocks: Sequence[int], tokens: int, advance: Callable[[int], None]
) -> dict[int, Tensor]:
    """By block, the map from the normalised state there to what it lacks of the last block's: [H, H] float32."""
    device, hidden = norm.weight.device, norm.weight.shape[0]
    maps = {}
    for block in blocks:
        moments = Moments.zeros(hidden, hidden, device)
        for part in _chunks(tokens):
            early, late = (
                norm(states[part].to(device, torch.float32)) for states in (data.states[block], data.final)
            )
            moments.add(early, late - early)
            advance(len(early))
        maps[block] = ridge_map(moments, RIDGE_STRENGTH).float()
    return maps


def top_tokens(model: ForcedModel, final: Tensor, advance: Callable[[int], None]) -> Tensor:
    """The model's own top token for states [tokens, H] behind the last block: [tokens] int64 on the CPU."""
    parts = []
    for part in _chunks(len(final)):
        parts.append(model.top_tokens(final[part].to(model.decoder.device)).cpu())
        advance(len(parts[-1]))
    return torch.cat(parts)


def _chunks(tokens: int, size: int = 4096) -> list[slice]:
    return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]
