"""Exit heads: what decides whether a token may leave after a block, and what it would say there.

An exit has a *head* (a norm and an adapter in front of the model's own output matrix) and a *gate* for the
probability that the exit's most likely token is the full model's. The gate has two steps: a small probe on
the head's state screens every row; the vocabulary projection runs only for rows that pass, and how sure that
projection is joins the probe's opinion in a logistic regression.

A row's decision depends on that row alone: nothing here reduces over rows, sorts rows or budgets them. With the
native kernels that holds to the bit; where a library's matrix product runs instead, its rounding may differ with the
number of rows, and a decision with it for a row that stands within that distance of its threshold.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from exeunt.compression.exit_output import ExitOutput
from exeunt.compression.norm import Norm
from exeunt.kernels.exit_gate import ExitWeights, GateRule, exit_gate, exit_state, gate_confidence

FEATURES: Final = ("probe", "top_log_odds", "margin")
"""What the logistic regression weighs, in the order of `ExitHead.combine`; a constant 1 follows."""

_WHOLE_VECTORS: Final = 64  # a multiple of what PyTorch computes at once on any processor
METADATA_KEY: Final = "exits"

ExitNorm = Norm  # the norm in front of an exit's adapter is one like any other


class ExitHeadError(ValueError):
    """Tensors or settings that do not form an exit head."""


@dataclass(frozen=True, slots=True)
class ExitProbe:
    """A perceptron H → P → 1 with GELU, in float32 whatever the model's dtype."""

    hidden_weight: Tensor  # [P, H]
    hidden_bias: Tensor  # [P]
    output_weight: Tensor  # [P]
    output_bias: Tensor  # []


@dataclass(frozen=True, slots=True)
class GateResult:
    """What the gate of one exit decided for T rows, K of which were projected onto the vocabulary."""

    confidence: Tensor  # [T] float32, probability that exit and full model agree; 0 for rows not projected
    leaves: Tensor  # [T] bool
    projected: Tensor  # [K] int64, ascending row numbers
    logits: Tensor  # [K, V] float32, the exit's raw logits of those rows; [0, 0] when no row was projected


