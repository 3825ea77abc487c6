"""Exit heads: what decides whether a token may leave after a block, and what it would say there.

An exit has a *head* (a norm and an adapter in front of the model's own output matrix) and a *gate* for the
probability that the exit's most likely token is the full model's. The gate has two steps: a small probe on
the head's state screens every row; rows that pass are looked at: projected onto the vocabulary, or onto a
*shortlist* of its most frequent tokens, which costs a fraction (FR-Spec, arXiv 2502.14856, drafts from one).
A *judge*, the probe once more with the largest log-probabilities added to its units, and how sure the projection
is are weighed by a logistic regression. A row that leaves says what the whole vocabulary says: its logits are
never the shortlist's. So where there is a shortlist, a *confirmation* may have the last word: rows that the shortlist
does not turn away are projected onto the whole vocabulary, which they owe if they leave, and a second judge and
regression decide by those logits.

A row's decision depends on that row alone: nothing here reduces over rows, sorts rows or budgets them. With the
native kernels that holds to the bit; where a library's matrix product runs instead, its rounding may differ with the
number of rows, and a decision with it for a row that stands within that distance of its threshold.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from exeunt.compression.exit_output import ExitOutput, Shortlist
from exeunt.compression.exit_parts import JUDGE_PARTS
from exeunt.compression.exit_parts import ExitConfirmation as ExitConfirmation
from exeunt.compression.exit_parts import ExitHeadError as ExitHeadError
from exeunt.compression.exit_parts import ExitJudge as ExitJudge
from exeunt.compression.exit_parts import ExitProbe as ExitProbe
from exeunt.compression.gate_steps import GateSteps
from exeunt.compression.norm import Norm
from exeunt.kernels.exit_gate import (
    Confirmation,
    ExitWeights,
    GatedRows,
    GateRule,
    JudgeWeights,
    NativeGate,
    exit_gate,
    exit_state,
    gate_confidence,
    gate_rows,
    native_gate,
)
from exeunt.kernels.gpu import triton_runs
from exeunt.kernels.native.descriptors import Matrix

FEATURES: Final = ("opinion", "top_log_odds", "margin")
"""What the logistic regression weighs, in the order of `ExitHead.combine`; a constant 1 follows. The opinion is the
judge's logit, or the probe's where there is no judge; the others are of the logits that decide."""

_WHOLE_VECTORS: Final = 64  # a multiple of what PyTorch computes at once on any processor


ExitNorm = Norm  # the norm in front of an exit's adapter is one like any other


@dataclass(frozen=True, slots=True)
class ExitReading:
    """What an exit makes of T states before it looks at the vocabulary."""

    state: Tensor  # [T, H], what the output matrix is applied to
    probe_logit: Tensor  # [T] float32
    units: Tensor  # [T, P] float32, the probe's before GELU: what the judge goes on from

    def rows(self, index: Tensor) -> "ExitReading":
        """That of some of the rows, by number or by mask."""
        return ExitReading(self.state[index], self.probe_logit[index], self.units[index])


@dataclass(frozen=True, slots=True)
class GateResult:
    """What the gate of one exit decided for T rows, K of which were looked at; L of them leave.

    All but the logits are on the host: what becomes of a row is decided there. The confidence is that of the last
    logits that were asked: the confirmation's where the row came so far, else the shortlist's. A row leaves where it
    reaches its threshold, and only there.
    """

    confidence: Tensor  # [T] float32, probability that exit and full model agree; 0 for rows not looked at
    leaves: Tensor  # [T] bool
    looked: Tensor  # [K] int64, ascending row numbers
    whole: Tensor  # [W] int64, ascending: of these the rows that were projected onto the whole vocabulary
    logits: Tensor  # [L, V] float32, raw logits over the whole vocabulary of the rows that leave, ascending

    def on_host(self) -> "GateResult":
        """The same, but for its logits on the host."""
        return GateResult(
            self.confidence.cpu(), self.leaves.cpu(), self.looked.cpu(), self.whole.cpu(), self.logits
        )


@dataclass(frozen=True, slots=True)
class ExitHead:
    """The exit after block `block` (counted from 0), in the form that serves.

    `combine` holds the weights of the logistic regression over `FEATURES` and its constant. A row whose probe
    says less than `screen_ratio` × its threshold is not looked at. The logits that decide are those of `shortlist`, of
    the whole vocabulary where there is none; with a `confirmation` those of the shortlist decide whom that is asked
    about.
    """

    block: int
    norm: Norm
    adapter: Tensor  # [H, H]
    probe: ExitProbe
    combine: Tensor  # [4] float32
    screen_ratio: float
    judge: ExitJudge | None = None
    shortlist: Shortlist | None = None
    confirmation: ExitConfirmation | None = None
    weights: ExitWeights = field(init=False, repr=False, compare=False)  # the same as the kernels take it
    rule: GateRule = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for part, tensor in (
            ("norm.weight", self.norm.weight),
            ("probe.hidden_bias", self.probe.hidden_bias),
        ):
            if tensor.dim() != 1:
                raise ExitHeadError(
                    f"{self.name}: {part} is {list(tensor.shape)}, it must have one dimension"
                )
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
        judge = None if self.judge is None else self._judge(self.judge, units, "judge")
        if judge is not None and self.shortlist is not None and len(self.shortlist) < judge.count:
            raise ExitHeadError(
                f"{self.name}: the judge looks at {judge.count} tokens, the shortlist has {len(self.shortlist)}"
            )
        rule = GateRule(self.combine, self.screen_ratio, judge, self._confirmation(units))
        object.__setattr__(self, "rule", rule)

    def _judge(self, judge: ExitJudge, units: int, what: str) -> JudgeWeights:
        """A judge as the kernels take it."""
        try:
            weights = JudgeWeights(judge.parts)
        except ValueError as error:
            raise ExitHeadError(f"{self.name}: {error}") from error
        if weights.units != units:
            raise ExitHeadError(f"{self.name}: the {what} reads {weights.units} units, the probe has {units}")
        return weights

    def _confirmation(self, units: int) -> Confirmation | None:
        """The confirmation as the kernels take it."""
        found = self.confirmation
        if found is None:
            return None
        if self.shortlist is None:
            raise ExitHeadError(
                f"{self.name}: there is a confirmation and no shortlist whose choice it could confirm"
            )
        _expect_shapes(self.name, {"confirm.combine": (found.combine, (len(FEATURES) + 1,))})
        if not 0.0 <= found.list_ratio <= 1.0:
            raise ExitHeadError(f"{self.name}: list_ratio is {found.list_ratio}, it must be in [0, 1]")
        judge = self._judge(found.judge, units, "confirmation's judge")
        return Confirmation(found.combine, found.list_ratio, judge)

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
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All of its tensors, by the names that a bundle has for them behind the exit's own."""
        probe, bias = self.probe, self.norm.bias
        return {
            "norm.weight": self.norm.weight,
            **({} if bias is None else {"norm.bias": bias}),
            "adapter": self.adapter,
            "probe.hidden_weight": probe.hidden_weight,
            "probe.hidden_bias": probe.hidden_bias,
            "probe.output_weight": probe.output_weight,
            "probe.output_bias": probe.output_bias,
            "combine": self.combine,
            **self.optional_tensors,
        }

    @property
    def optional_tensors(self) -> dict[str, Tensor]:
        """Of its tensors those that only some exits have: readers that do not know them must refuse the bundle."""
        parts = {} if self.shortlist is None else {"shortlist": self.shortlist.ids}
        if self.judge is not None:
            parts |= {f"judge.{name}": getattr(self.judge, name) for name in JUDGE_PARTS}
        if self.confirmation is not None:
            judge = self.confirmation.judge
            parts |= {f"confirm.judge.{name}": getattr(judge, name) for name in JUDGE_PARTS}
            parts["confirm.combine"] = self.confirmation.combine
        return parts

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
        where there is one. What a confirmation says of them is `confirmed`.
        """
        return gate_confidence(reading.probe_logit, logits, self.combine, reading.units, self.rule.judge)

    def confirmed(self, reading: ExitReading, logits: Tensor) -> Tensor:
        """The confirmation's probability that exit and full model agree: [K] float32.

        `logits` [K, V] float32 are those of the whole vocabulary, of the `reading`'s K rows. Raises ExitHeadError where
        there is no confirmation.
        """
        last = self.rule.confirmation
        if last is None:
            raise ExitHeadError(f"{self.name} has no confirmation")
        return gate_confidence(reading.probe_logit, logits, last.combine, reading.units, last.judge)

    def decisive(self, logits: Tensor) -> Tensor:
        """Of logits [K, V] those that decide: [K, S], the shortlist's tokens, or all."""
        return logits if self.shortlist is None else logits[:, self.shortlist.ids]

    def gate(self, hidden: Tensor, thresholds: Tensor, project: Callable[[Tensor], Tensor]) -> GateResult:
        """Decide for each row of `hidden` [T, H] whether its token leaves here.

        `thresholds` [T] float32 is the confidence each row needs, infinity for a row that may not leave.
        `project` maps states [K, H] to logits [K, V]. An `ExitOutput` looks at the rows that pass the screen with the
        shortlist alone, where there is one, and is asked for all logits of those that leave, or are to be confirmed;
        on a CPU the whole gate is one native call. Of another function's logits the shortlist's columns are taken. NaN
        anywhere in a row keeps that row, and only that row, from leaving. On a GPU all rows are projected, onto the
        whole vocabulary where there is a confirmation; the thresholds may still be on the host, and the device is
        waited for once every 512 rows; what was decided is then on the host.
        """
        if triton_runs(hidden.device):
            return GateResult(*self.steps.run(hidden, thresholds, project))
        found = self._native_gate(hidden, thresholds, project)
        return found or self._gate(hidden, thresholds.to(hidden.device), project).on_host()

    @property
    def steps(self) -> GateSteps:
        """How the gate decides on a GPU; it points into this head, which must outlive it."""
        return GateSteps(id(self), self.decide, self.shortlist is not None, self.confirmation is not None)

    def _gate(self, hidden: Tensor, thresholds: Tensor, project: Callable[[Tensor], Tensor]) -> GateResult:
        """The gate out of one operation after another."""
        reading = self.inspect(hidden)
        passing = _sigmoid(reading.probe_logit) >= thresholds * self.screen_ratio
        looked = passing.nonzero().squeeze(1)
        confidence, leaves = torch.zeros_like(reading.probe_logit), torch.zeros_like(passing)
        nothing = confidence.new_zeros((0, 0))
        if len(looked) == 0:
            return GateResult(confidence, leaves, looked, looked, nothing)
        if len(looked) < len(passing):
            reading = reading.rows(looked)
        short = project if self.shortlist is None else self._short(project)
        logits, whole = short(reading.state).float(), looked
        sure = self.confidence(reading, logits)
        confidence[looked] = sure
        if self.shortlist is not None:
            # without a confirmation whoever the shortlist lets pass leaves
            ratio = 1.0 if self.confirmation is None else self.confirmation.list_ratio
            passed = sure >= thresholds[looked] * ratio
            whole, reading = looked[passed], reading.rows(passed)
            logits = project(reading.state).float() if len(whole) else nothing
        if self.confirmation is not None and len(whole):
            confidence[whole] = self.confirmed(reading, logits)
        leave = confidence[whole] >= thresholds[whole]
        leaves[whole] = leave
        return GateResult(confidence, leaves, looked, whole, logits if bool(leave.all()) else logits[leave])

    def decide(self, hidden: Tensor, thresholds: Tensor, project: Callable[[Tensor], Tensor]) -> GatedRows:
        """What `gate` decides, for all rows and left on their device: on a GPU without waiting for it, so that a CUDA
        graph can hold the call.

        The logits are those that decided, of every row: the shortlist's where there is one without a confirmation.
        """
        if self.shortlist is None:
            return gate_rows(hidden, thresholds, self.weights, self.rule, project)
        if self.confirmation is None:
            return gate_rows(hidden, thresholds, self.weights, self.rule, self._short(project))
        return gate_rows(hidden, thresholds, self.weights, self.rule, project, self.shortlist.ids)

    def native_gate(self, project: ExitOutput) -> NativeGate | None:
        """The gate as the native kernels read it, for what `project` projects with; None where they do not take it.

        It points into this head and into `project`, which must outlive it.
        """
        matrices = self._matrices(project)
        return None if matrices is None else native_gate(self.weights, self.rule, *matrices)

    def _native_gate(
        self, hidden: Tensor, thresholds: Tensor, project: Callable[[Tensor], Tensor]
    ) -> GateResult | None:
        """The gate in one native call; None where that cannot be."""
        matrices = self._matrices(project) if isinstance(project, ExitOutput) else None
        if matrices is None:
            return None
        found = exit_gate(hidden, thresholds, self.weights, self.rule, *matrices)
        return None if found is None else GateResult(*found)

    def _matrices(self, project: ExitOutput) -> tuple[Matrix, Matrix | None] | None:
        """The matrices that the native gate projects with, the whole one and the shortlist's; None where it cannot."""
        if project.matrix is None:
            return None
        if self.shortlist is None:
            return project.matrix, None
        short = project.only(self.shortlist)
        return None if short.matrix is None else (project.matrix, short.matrix)

    def _short(self, project: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """States [K, H] to the logits that decide."""
        if self.shortlist is not None and isinstance(project, ExitOutput):
            return project.only(self.shortlist)
        return lambda state: self.decisive(project(state))

    def to(self, device: torch.device | str, dtype: torch.dtype) -> "ExitHead":
        """The same head on `device`: norm and adapter in `dtype`, what the gate reads in float32."""
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
        last = self.confirmation
        return ExitHead(
            self.block,
            norm,
            self.adapter.to(device, dtype),
            probe,
            self.combine.to(device, torch.float32),
            self.screen_ratio,
            self.judge and self.judge.to(device),
            None if self.shortlist is None else self.shortlist.to(device),
            last
            and ExitConfirmation(
                last.judge.to(device), last.combine.to(device, torch.float32), last.list_ratio
            ),
        )


def _sigmoid(x: Tensor) -> Tensor:
    """The sigmoid of x [T], whole vectors at a time: PyTorch rounds what is left over from them differently."""
    return F.pad(x, (0, -len(x) % _WHOLE_VECTORS)).sigmoid()[: len(x)]


def _expect_shapes(name: str, expected: Mapping[str, tuple[Tensor | None, tuple[int, ...]]]) -> None:
    for part, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ExitHeadError(f"{name}: {part} is {list(tensor.shape)}, it must be {list(shape)}")
