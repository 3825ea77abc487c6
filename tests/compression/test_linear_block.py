"""The linear block against its formula, and its way through a bundle's tensors."""

import pytest
import torch

from exeunt.compression.linear_block import (
    LinearBlock,
    LinearBlockError,
    linear_block_from_tensors,
    linear_block_tensors,
)


def _block(hidden: int = 13, rank: int = 5, dtype: torch.dtype = torch.float32) -> LinearBlock:
    torch.manual_seed(0)
    return LinearBlock(
        7,
        torch.randn(rank, hidden, dtype=dtype),
        torch.randn(hidden, rank, dtype=dtype),
        torch.randn(hidden, dtype=dtype),
    )


@pytest.mark.parametrize("rows", [0, 1, 9])
def test_it_is_the_affine_map_of_its_formula(rows: int) -> None:
    block = _block()
    hidden = torch.randn(rows, 13)
    matrix = torch.eye(13, dtype=torch.float64) + block.up.double() @ block.down.double()
    expected = hidden.double() @ matrix.T + block.bias.double()
    torch.testing.assert_close(block.apply(hidden), expected.float(), rtol=1e-4, atol=1e-5)


def test_it_counts_its_parameters_and_bytes() -> None:
    block = _block(dtype=torch.bfloat16)
    assert block.parameters == 5 * 13 + 13 * 5 + 13
    assert block.nbytes == 2 * block.parameters
    assert (block.rank, block.hidden_size) == (5, 13)


def test_it_survives_the_bundle_names_and_a_change_of_dtype() -> None:
    block = _block()
    again = linear_block_from_tensors(linear_block_tensors(block))
    assert again.index == 7
    hidden = torch.randn(3, 13)
    assert torch.equal(again.apply(hidden), block.apply(hidden))
    assert again.to("cpu", torch.bfloat16).apply(hidden.bfloat16()).dtype == torch.bfloat16


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(LinearBlockError, match=r"linear block 2: down \(5, 13\), up \(5, 13\)"):
        LinearBlock(2, torch.zeros(5, 13), torch.zeros(5, 13), torch.zeros(13))


@pytest.mark.parametrize("change", ["missing", "foreign", "two blocks", "none"])
def test_tensors_of_something_else_are_refused(change: str) -> None:
    tensors = linear_block_tensors(_block())
    if change == "missing":
        del tensors["linear_block.7.up"]
    elif change == "foreign":
        tensors["other"] = torch.zeros(1)
    elif change == "two blocks":
        tensors["linear_block.8.up"] = torch.zeros(1)
    else:
        tensors = {}
    with pytest.raises(LinearBlockError, match="expected the tensors"):
        linear_block_from_tensors(tensors)