@dataclass(frozen=True, slots=True)
class ExitHead:
    """The exit after block `block` (counted from 0), in the form that serves.

    `combine` holds the weights of the logistic regression over `FEATURES` and its constant. A row whose probe
    says less than `screen_ratio` × its threshold is not projected.
    """

    block: int
    norm: Norm
    adapter: Tensor  # [H, H]
    probe: ExitProbe
    combine: Tensor  # [4] float32
    screen_ratio: float
    weights: ExitWeights = field(init=False, repr=False, compare=False)  # the same as the kernels take it

    def __post_init__(self) -> None:
        hidden = int(self.norm.weight.shape[0])
        units = int(self.probe.hidden_bias.shape[0])
        _expect_shapes(
            self.name,
            {
                "norm.bias": (self.norm.bias, (hidden,)),
                "adapter": (self.adapter, (hidden, hidden)),
                "probe.hidden_weight": (self.probe.hidden_weight, (units, hidden)),
                "probe.output_weight": (self.probe.output_weight, (units,)),
                "probe.output_bias": (self.probe.output_bias, ()),
                "combine": (self.combine, (len(FEATURES) + 1,)),
            },
        )
        if not 0.0 <= self.screen_ratio <= 1.0:
            raise ExitHeadError(f"{self.name}: screen_ratio is {self.screen_ratio}, it must be in [0, 1]")
        probe = self.probe
        weights = ExitWeights(
            self.norm.weight,
            self.norm.bias,
            self.norm.eps,
            self.adapter,
            (probe.hidden_weight, probe.hidden_bias, probe.output_weight, probe.output_bias),
        )
        object.__setattr__(self, "weights", weights)

    @property
    def name(self) -> str:
        """What responses, metrics and the manifest call this exit."""
        return f"block_{self.block}"

    @property
    def depth(self) -> int:
        """Blocks passed by a token that leaves here."""
        return self.block + 1

    @property
    def nbytes(self) -> int:
        """Resident size in bytes."""
        return sum(tensor.nbytes for tensor in exit_tensors([self]).values())

    def read(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """What the output matrix is applied to, n + A n with n = norm(hidden), and the probe's logit of it.

        `hidden` is [T, H]; the state comes in its shape and dtype, the logit as [T] float32.
        """
        return exit_state(hidden, self.weights)

    def confidence(self, probe_logit: Tensor, logits: Tensor) -> Tensor:
        """The calibrated probability that exit and full model agree: [K] float32.

        `probe_logit` [K] is the probe's, `logits` [K, V] float32 are the exit's raw ones.
        """
        return gate_confidence(probe_logit, logits, self.combine)

    def gate(self, hidden: Tensor, thresholds: Tensor, project: Callable[[Tensor], Tensor]) -> GateResult:
        """Decide for each row of `hidden` [T, H] whether its token leaves here.

        `thresholds` [T] float32 is the confidence each row needs, infinity for a row that may not leave.
        `project` maps states [K, H] to logits [K, V]; it is called once, with the rows that pass the screen,
        or not at all. NaN anywhere in a row keeps that row, and only that row, from leaving. Given an `ExitOutput`
        on a CPU the whole gate is one native call.
        """
        if isinstance(project, ExitOutput) and project.matrix is not None:
            rule = GateRule(self.combine, self.screen_ratio)
            found = exit_gate(hidden, thresholds, self.weights, rule, project.matrix)
            if found is not None:
                return GateResult(*found)
        state, probe_logit = self.read(hidden)
        passing = _sigmoid(probe_logit) >= thresholds * self.screen_ratio
        projected = passing.nonzero().squeeze(1)
        if len(projected) == len(passing):
            logits = project(state).float()
            confidence = self.confidence(probe_logit, logits)
            return GateResult(confidence, confidence >= thresholds, projected, logits)
        confidence = torch.zeros_like(probe_logit)
        if len(projected) == 0:
            return _nobody_leaves(confidence)
        logits = project(state[projected]).float()
        sure = self.confidence(probe_logit[projected], logits)
        confidence[projected] = sure
        leaves = torch.zeros_like(passing)
        leaves[projected] = sure >= thresholds[projected]
        return GateResult(confidence, leaves, projected, logits)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> "ExitHead":
        """The same head on `device`: norm and adapter in `dtype`, probe and regression in float32."""
        bias = self.norm.bias
        norm = Norm(
            self.norm.kind,
            self.norm.weight.to(device, dtype),
            None if bias is None else bias.to(device, dtype),
            self.norm.eps,
        )
        probe = ExitProbe(
            self.probe.hidden_weight.to(device, torch.float32),
            self.probe.hidden_bias.to(device, torch.float32),
            self.probe.output_weight.to(device, torch.float32),
            self.probe.output_bias.to(device, torch.float32),
        )
        combine = self.combine.to(device, torch.float32)
        return ExitHead(self.block, norm, self.adapter.to(device, dtype), probe, combine, self.screen_ratio)


def _sigmoid(x: Tensor) -> Tensor:
    """The sigmoid of x [T], whole vectors at a time: PyTorch rounds what is left over from them differently."""
    return F.pad(x, (0, -len(x) % _WHOLE_VECTORS)).sigmoid()[: len(x)]


def _nobody_leaves(confidence: Tensor) -> GateResult:
    return GateResult(
        confidence,
        torch.zeros_like(confidence, dtype=torch.bool),
        torch.zeros(0, dtype=torch.int64, device=confidence.device),
        confidence.new_zeros((0, 0)),
    )


def exit_tensors(heads: Sequence[ExitHead]) -> dict[str, Tensor]:
    """The tensors of `heads` under the names they have in a bundle: `block_<i>.<part>`."""
    tensors: dict[str, Tensor] = {}
    for head in heads:
        parts = {
            "norm.weight": head.norm.weight,
            "norm.bias": head.norm.bias,
            "adapter": head.adapter,
            "probe.hidden_weight": head.probe.hidden_weight,
            "probe.hidden_bias": head.probe.hidden_bias,
            "probe.output_weight": head.probe.output_weight,
            "probe.output_bias": head.probe.output_bias,
            "combine": head.combine,
        }
        tensors |= {f"{head.name}.{part}": tensor for part, tensor in parts.items() if tensor is not None}
    return tensors


def exit_metadata(heads: Sequence[ExitHead]) -> dict[str, str]:
    """What `exit_tensors` does not hold, as safetensors metadata: blocks, norms and screens."""
    settings = [
        {
            "block": head.block,
            "norm_kind": head.norm.kind,
            "norm_eps": head.norm.eps,
            "screen_ratio": head.screen_ratio,
        }
        for head in heads
    ]
    return {METADATA_KEY: json.dumps(settings)}


def exits_from_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[ExitHead, ...]:
    """The heads that `exit_tensors` and `exit_metadata` wrote, shallowest first.

    Raises ExitHeadError where something is missing or does not fit together.
    """
    try:
        settings = json.loads(metadata[METADATA_KEY])
        heads = [_head_from(tensors, entry) for entry in settings]
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ExitHeadError(f"the exit heads are incomplete: {error}") from error
    return tuple(sorted(heads, key=lambda head: head.block))


def _head_from(tensors: Mapping[str, Tensor], settings: Mapping[str, object]) -> ExitHead:
    block, kind, eps = settings["block"], settings["norm_kind"], settings["norm_eps"]
    ratio = settings["screen_ratio"]
    if not (isinstance(block, int) and isinstance(eps, int | float) and isinstance(ratio, int | float)):
        raise ExitHeadError(f"the settings of an exit head have the wrong types: {dict(settings)}")
    if kind not in ("rms", "layer"):
        raise ExitHeadError(f"block_{block}: norm kind is {kind!r}, it must be 'rms' or 'layer'")

    def part(name: str) -> Tensor:
        return tensors[f"block_{block}.{name}"]

    norm = Norm(kind, part("norm.weight"), tensors.get(f"block_{block}.norm.bias"), float(eps))
    probe = ExitProbe(
        part("probe.hidden_weight"),
        part("probe.hidden_bias"),
        part("probe.output_weight"),
        part("probe.output_bias"),
    )
    return ExitHead(block, norm, part("adapter"), probe, part("combine"), float(ratio))


def _expect_shapes(name: str, expected: Mapping[str, tuple[Tensor | None, tuple[int, ...]]]) -> None:
    for part, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ExitHeadError(f"{name}: {part} is {list(tensor.shape)}, it must be {list(shape)}")
