"""What `docs/certificates.md` says of documents so rare that a split may have none: no bound sees them."""

import pytest

from scripts.compare_bounds.rare import RareDocuments, passing

DRAWS = 1000


@pytest.mark.parametrize(
    ("mixture", "documents", "target", "about"),
    [
        (RareDocuments(0.02), 43, 0.02, 0.27),
        (RareDocuments(0.02), 77, 0.02, 0.10),
        (RareDocuments(1 / 30, nats=0.3), 43, 0.01, 0.23),
        (RareDocuments(1 / 30, nats=0.3), 77, 0.01, 0.07),
    ],
)
def test_a_rare_class_of_documents_passes_far_too_often(
    mixture: RareDocuments, documents: int, target: float, about: float
) -> None:
    assert max(mixture.disagreement * (mixture.nats == 0), mixture.increase) == pytest.approx(target)
    found = passing(mixture, documents, target, DRAWS, seed=5)
    assert found == pytest.approx(about, abs=3 * (about * (1 - about) / DRAWS) ** 0.5)


@pytest.mark.parametrize("documents", [43, 77])
def test_a_class_that_every_split_has_some_of_keeps_the_level(documents: int) -> None:
    assert passing(RareDocuments(0.08, 0.5), documents, 0.04, DRAWS, seed=5) <= 0.05
