"""INT4 linear: the quantiser's bound, the packed bytes, native against reference, rows that do not see each other."""

import pytest
import torch

from exeunt.kernels.int4_linear import Int4Weight, dequantize, int4_linear, pack, pick, quantize
from exeunt.kernels.int4_linear.native import PackedInt4, pack_panels
from exeunt.kernels.int4_linear.reference import int4_linear_reference
from exeunt.kernels.int4_linear.weight import FP16_MAX, round_groups
from exeunt.kernels.native.library import NativeLibrary, native_library

SHAPES = [
    (123, 324, 32),
    (5, 246, 64),
    (33, 10, 6),
    (64, 256, 128),
    (1, 2, 2),
    (300, 96, 32),
]  # out, in, group
# INT8 activations: the step is 1/127 of a group's largest magnitude, its error uniform within half a step.
INT8_ERROR = 0.012
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-11}


@pytest.fixture
def library() -> NativeLibrary:
    found = native_library()
    if found is None:
        pytest.skip("needs the native kernels (a C++ compiler, and EXEUNT_NATIVE not 0)")
    return found


def relative_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    return float((out.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize(("out_features", "in_features", "group"), SHAPES)
def test_rounding_stays_within_half_a_step(
    seed: int, out_features: int, in_features: int, group: int
) -> None:
    weight = torch.randn(out_features, in_features) * torch.rand(out_features, 1) * 3
    groups = weight[:, : in_features // group * group].reshape(out_features, -1, group)
    low, high = groups.amin(-1), groups.amax(-1)
    codes, scale, offset = round_groups(groups, low, high)
    error = (codes * scale.float()[..., None] + offset.float()[..., None] - groups).abs()
    bound = scale.float() / 2 + 2**-11 * (low.abs() + 15 * scale.float()) + 1e-6
    assert bool((error <= bound[..., None]).all())
    assert bool(((codes == 0).any(-1) & (codes == 15).any(-1)).all())  # the range is used to its ends


@pytest.mark.parametrize(("out_features", "in_features", "group"), SHAPES)
def test_clip_search_never_does_worse_than_the_whole_range(
    seed: int, out_features: int, in_features: int, group: int
) -> None:
    weight = torch.randn(out_features, in_features)
    weight[:, 0] *= 4
    quantised = quantize(weight, group)
    error = (dequantize(quantised, torch.float32) - weight).square()
    for index in range(quantised.groups):
        part = weight[:, index * group : (index + 1) * group]
        codes, scale, offset = round_groups(part, part.amin(-1), part.amax(-1))
        plain = (codes * scale.float()[:, None] + offset.float()[:, None] - part).square().sum(-1)
        assert bool((error[:, index * group : (index + 1) * group].sum(-1) <= plain * 1.0001 + 1e-9).all())


@pytest.mark.parametrize(("out_features", "in_features", "group"), SHAPES)
def test_clip_search_counts_inputs_by_their_importance(
    seed: int, out_features: int, in_features: int, group: int
) -> None:
    weight, importance = torch.randn(out_features, in_features), torch.rand(in_features).pow(4) * 50

    def lost(importance_searched: torch.Tensor | None) -> float:
        error = dequantize(quantize(weight, group, importance_searched), torch.float32) - weight
        return float((error.square() * importance).sum())

    assert lost(importance) <= lost(None) * 1.0001
    even = quantize(weight, group, torch.full((in_features,), 4.0))
    assert torch.equal(even.codes, quantize(weight, group).codes)


def test_weights_stay_packed(library: NativeLibrary) -> None:
    weight = quantize(torch.randn(256, 512), 32)
    assert weight.nbytes == 256 * 512 // 2 + 2 * 256 * 16 * 2
    packed = pack(weight)
    assert isinstance(packed, PackedInt4)
    assert packed.nbytes == weight.nbytes == packed.panels.untyped_storage().nbytes()
    ragged = pack_panels(quantize(torch.randn(255, 512), 32), library)
    assert ragged.nbytes == -(-255 // library.lanes) * library.lanes * (512 // 2 + 16 * 4)


@pytest.mark.parametrize(("out_features", "in_features", "group"), SHAPES)
def test_packing_loses_nothing(
    library: NativeLibrary, seed: int, out_features: int, in_features: int, group: int
) -> None:
    weight = quantize(torch.randn(out_features, in_features), group)
    # 127 times a unit vector is exact in INT8 with scale 1, so each weight comes out by itself.
    columns = int4_linear(torch.eye(in_features) * 127, pack_panels(weight, library)).T / 127
    torch.testing.assert_close(columns, dequantize(weight, torch.float32), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("out_features", "in_features", "group"), SHAPES)
def test_native_equals_reference_to_int8_activations(
    library: NativeLibrary, seed: int, dtype: torch.dtype, out_features: int, in_features: int, group: int
) -> None:
    weight = quantize(torch.randn(out_features, in_features), group)
    packed = pack_panels(weight, library)
    for rows in (1, 2, 3, 5, 123, 300):
        x, bias = torch.randn(rows, in_features).to(dtype), torch.randn(out_features).to(dtype)
        expected = int4_linear_reference(x.float(), weight, bias.float())
        out = int4_linear(x, packed, bias)
        assert out.shape == expected.shape
        assert out.dtype == dtype
        # A sum may cancel where there are few of them: the error is held against what is summed, not against the sum.
        summed = x.float().norm() * dequantize(weight, torch.float32).norm() / in_features**0.5
        error = (out.float() - expected).norm() / (summed + expected.norm())
        assert error < INT8_ERROR + ROUNDING[dtype]


@pytest.mark.parametrize(("group", "limit"), [(32, 0.0065), (128, 0.0075)])
def test_int8_error_is_well_below_a_percent(
    library: NativeLibrary, seed: int, group: int, limit: float
) -> None:
    weight = quantize(torch.randn(512, 1024), group)
    x = torch.randn(64, 1024)
    out = int4_linear(x, pack_panels(weight, library))
    assert relative_error(out, int4_linear_reference(x, weight)) < limit


def test_an_outlier_stays_in_its_group(library: NativeLibrary, seed: int) -> None:
    weight = quantize(torch.randn(512, 1024), 32)
    packed = pack_panels(weight, library)
    x = torch.randn(64, 1024)
    x[:, 77] = 1000.0  # as Qwen's hidden states have
    with_outlier = int4_linear(x, packed) - int4_linear_reference(x, weight)
    only_outlier = torch.zeros_like(x)
    only_outlier[:, 77] = 1000.0
    rest = x - only_outlier
    others = torch.cat([rest[:, :64], rest[:, 96:]], 1).norm() / rest.norm()
    assert float(others) > 0.98
    assert (
        float(with_outlier.norm() / int4_linear_reference(rest, weight).norm()) < 0.2
    )  # only group 2 is coarse


def test_a_row_does_not_see_the_others(library: NativeLibrary, seed: int) -> None:
    packed = pack_panels(quantize(torch.randn(333, 200), 32), library)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(300, 200).to(dtype)
        whole = int4_linear(x, packed)
        for rows in (slice(0, 1), slice(7, 9), slice(5, 8), slice(1, 5), slice(40, 107), slice(3, 300)):
            assert torch.equal(int4_linear(x[rows], packed), whole[rows])
        order = torch.randperm(300)
        assert torch.equal(int4_linear(x[order], packed), whole[order])


def test_one_and_two_threads_agree(library: NativeLibrary, seed: int) -> None:
    packed = pack_panels(quantize(torch.randn(1500, 768), 32), library)
    x = torch.randn(64, 768)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = int4_linear(x, packed)
        torch.set_num_threads(2)
        assert torch.equal(int4_linear(x, packed), alone)
    finally:
        torch.set_num_threads(before)


def test_every_output_is_written_and_nothing_else(library: NativeLibrary, seed: int) -> None:
    packed = pack_panels(quantize(torch.randn(37, 64), 32), library)
    x = torch.randn(5, 64)
    guarded = torch.full((7, 37), float("nan"))
    pointer = guarded[1].data_ptr()
    library.int4_linear(pointer, x.data_ptr(), packed.panels.data_ptr(), None, 5, 64, 37, 32, 0, 1)
    assert torch.equal(guarded[1:6], int4_linear(x, packed))
    assert bool(guarded[0].isnan().all())
    assert bool(guarded[6].isnan().all())


def test_leading_dimensions_empty_and_strided_inputs(library: NativeLibrary, seed: int) -> None:
    for weight in (
        quantize(torch.randn(12, 64), 32),
        pack_panels(quantize(torch.randn(12, 64), 32), library),
    ):
        assert int4_linear(torch.randn(0, 64), weight).shape == (0, 12)
        x = torch.randn(2, 3, 64)
        torch.testing.assert_close(
            int4_linear(x, weight), int4_linear(x.reshape(6, 64), weight).reshape(2, 3, 12)
        )
        wide = torch.randn(6, 128)
        torch.testing.assert_close(
            int4_linear(wide[:, ::2], weight), int4_linear(wide[:, ::2].clone(), weight)
        )


def test_what_is_not_finite_stays_visible_in_its_row(library: NativeLibrary, seed: int) -> None:
    packed = pack_panels(quantize(torch.randn(12, 64), 32), library)
    x = torch.randn(3, 64)
    x[1, 40] = float("nan")
    out = int4_linear(x, packed)
    assert bool(out[1].isnan().all())
    assert bool(out[[0, 2]].isfinite().all())
    x[1, 40] = float("inf")
    assert not bool(int4_linear(x, packed)[1].isfinite().any())


def test_wrong_sizes_are_refused_with_the_reason(library: NativeLibrary) -> None:
    weight = quantize(torch.randn(4, 8), 4)
    for held in (weight, pack_panels(weight, library)):
        with pytest.raises(ValueError, match="the input has 6 features, the INT4 weight takes 8"):
            int4_linear(torch.randn(1, 6), held)
    with pytest.raises(TypeError, match="float64"):
        int4_linear(torch.randn(1, 8).double(), pack_panels(weight, library))
    with pytest.raises(ValueError, match="in_features is 7"):
        quantize(torch.randn(4, 7), 4)
    with pytest.raises(ValueError, match="group_size is 3"):
        quantize(torch.randn(4, 8), 3)
    with pytest.raises(ValueError, match="not finite"):
        quantize(torch.full((4, 8), FP16_MAX * 2), 4)
    with pytest.raises(ValueError, match="INT4 codes are"):
        Int4Weight(weight.codes[:2], weight.scales, weight.offsets, 4, 8, 4)


@pytest.mark.parametrize(("out_features", "in_features", "group"), SHAPES)
@pytest.mark.parametrize("packed", [False, True])
def test_some_outputs_are_those_of_the_whole_weight(
    seed: int, out_features: int, in_features: int, group: int, packed: bool
) -> None:
    weight = quantize(torch.randn(out_features, in_features), group)
    held = pack(weight) if packed else weight
    wanted = torch.randint(out_features, (19,))  # some twice, in any order
    part, x = pick(held, wanted), torch.randn(3, in_features)
    assert part.out_features == 19
    whole = int4_linear(x, held)[:, wanted]
    if isinstance(held, PackedInt4):
        assert torch.equal(int4_linear(x, part), whole)
    else:  # PyTorch's product rounds by the shape of the matrix
        torch.testing.assert_close(int4_linear(x, part), whole, rtol=1e-5, atol=1e-5)
