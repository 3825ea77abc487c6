"""Units of text: documents where there are enough, long stretches of the few there are otherwise."""

import numpy as np
import pytest
import torch

from exeunt.calibration.text_units import LEAST_DOCUMENTS, LEAST_STRETCH, STRETCHES, text_units


def rows(*lengths: int) -> list[torch.Tensor]:
    return [torch.zeros(length) for length in lengths]


def test_a_document_is_one_unit_wherever_its_rows_stand() -> None:
    documents = [*range(30), 3, 7]
    units = text_units(rows(*[100] * 32), documents)
    assert (units.unit, units.count) == ("document", 30)
    sizes = np.bincount(units.where)
    assert sizes[3] == sizes[7] == 200
    assert sizes.sum() == 3200
    assert units.where[3000] == units.where[300]  # document 3's second row, and its first


def test_rows_are_documents_where_nothing_is_known_of_them() -> None:
    units = text_units(rows(*[50] * LEAST_DOCUMENTS))
    assert (units.unit, units.count) == ("document", LEAST_DOCUMENTS)
    assert np.bincount(units.where).tolist() == [50] * LEAST_DOCUMENTS


@pytest.mark.parametrize("documents", [1, 2, 5, LEAST_DOCUMENTS - 1])
def test_few_documents_are_cut_into_long_stretches_of_about_equal_length(documents: int) -> None:
    lengths, numbers = [512] * 120, [index % documents for index in range(120)]
    units = text_units(rows(*lengths), numbers)
    sizes = np.bincount(units.where)
    assert units.unit == "stretch"
    assert units.count == len(sizes)
    assert 0.75 * STRETCHES <= units.count <= 1.3 * STRETCHES
    assert sizes.min() >= 0.5 * sizes.mean()
    token_document = np.repeat(numbers, lengths)
    for unit in range(units.count):  # a stretch is of one document
        assert len(set(token_document[units.where == unit])) == 1


def test_little_text_has_fewer_stretches_and_not_shorter_ones() -> None:
    units = text_units(rows(*[512] * 4), [0, 0, 0, 0])
    assert np.bincount(units.where).tolist() == [LEAST_STRETCH] * 8
    assert text_units(rows(100, 90), [0, 1]).count == 2


@pytest.mark.parametrize("tokens", [256, 383, 400, 511, 512, 700])
def test_no_stretch_is_shorter_than_the_least(tokens: int) -> None:
    units = text_units([torch.zeros(tokens, dtype=torch.int64)] * 3, [0, 1, 2])
    assert min(np.bincount(units.where)) >= LEAST_STRETCH
