"""Each form errs as theory says on data whose error is known, and the deployed one reads what the pages hold."""

import pytest
import torch
from torch import Tensor

from exeunt.calibration.kv_forms import DEPLOYED, FORMS, FULL, PER_CHANNEL, UNROTATED, KVForm
from exeunt.compression.kv_format import KVLayout, KVPages
from exeunt.kernels.paged_attention.reference import gather_kv
from exeunt.kernels.write_kv import rotate, write_kv


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def mean_error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).double().square().mean())


def test_uniform_values_err_by_a_twelfth_of_the_squared_step() -> None:
    width = 256
    values = uniform(2000, 2, width) * 3.0 - 1.0
    values[..., 0], values[..., 1] = -1.0, 2.0  # the range, and so the step, is known
    step = 3.0 / 15
    for form in (DEPLOYED, UNROTATED):
        error = mean_error(form.values(values), values)
        assert error == pytest.approx(step**2 / 12 * (width - 2) / width, rel=0.01)
    assert mean_error(UNROTATED.keys(values), values) == mean_error(UNROTATED.values(values), values)


def test_uniform_channels_err_by_a_twelfth_of_the_squared_step() -> None:
    sizes = torch.tensor([0.01, 1.0, 30.0, 4.0])
    x = (uniform(20_000, 3, 4) * 2 - 1) * sizes
    x[0] = sizes  # the largest magnitude of each channel is known
    for found in (PER_CHANNEL.keys(x), PER_CHANNEL.values(x)):
        errors = (found - x).double().square().mean((0, 1))
        steps = sizes / 7
        torch.testing.assert_close(errors, (steps**2 / 12).double(), rtol=0.03, atol=0)


@pytest.mark.parametrize("form", [*FORMS, FULL], ids=lambda form: form.name)
def test_a_form_is_exact_where_its_codes_are(form: KVForm) -> None:
    """Integers times what each form scales by: all of them within its codes, both ends present."""
    if form is PER_CHANNEL:
        codes = torch.randint(-7, 8, (300, 2, 16), generator=torch.Generator().manual_seed(1)).float()
        codes[0], codes[1] = 7, -7
        x = codes * 2.0 ** torch.arange(-8, 8)
    else:
        codes = torch.randint(0, 16, (300, 2, 16), generator=torch.Generator().manual_seed(1)).float()
        codes[..., 0], codes[..., 1] = 0, 15
        x = (codes - 6) * 2.0 ** torch.arange(-3, 297).clamp(max=8)[:, None, None]
    torch.testing.assert_close(form.values(x), x, rtol=1e-6, atol=0)
    in_basis = rotate(x) if form is DEPLOYED else x
    torch.testing.assert_close(form.keys(in_basis), in_basis, rtol=1e-5, atol=1e-4)


def test_constant_tokens_and_channels_are_kept() -> None:
    x = torch.zeros(5, 2, 8)
    for form in FORMS:
        assert torch.equal(form.keys(x), x)
    x[:, 1, 3] = 0.875  # seven eighths: its scale is a float16
    assert torch.equal(PER_CHANNEL.keys(x), x)


@pytest.mark.parametrize(("outlier", "width"), [(20.0, 64), (40.0, 128)])
def test_rotation_tames_an_outlier_channel(outlier: float, width: int) -> None:
    """Both errors are a twelfth of the squared step, and the steps are the ranges' fifteenths: the factor is known."""
    x = random(4000, 1, width)
    x[..., 5] = outlier * random(4000, 1, seed=1).sign()

    def squared_step(keys: Tensor) -> float:
        return float(((keys.amax(-1) - keys.amin(-1)) / 15).square().mean())

    plain, turned = mean_error(UNROTATED.keys(x), x), mean_error(DEPLOYED.keys(x), x)
    assert plain == pytest.approx(squared_step(x) / 12, rel=0.1)
    assert turned == pytest.approx(squared_step(rotate(x)) / 12, rel=0.1)
    assert plain / turned == pytest.approx(squared_step(x) / squared_step(rotate(x)), rel=0.1)
    assert plain / turned > 5


def test_scores_of_rotated_keys_are_those_of_rotated_queries() -> None:
    queries, keys = random(9, 2, 16), random(9, 2, 16, seed=1)
    rotated_back = (queries * DEPLOYED.keys(keys)).sum(-1)
    quantised = UNROTATED.keys(rotate(keys))  # what the pages hold
    torch.testing.assert_close(rotated_back, (rotate(queries) * quantised).sum(-1))


@pytest.mark.parametrize("head_dim", [12, 14, 32])
def test_the_deployed_form_is_what_pages_give_back(head_dim: int) -> None:
    layout = KVLayout("int4", (0,), 2, head_dim, torch.float32, 4096)
    pages = KVPages(layout, torch.zeros(2 * 4096, dtype=torch.uint8))
    keys, values = random(11, 2, head_dim) * 3, random(11, 2, head_dim, seed=1) + 2
    write_kv(keys, values, torch.arange(11), pages.block(0))
    stored_keys, stored_values = gather_kv(pages.block(0), torch.tensor([[0, 1]]), 11)
    torch.testing.assert_close(DEPLOYED.keys(keys), rotate(stored_keys[0].transpose(0, 1)))
    assert torch.equal(DEPLOYED.values(values), stored_values[0].transpose(0, 1))
    assert 2 * 2 * DEPLOYED.head_bytes(head_dim, 4, 11) == layout.bytes_per_token
    full = KVLayout("full", (0,), 2, head_dim, torch.float32, 4096)
    assert 2 * 2 * FULL.head_bytes(head_dim, 4, 11) == full.bytes_per_token


def test_only_the_papers_form_needs_the_whole_row() -> None:
    x = random(40, 2, 16)
    for form in (*FORMS, FULL):
        alone = torch.cat([form.keys(x[:25]), form.keys(x[25:])])
        assert torch.equal(alone, form.keys(x)) == form.streams
    assert PER_CHANNEL.head_bytes(16, 4, 40) == 8 + 2 * 16 / 40


def test_sixteen_bits_are_read_as_numbers() -> None:
    x = random(20, 2, 16).bfloat16()
    for form in (*FORMS, FULL):
        assert form.keys(x).dtype == form.values(x).dtype == torch.float32
        assert torch.equal(form.keys(x), form.keys(x.float()))
