"""GPTQ against a loop that does it by the book, against rounding to nearest, and on Hessians that say too little."""

import pytest
import torch

from exeunt.calibration.gptq import Gptq, Order, gptq, weighted_error
from exeunt.kernels.int4_linear import dequantize, quantize
from exeunt.kernels.int4_linear.weight import MAX_CODE, fit_groups, round_groups, unpack_nibbles

ORDERS: tuple[Order, ...] = ("natural", "groups", "inputs")
SHAPES = [
    (40, 192, 32),
    (33, 202, 64),
    (17, 300, 128),
    (5, 10, 6),
    (1, 2, 2),
    (24, 96, 512),
]  # out, in, group


def second_moments(inputs: int, shared: float, tokens: int = 1500, seed: int = 0) -> torch.Tensor:
    """Xᵀ X of inputs that have `shared` times their own deviation in four common directions, of unlike sizes."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, inputs, generator=g)
    x += shared * torch.randn(tokens, 4, generator=g) @ torch.randn(4, inputs, generator=g)
    x *= torch.rand(inputs, generator=g) * 3 + 0.1
    return x.T @ x


def some_weight(out_features: int, in_features: int, seed: int = 1) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(out_features, in_features, generator=g) * 0.1


@pytest.mark.parametrize(("out_features", "in_features", "group"), SHAPES[:3])
def test_natural_order_is_the_paper_s_algorithm(out_features: int, in_features: int, group: int) -> None:
    """Every code is the nearest to what algorithm 1 of arXiv 2210.17323 has made of the weight by then.

    That algorithm is followed in float64 (the Cholesky factor of the inverse Hessian, all later weights updated) with
    the codes found: a weight within rounding of half a step may go either way, and would take those behind it along.
    """
    weight, hessian = some_weight(out_features, in_features), second_moments(in_features, 1.0)
    found = gptq(weight, hessian, group, Gptq(damping=0.01, order="natural"))
    codes, restored = unpack_nibbles(found.codes).double(), dequantize(found, torch.float64)
    damped = hessian.double() + 0.01 * hessian.diagonal().double().mean() * torch.eye(in_features)
    upper = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    wanted = weight.double()
    for each in range(in_features):
        if each % group == 0:
            part = wanted[:, None, each : each + group].float()
            importance = upper.diagonal()[each : each + group].square().reciprocal().float()
            _, scale, _ = (table.squeeze(1) for table in fit_groups(part, importance))
            same = torch.isclose(scale.float(), found.scales[:, each // group].float(), rtol=2e-3)
            assert same.float().mean() > 0.9  # two clip ratios may be as good as each other
        step, base = found.scales[:, each // group].double(), found.offsets[:, each // group].double()
        ideal = ((wanted[:, each] - base) / step.clamp(min=1e-9)).clamp(0, MAX_CODE)
        assert bool(((ideal - codes[:, each]).abs() <= 0.5 + 2e-3).all())
        error = (wanted[:, each] - restored[:, each]) / upper[each, each]
        wanted = wanted - torch.outer(error, upper[each] * (torch.arange(in_features) >= each))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("out_features", "in_features", "group"), SHAPES)
def test_output_error_falls_below_that_of_rounding_to_nearest(
    out_features: int, in_features: int, group: int, order: Order
) -> None:
    weight = some_weight(out_features, in_features)
    for shared, at_most in ((0.0, 1.0), (1.0, 0.6), (6.0, 0.2)):
        hessian = second_moments(in_features, shared)
        nearest = weighted_error(weight, quantize(weight, group), hessian)
        found = weighted_error(weight, gptq(weight, hessian, group, Gptq(order=order)), hessian)
        assert found <= nearest * (at_most if in_features > 64 else 1.0) + 1e-9


def test_uncorrelated_inputs_of_one_size_leave_nothing_to_make_good() -> None:
    weight = some_weight(40, 192)
    found, nearest = gptq(weight, torch.eye(192) * 7, 32), quantize(weight, 32)
    assert torch.equal(found.codes, nearest.codes)
    assert torch.equal(found.scales, nearest.scales)
    assert torch.equal(found.offsets, nearest.offsets)


def test_rounding_error_is_that_of_uniform_noise() -> None:
    """Weights spread evenly over a range of 15 steps miss by step² / 12 on average."""
    g = torch.Generator().manual_seed(4)
    weight = torch.rand(512, 192, generator=g)
    weight[:, 0::32], weight[:, 1::32] = (
        0.0,
        1.0,
    )  # every group has the whole range, and two weights at its ends
    uniform = (1.0 / MAX_CODE) ** 2 / 12 * 30 / 32
    groups = weight.view(512, 6, 32)
    codes, scale, offset = round_groups(groups, groups.amin(-1), groups.amax(-1))
    plain = float((codes * scale.float()[..., None] + offset.float()[..., None] - groups).square().mean())
    assert plain == pytest.approx(uniform, rel=0.02)
    nearest = dequantize(quantize(weight, 32), torch.float32)
    assert 0.85 * uniform < float((nearest - weight).square().mean()) < uniform  # the search gives a little
    found = dequantize(gptq(weight, second_moments(192, 1.0), 32), torch.float32)
    assert float((found - weight).square().mean()) > uniform  # weights pay for what the outputs gain


def test_a_rounded_output_loses_what_its_cholesky_factor_says() -> None:
    """Of weights far apart on the grid's scale the misses are uniform and the loss is Σ R_jj² step² / 12.

    That is the loss that error feedback leaves of any Hessian (arXiv 2307.13304, lemma 3): rounding to nearest is left
    with the Hessian's diagonal in the place of R_jj².
    """
    g = torch.Generator().manual_seed(6)
    weight = torch.rand(4000, 32, generator=g) * 0.6 + 0.2
    weight[:, 0], weight[:, 1] = -1.0, 2.0  # room for what is made good; and on the grid, or nearly
    hessian = second_moments(32, 1.0)
    found = gptq(weight, hessian, 32, Gptq(damping=1e-9, order="natural"))
    missed = weight - dequantize(found, torch.float32)
    loss = float((missed @ hessian * missed).sum(-1).mean())
    factor = torch.linalg.cholesky(hessian.double().flip(0, 1)).flip(0, 1)
    spread = factor.diagonal().square()
    step = float(found.scales.float().mean())
    assert loss == pytest.approx(float(spread[2:].sum()) * step**2 / 12, rel=0.1)
    assert loss < 0.5 * float(hessian.diagonal()[2:].sum()) * step**2 / 12


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("group", [32, 64, 128])
def test_weights_on_the_grid_stay_as_they_are(order: Order, group: int) -> None:
    g = torch.Generator().manual_seed(5)
    codes = torch.randint(0, MAX_CODE + 1, (20, 200), generator=g).float()
    codes[:, 0::group], codes[:, 1::group] = 0, MAX_CODE
    weight = codes * 0.125 - 0.75
    found = gptq(weight, second_moments(200, 2.0), group, Gptq(order=order))
    assert torch.equal(dequantize(found, torch.float32), weight)


@pytest.mark.parametrize("order", ORDERS)
def test_the_order_of_visits_does_not_change_the_layout(order: Order) -> None:
    """Permuting inputs inside a group, with the Hessian, permutes the codes and nothing else where order is by size."""
    weight, hessian = some_weight(24, 96), second_moments(96, 1.0)
    swap = torch.arange(96)
    swap[3], swap[20] = 20, 3
    moved = gptq(weight[:, swap], hessian[swap][:, swap], 32, Gptq(order=order))
    found = gptq(weight, hessian, 32, Gptq(order=order))
    assert found.scales.shape == moved.scales.shape == (24, 3)
    if order != "natural":
        close = (dequantize(moved, torch.float32) - dequantize(found, torch.float32)[:, swap]).abs() < 1e-6
        assert close.float().mean() > 0.98  # sums of other orders may tip a weight over


@pytest.mark.parametrize("order", ORDERS)
def test_inputs_that_were_never_seen_are_rounded_to_nearest(order: Order) -> None:
    weight, hessian = some_weight(20, 64), second_moments(64, 1.0)
    hessian[40:] = 0
    hessian[:, 40:] = 0
    found = dequantize(gptq(weight, hessian, 32, Gptq(order=order)), torch.float32)
    missed = (found - weight)[:, 40:].abs()
    steps = gptq(weight, hessian, 32, Gptq(order=order)).scales[:, 1:].float()
    inside = (weight[:, 40:] - found[:, 40:]).abs() <= steps / 2 + 1e-3
    assert bool(torch.isfinite(found).all())
    assert inside.float().mean() > 0.9  # the others are clipped
    assert float(missed.max()) < 1.0


@pytest.mark.parametrize("order", ORDERS)
def test_a_singular_hessian_is_no_obstacle(order: Order) -> None:
    """Five tokens for 96 inputs, and an input that repeats another."""
    weight = some_weight(20, 96)
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(2))
    x[:, 7] = x[:, 11]
    hessian = x.T @ x
    for damping in (0.0, 0.01):
        found = gptq(weight, hessian, 32, Gptq(damping, order))
        assert weighted_error(weight, found, hessian) < 0.5 * weighted_error(
            weight, quantize(weight, 32), hessian
        )


def test_no_inputs_at_all_round_to_nearest() -> None:
    weight = some_weight(20, 96)
    found = gptq(weight, torch.zeros(96, 96), 32)
    assert torch.equal(found.codes, quantize(weight, 32).codes)


def test_only_ratios_of_the_hessian_count() -> None:
    weight, hessian = some_weight(20, 96), second_moments(96, 1.0)
    assert torch.equal(gptq(weight, hessian, 32).codes, gptq(weight, hessian * 2.0**-20, 32).codes)


def test_outputs_do_not_see_each_other() -> None:
    weight, hessian = some_weight(20, 96), second_moments(96, 1.0)
    both, alone = gptq(weight, hessian, 32), gptq(weight[7:8], hessian, 32)
    assert (unpack_nibbles(both.codes[7:8]) == unpack_nibbles(alone.codes)).float().mean() > 0.95
    assert torch.equal(gptq(weight, hessian, 32).codes, both.codes)


@pytest.mark.parametrize(
    ("weight", "hessian", "group", "reason"),
    [
        (torch.ones(3, 7), torch.eye(7), 2, "even"),
        (torch.ones(3, 8), torch.eye(8), 3, "group_size is 3"),
        (torch.ones(3, 8), torch.eye(6), 2, r"the Hessian is \[6, 6\], the weight has 8"),
        (torch.ones(3, 8), torch.full((8, 8), torch.nan), 2, "NaN or infinity"),
        (torch.full((3, 8), torch.inf), torch.eye(8), 2, "not finite"),
        (torch.full((3, 8), 70000.0), torch.eye(8), 2, "65504"),
    ],
)
def test_what_cannot_be_rounded_is_refused(
    weight: torch.Tensor, hessian: torch.Tensor, group: int, reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        gptq(weight, hessian, group)


def test_weighted_error_is_that_of_the_outputs() -> None:
    weight = some_weight(20, 96)
    x = torch.randn(400, 96, generator=torch.Generator().manual_seed(8))
    packed = quantize(weight, 32)
    missed = x @ (weight - dequantize(packed, torch.float32)).T
    expected = float(missed.square().sum() / (x @ weight.T).square().sum())
    assert weighted_error(weight, packed, x.T @ x) == pytest.approx(expected, rel=1e-4)
