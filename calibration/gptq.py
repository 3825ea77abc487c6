"""GPTQ: weights rounded to INT4 one input after another, each input's error made good by those that follow.

Minimised is |X (W - Ŵ)ᵀ|² over the calibration inputs X, for which their second moments H = Xᵀ X are enough (Frantar
et al., arXiv 2210.17323). Written here as its equal LDLQ (Chee et al., arXiv 2307.13304, theorem 6): with H = R Rᵀ, R
upper triangular, the loss of one output is Σ_j R_jj² (t_j - q_j)², where

    t_j = w_j + Σ_{i<j} (w_i - q_i) R_ij / R_jj

is the weight with the errors so far made good. That takes one Cholesky factor and no inverse of H. Rounding stays
uniform, and the result is the layout that round to nearest gives, whatever the order in which inputs are visited.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, Literal

import torch
from torch import Tensor

from exeunt.kernels.int4_linear import Int4Weight, dequantize, quantize
from exeunt.kernels.int4_linear.weight import (
    MAX_CODE,
    check_geometry,
    check_range,
    dequantize_rows,
    fit_groups,
    pack_nibbles,
)

Order = Literal["natural", "groups", "inputs"]

_LAZY: Final = 128  # inputs between two products with all errors so far
_ELEMENTS: Final = 1 << 25  # weights worked on at once: bounds the scratch to a few times 128 MB
_STRONGEST: Final = 1e3  # damping beyond which the Hessian is taken to say nothing


@dataclass(frozen=True, slots=True)
class Gptq:
    """How weights are rounded.

    `damping` is added to the Hessian's diagonal, as a share of its mean: inputs that calibration saw too little of keep
    their weights close. `order` is that in which inputs are visited: "natural"; "groups", whole groups by falling mean
    square of their inputs and so inside them, which lets a group's range be searched when its turn comes; "inputs", all
    by falling mean square (act-order, of the code of GPTQ's authors) with ranges searched beforehand, for groups are
    visited in pieces.
    """

    damping: float = 0.01
    order: Order = "groups"


def gptq(weight: Tensor, hessian: Tensor, group_size: int, how: Gptq = Gptq()) -> Int4Weight:
    """`weight` [out, in] in INT4 in groups of `group_size` inputs, for inputs with second moments `hessian` [in, in].

    Any scale of the Hessian does; it may be singular, and an input that it never saw is rounded to nearest. No output
    ends with more loss than `quantize` leaves it. Work is done on the Hessian's device, where the result lies too; the
    weight may lie elsewhere, and is moved in slices. Raises ValueError for an odd input size, a Hessian of another size
    or with NaN, and weights that are not finite float16s.
    """
    out_features, in_features = weight.shape
    check_geometry(in_features, group_size)
    _check_hessian(hessian, in_features)
    plan = _plan(hessian, group_size, how)
    parts = [_rounded(weight[rows], hessian, plan) for rows in _slices(out_features, in_features)]
    codes, scales, offsets = (torch.cat(tables) for tables in zip(*parts, strict=True))
    return Int4Weight(codes, scales, offsets, group_size, in_features, out_features)


def weighted_error(weight: Tensor, packed: Int4Weight, hessian: Tensor) -> float:
    """|X (W - Ŵ)ᵀ|² / |X Wᵀ|² of `weight` [out, in] and its INT4 form, on inputs of second moments `hessian` [in, in].

    Computed on the Hessian's device in float32; 0 where the weight gives nothing to compare with.
    """
    return _relative_loss(
        weight, hessian, lambda rows: dequantize_rows(packed, rows.start, rows.stop, torch.float32)
    )


def relative_loss(weight: Tensor, restored: Tensor, hessian: Tensor) -> float:
    """`weighted_error` of `weight` and any other [out, in] in its place."""
    return _relative_loss(weight, hessian, lambda rows: restored[rows])


def _relative_loss(weight: Tensor, hessian: Tensor, restored: Callable[[slice], Tensor]) -> float:
    lost = wanted = 0.0
    for rows in _slices(*weight.shape):
        own = weight[rows].to(hessian.device, torch.float32)
        error = own - restored(rows).to(hessian.device)
        lost += float(_quadratic(error, hessian).sum(dtype=torch.float64))
        wanted += float(_quadratic(own, hessian).sum(dtype=torch.float64))
    return lost / wanted if wanted > 0 else 0.0


def _slices(out_features: int, in_features: int) -> list[slice]:
    """The outputs in slices of weights that are worked on at once."""
    rows = max(1, _ELEMENTS // in_features)
    return [slice(start, min(start + rows, out_features)) for start in range(0, max(out_features, 1), rows)]


def _rounded(weight: Tensor, hessian: Tensor, plan: "_Plan") -> tuple[Tensor, Tensor, Tensor]:
    """Packed codes [rows, in / 2], scales and offsets [rows, groups] of some of a weight's outputs [rows, in].

    Going one input after another is no search: an output of few inputs may end with more loss than rounded to nearest,
    and is then.
    """
    own = weight.to(hessian.device, torch.float32)
    check_range(own)
    visits = _Visits(own, plan)
    visits.run()
    found, nearest = visits.result(), quantize(own, plan.group_size)
    moments = hessian.float()
    lost, lost_by_nearest = (
        _quadratic(own - dequantize(each, torch.float32), moments) for each in (found, nearest)
    )
    chosen = (lost <= lost_by_nearest)[:, None]
    return (
        torch.where(chosen, found.codes, nearest.codes),
        torch.where(chosen, found.scales, nearest.scales),
        torch.where(chosen, found.offsets, nearest.offsets),
    )


def _quadratic(rows: Tensor, hessian: Tensor) -> Tensor:
    """row · hessian · row of each of `rows` [n, in]: [n]."""
    return (rows @ hessian).mul_(rows).sum(-1)


@dataclass(frozen=True, slots=True)
class _Plan:
    """What all rows share. Inputs are numbered in the order of their visit unless called the weight's own."""

    order: Tensor  # [in] int64: the weight's own number of each visited input
    factor: Tensor  # [in, in] float32, column j is R_ij / R_jj
    importance: Tensor  # [in] float32, R_jj²: what a squared error of t_j costs
    group_of: list[int]  # [in], the group of each visited input
    spans: list[tuple[int, int]]  # visits between two products with all errors so far
    group_size: int
    beforehand: bool  # whether ranges are searched before the first input is visited


def _check_hessian(hessian: Tensor, in_features: int) -> None:
    if hessian.shape != (in_features, in_features):
        raise ValueError(f"the Hessian is {list(hessian.shape)}, the weight has {in_features} inputs")
    if not bool(torch.isfinite(hessian).all()):
        raise ValueError("the inputs' second moments hold NaN or infinity")


def _plan(hessian: Tensor, group_size: int, how: Gptq) -> _Plan:
    order = _order(hessian.diagonal().double(), group_size, how.order)
    factor, importance = _factor(hessian, order, how.damping)
    group_of = (order // group_size).tolist()
    beforehand = how.order == "inputs"
    return _Plan(
        order, factor, importance, group_of, _spans(group_of, group_size, beforehand), group_size, beforehand
    )


def _order(diagonal: Tensor, group_size: int, order: Order) -> Tensor:
    """The weight's inputs in the order of their visit, [in] int64."""
    inputs = torch.arange(len(diagonal), device=diagonal.device)
    if order == "natural":
        return inputs
    falling = torch.argsort(diagonal, descending=True, stable=True)
    if order == "inputs":
        return falling
    group = inputs // group_size
    groups = int(group[-1]) + 1
    sums = torch.zeros(groups, dtype=diagonal.dtype, device=diagonal.device).index_add_(0, group, diagonal)
    means = sums / torch.bincount(group, minlength=groups)
    place = torch.empty_like(means, dtype=torch.int64)
    place[torch.argsort(means, descending=True, stable=True)] = torch.arange(groups, device=means.device)
    return falling[torch.argsort(place[group[falling]], stable=True)]


def _spans(group_of: list[int], group_size: int, split_groups: bool) -> list[tuple[int, int]]:
    """The visits cut into runs of about `_LAZY`, between groups unless those may be split."""
    inputs, together = len(group_of), max(group_size, _LAZY // group_size * group_size)
    if split_groups:
        return [(start, min(start + together, inputs)) for start in range(0, inputs, together)]
    begins = [each for each in range(inputs) if each == 0 or group_of[each] != group_of[each - 1]] + [inputs]
    spans, start = [], 0
    for begin, end in pairwise(begins):
        if end - start > together:
            spans.append((start, begin))
            start = begin
    return [*spans, (start, inputs)]


def _factor(hessian: Tensor, order: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """R_ij / R_jj [in, in] and R_jj² [in], float32, with R Rᵀ the damped Hessian of the inputs in `order`.

    More damping is added where rounding has left it indefinite; without any inputs at all it is the identity. Two
    matrices in float64 are in memory at most: a wide layer's are larger than a block.
    """
    turned = order.flip(0)  # R is the lower factor of the Hessian backwards, turned round again
    moments = torch.empty(hessian.shape, dtype=torch.float64, device=hessian.device)
    for part in _slices(*hessian.shape):
        moments[part] = hessian[turned[part]].index_select(1, turned).double()
    diagonal = moments.diagonal().clone()
    mean, added = float(diagonal.mean()), max(damping, 1e-9)
    while mean > 0 and added <= _STRONGEST:
        moments.diagonal().copy_(diagonal + added * mean)
        lower, failed = torch.linalg.cholesky_ex(moments)
        if int(failed) == 0:
            del moments
            spread = lower.diagonal().flip(0).clone()
            lower /= lower.diagonal().clone()
            return lower.float().flip(0, 1), spread.square().float()
        added *= 10
    eye = torch.eye(len(order), dtype=torch.float32, device=hessian.device)
    return eye, eye.diagonal().clone()


class _Visits:
    """Some of a weight's outputs on their way through the inputs. Everything is held transposed: an input is a row."""

    def __init__(self, weight: Tensor, plan: _Plan) -> None:
        """`weight` [rows, in] float32."""
        rows, inputs = weight.shape
        self._plan = plan
        self._wanted = weight.T[plan.order].contiguous()  # [in, rows], in the order of visits
        self._missed = torch.zeros_like(self._wanted)  # w - q of the inputs visited
        groups = -(-inputs // plan.group_size)
        self._visited = torch.zeros(inputs, rows, dtype=torch.uint8, device=weight.device)
        self._scales = torch.zeros(groups, rows, dtype=torch.float16, device=weight.device)
        self._offsets = torch.zeros_like(self._scales)

    def run(self) -> None:
        """Visit all inputs."""
        plan = self._plan
        if plan.beforehand:
            self._search_all()
        for start, stop in plan.spans:
            target = self._wanted[start:stop] + plan.factor[:start, start:stop].T @ self._missed[:start]
            self._visit(start, stop, target)

    def result(self) -> Int4Weight:
        """The outputs rounded, once all inputs were visited."""
        inputs, rows = self._visited.shape
        codes = torch.empty_like(self._visited)
        codes[self._plan.order] = self._visited
        packed = pack_nibbles(codes.T.contiguous())
        scales, offsets = self._scales.T.contiguous(), self._offsets.T.contiguous()
        return Int4Weight(packed, scales, offsets, self._plan.group_size, inputs, rows)

    def _visit(self, start: int, stop: int, target: Tensor) -> None:
        """Inputs `start` to `stop` - 1, whose `target` [stop - start, rows] makes good the errors in front of them."""
        plan, group = self._plan, -1
        for each in range(start, stop):
            if plan.group_of[each] != group:
                group = plan.group_of[each]
                if not plan.beforehand:
                    self._search(group, target[each - start :], each)
                scale, offset = self._scales[group].float(), self._offsets[group].float()
                inverse = torch.where(scale > 0, 1.0 / scale, 0.0)
            codes = ((target[each - start] - offset) * inverse).round_().clamp_(0, MAX_CODE)
            self._visited[each] = codes
            missed = torch.sub(self._wanted[each], torch.addcmul(offset, codes, scale))
            self._missed[each] = missed
            if each + 1 < stop:
                target[each + 1 - start :].addr_(plan.factor[each, each + 1 : stop], missed)

    def _search(self, group: int, target: Tensor, first: int) -> None:
        """The range of a group whose inputs are the first of `target` [.., rows]; `first` is the first one's number.

        Searched among the weights that the group's inputs would have if they missed nothing themselves: they make good
        the errors in front of them together, while `target` is what one has if those before it in the group do not.
        With q = t inside the group, (w - t) F = w - target, F the group's part of the factor.
        """
        plan = self._plan
        size = min(plan.group_size, len(self._wanted) - group * plan.group_size)
        own = slice(first, first + size)
        factor = plan.factor[own, own].T
        ahead = self._wanted[own] - target[:size]
        ahead = self._wanted[own] - torch.linalg.solve_triangular(
            factor, ahead, upper=False, unitriangular=True
        )
        _, scale, offset = fit_groups(ahead.T.unsqueeze(1), plan.importance[own])
        self._scales[group], self._offsets[group] = scale[:, 0], offset[:, 0]

    def _search_all(self) -> None:
        """Every group's range, from the weights as they are."""
        plan = self._plan
        by_input = torch.empty_like(self._wanted)
        by_input[plan.order] = self._wanted
        importance = torch.empty_like(plan.importance)
        importance[plan.order] = plan.importance
        for group in range(len(self._scales)):
            own = slice(group * plan.group_size, (group + 1) * plan.group_size)
            _, scale, offset = fit_groups(by_input[own].T.unsqueeze(1), importance[own])
            self._scales[group], self._offsets[group] = scale[:, 0], offset[:, 0]
