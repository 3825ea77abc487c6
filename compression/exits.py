"""Exit heads: what decides whether a token may leave after a block, and what it would say there.

An exit has a *head* (a norm and an adapter in front of the model's own output matrix) and a *gate* for the
probability that the exit's most likely token is the full model's. The gate has two steps: a small probe on
the head's state screens every row; rows that pass are looked at: projected onto the vocabulary, or onto a
*shortlist* of its most frequent tokens, which costs a fraction (FR-Spec, arXiv 2502.14856, drafts from one).
A *judge*, the probe once more with the largest log-probabilities added to its units, and how sure the projection
is are weighed by a logistic regression. A row that leaves says what the whole vocabulary says: its logits are
never the shortlist's.

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

from exeunt.compression.exit_output import ExitOutput, Shortlist
from exeunt.compression.gate_steps import GateSteps
from exeunt.compression.norm import Norm
from exeunt.kernels.exit_gate import (
    ExitWeights,
    GatedRows,
    GateRule,
    JudgeWeights,
    exit_gate,
    exit_state,
    gate_confidence,
    gate_rows,
)
from exeunt.kernels.exit_gate.reference import JudgeParts
from exeunt.kernels.gpu import triton_runs

FEATURES: Final = ("opinion", "top_log_odds", "margin")
"""What the logistic regression weighs, in the order of `ExitHead.combine`; a constant 1 follows. The opinion is the
judge's logit, or the probe's where there is no judge; the others are of the logits that decide."""

_WHOLE_VECTORS: Final = 64  # a multiple of what PyTorch computes at once on any processor
METADATA_KEY: Final = "exits"
_JUDGE_PARTS: Final = ("top_weight", "hidden_bias", "output_weight", "output_bias")

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
class ExitJudge:
    """The probe's second opinion, w · GELU(u + T t + c) + b: u the probe's units, t the K largest log-probabilities.

    In float32 whatever the model's dtype.
    """

    top_weight: Tensor  # T [K, P]: row k is what the k-th largest adds to each unit
    hidden_bias: Tensor  # c [P]
    output_weight: Tensor  # w [P]
    output_bias: Tensor  # b []

    @property
    def parts(self) -> JudgeParts:
        """The tensors as the kernels take them."""
        return self.top_weight, self.hidden_bias, self.output_weight, self.output_bias


@dataclass(frozen=True, slots=True)
class ExitReading:
    """What an exit makes of T states before it looks at the vocabulary."""

    state: Tensor  # [T, H], what the output matrix is applied to
    probe_logit: Tensor  # [T] float32
    units: Tensor  # [T, P] float32, the probe's before GELU: what the judge goes on from

    def rows(self, index: Tensor) -> "ExitReading":
        """That of some of the rows."""
        return ExitReading(self.state[index], self.probe_logit[index], self.units[index])


@dataclass(frozen=True, slots=True)
class GateResult:
    """What the gate of one exit decided for T rows, K of which were looked at; L of them leave.

    All but the logits are on the host: what becomes of a row is decided there.
    """

    confidence: Tensor  # [T] float32, probability that exit and full model agree; 0 for rows not looked at
    leaves: Tensor  # [T] bool
    looked: Tensor  # [K] int64, ascending row numbers
    logits: Tensor  # [L, V] float32, raw logits over the whole vocabulary of the rows that leave, ascending


@dataclass(frozen=True, slots=True)
class ExitHead:
    """The exit after block `block` (counted from 0), in the form that serves.

    `combine` holds the weights of the logistic regression over `FEATURES` and its constant. A row whose probe
    says less than `screen_ratio` × its threshold is not looked at. The logits that decide are those of `shortlist`, of
    the whole vocabulary where there is none.
    """

    block: int
    norm: Norm
    adapter: Tensor  # [H, H]
    probe: ExitProbe
    combine: Tensor  # [4] float32
    screen_ratio: float
    judge: ExitJudge | None = None
    shortlist: Shortlist | None = None
    weights: ExitWeights = field(init=False, repr=False, compare=False)  # the same as the kernels take it
    rule: GateRule = field(init=False, repr=False, compare=False)

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
        object.__setattr__(self, "rule", GateRule(self.combine, self.screen_ratio, self._judge(units)))

    def _judge(self, units: int) -> JudgeWeights | None:
        """The judge as the kernels take it."""
        if self.judge is None:
            return None
        try:
            weights = JudgeWeights(self.judge.parts)
        except ValueError as error:
            raise ExitHeadError(f"{self.name}: {error}") from error
        if weights.units != units:
            raise ExitHeadError(f"{self.name}: the judge reads {weights.units} units, the probe has {units}")
        if self.shortlist is not None and len(self.shortlist) < weights.count:
            raise ExitHeadError(
                f"{self.name}: the judge looks at {weights.count} tokens, the shortlist has {len(self.shortlist)}"
            )
        return weights

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

    def inspect(self, hidden: Tensor) -> ExitReading:
        """What the exit makes of states `hidden` [T, H] before it looks at the vocabulary."""
        return ExitReading(*exit_state(hidden, self.weights))

    def read(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """What the output matrix is applied to, n + A n with n = norm(hidden), and the probe's logit of it.

        `hidden` is [T, H]; the state comes in its shape and dtype, the logit as [T] float32.
        """
        reading = self.inspect(hidden)
        return reading.state, reading.probe_logit

    def confidence(self, reading: ExitReading, logits: Tensor) -> Tensor:
        """The calibrated probability that exit and full model agree: [K] float32.

        `logits` [K, S] float32 are those that decide, of the `reading`'s K rows: raw, and of the shortlist's tokens
        where there is one.
        """
        return gate_confidence(reading.probe_logit, logits, self.combine, reading.units, self.rule.judge)

    def decisive(self, logits: Tensor) -> Tensor:
        """Of logits [K, V] those that decide: [K, S], the shortlist's tokens, or all."""
        return logits if self.shortlist is None else logits[:, self.shortlist.ids]

    def gate(self, hidden: Tensor, thresholds: Tensor, project: Callable[[Tensor], Tensor]) -> GateResult:
        """Decide for each row of `hidden` [T, H] whether its token leaves here.

        `thresholds` [T] float32 is the confidence each row needs, infinity for a row that may not leave.
        `project` maps states [K, H] to logits [K, V]. An `ExitOutput` looks at the rows that pass the screen with the
        shortlist alone, where there is one, and is asked for all logits of those that leave; on a CPU the whole gate
        is then one native call. Of another function's logits the shortlist's columns are taken. NaN anywhere in a row
        keeps that row, and only that row, from leaving. On a GPU all rows are projected, the thresholds may still be on
        the host, and the device is waited for once every 512 rows; what was decided is then on the host.
        """
        if triton_runs(hidden.device):
            steps = GateSteps(id(self), self.decide, self.shortlist is not None)
            return GateResult(*steps.run(hidden, thresholds, project))
        found = self._native_gate(hidden, thresholds, project)
        if found is not None:
            return found
        reading = self.inspect(hidden)
        passing = _sigmoid(reading.probe_logit) >= thresholds * self.screen_ratio
        looked = passing.nonzero().squeeze(1)
        confidence = torch.zeros_like(reading.probe_logit)
        if len(looked) == 0:
            return GateResult(confidence, torch.zeros_like(passing), looked, confidence.new_zeros((0, 0)))
        if len(looked) < len(passing):
            reading = reading.rows(looked)
        short = project if self.shortlist is None else self._short(project)
        logits = short(reading.state).float()
        sure = self.confidence(reading, logits)
        confidence[looked] = sure
        leave = sure >= thresholds[looked]
        leaves = torch.zeros_like(passing)
        leaves[looked] = leave
        if self.shortlist is None:
            return GateResult(confidence, leaves, looked, logits if bool(leave.all()) else logits[leave])
        leaving = reading.state[leave]
        return GateResult(
            confidence, leaves, looked, project(leaving).float() if len(leaving) else logits[:0, :0]
        )

    def decide(self, hidden: Tensor, thresholds: Tensor, project: Callable[[Tensor], Tensor]) -> GatedRows:
        """What `gate` decides, for all rows and left on their device: on a GPU without waiting for it, so that a CUDA
        graph can hold the call.

        The logits are those that decided, of every row: the shortlist's where there is one.
        """
        short = project if self.shortlist is None else self._short(project)
        return gate_rows(hidden, thresholds, self.weights, self.rule, short)

    def _native_gate(
        self, hidden: Tensor, thresholds: Tensor, project: Callable[[Tensor], Tensor]
    ) -> GateResult | None:
        """The gate in one native call; None where that cannot be."""
        if not isinstance(project, ExitOutput) or project.matrix is None:
            return None
        short = None if self.shortlist is None else project.only(self.shortlist)
        if short is not None and short.matrix is None:
            return None
        matrix = None if short is None else short.matrix
        found = exit_gate(hidden, thresholds, self.weights, self.rule, project.matrix, matrix)
        return None if found is None else GateResult(*found)

    def _short(self, project: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """States [K, H] to the logits that decide."""
        if self.shortlist is not None and isinstance(project, ExitOutput):
            return project.only(self.shortlist)
        return lambda state: self.decisive(project(state))

    def to(self, device: torch.device | str, dtype: torch.dtype) -> "ExitHead":
        """The same head on `device`: norm and adapter in `dtype`, probe, judge and regression in float32."""
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
        judge = self.judge and ExitJudge(*(part.to(device, torch.float32) for part in self.judge.parts))
        return ExitHead(
            self.block,
            norm,
            self.adapter.to(device, dtype),
            probe,
            self.combine.to(device, torch.float32),
            self.screen_ratio,
            judge,
            None if self.shortlist is None else self.shortlist.to(device),
        )


def _sigmoid(x: Tensor) -> Tensor:
    """The sigmoid of x [T], whole vectors at a time: PyTorch rounds what is left over from them differently."""
    return F.pad(x, (0, -len(x) % _WHOLE_VECTORS)).sigmoid()[: len(x)]


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
            **_optional_parts(head),
        }
        tensors |= {f"{head.name}.{part}": tensor for part, tensor in parts.items() if tensor is not None}
    return tensors


def _optional_parts(head: ExitHead) -> dict[str, Tensor]:
    """The tensors that only some exits have: readers that do not know them must refuse the bundle."""
    parts = {} if head.shortlist is None else {"shortlist": head.shortlist.ids}
    if head.judge is not None:
        parts |= {f"judge.{name}": getattr(head.judge, name) for name in _JUDGE_PARTS}
    return parts


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


def needs_newest_format(heads: Sequence[ExitHead]) -> bool:
    """Whether a bundle with these heads must be refused by readers that know neither judges nor shortlists."""
    return any(_optional_parts(head) for head in heads)


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
    judge = None
    if f"block_{block}.judge.top_weight" in tensors:
        judge = ExitJudge(*(part(f"judge.{name}") for name in _JUDGE_PARTS))
    try:
        ids = tensors.get(f"block_{block}.shortlist")
        shortlist = None if ids is None else Shortlist(ids)
    except ValueError as error:
        raise ExitHeadError(f"block_{block}: {error}") from error
    return ExitHead(block, norm, part("adapter"), probe, part("combine"), float(ratio), judge, shortlist)


def _expect_shapes(name: str, expected: Mapping[str, tuple[Tensor | None, tuple[int, ...]]]) -> None:
    for part, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ExitHeadError(f"{name}: {part} is {list(tensor.shape)}, it must be {list(shape)}")
