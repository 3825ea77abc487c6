"""What certifying a variant found, as an entry of the journal: JSON values, and the counts as tensors."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

import torch
from torch import Tensor

from exeunt.calibration.bootstrap import Measure
from exeunt.calibration.certification import Certification, NllCertification
from exeunt.calibration.journal import Entry
from exeunt.calibration.nll_risk import NllCertificate, NllCounts
from exeunt.calibration.risk import Certificate, ExitCounts

_EXIT_COUNTS = ("exits", "errors")
_NLL_COUNTS = tuple(field.name for field in fields(NllCounts))


def packed(
    found: Sequence[tuple[Certification, NllCertification | None]], under: Mapping[str, Any]
) -> tuple[dict[str, Tensor], Any]:
    """An entry for the outcomes `found`, certified `under` circumstances (JSON values) that are kept with them."""
    tensors: dict[str, Tensor] = {}
    outcomes = []
    for place, (certification, nll) in enumerate(found):
        for number, (_, counts) in enumerate(certification.tested):
            tensors |= _tensors(f"{place}.exits.{number}", counts, _EXIT_COUNTS)
        for number, (_, increases) in enumerate(() if nll is None else nll.tested):
            tensors |= _tensors(f"{place}.nll.{number}", increases, _NLL_COUNTS)
        outcomes.append(
            {
                "certificates": [asdict(each) for each in certification.certificates],
                "tested": [[threshold, counts.tokens] for threshold, counts in certification.tested],
                "by_exit": [[threshold, list(split)] for threshold, split in certification.by_exit],
                "nll": None
                if nll is None
                else {
                    "certificates": [asdict(each) for each in nll.certificates],
                    "tested": [threshold for threshold, _ in nll.tested],
                },
            }
        )
    return tensors, {"under": dict(under), "outcomes": outcomes}


def unpacked(
    entry: Entry | None, under: Mapping[str, Any]
) -> list[tuple[Certification, NllCertification | None]] | None:
    """The outcomes of an entry that `packed` made `under` the same circumstances; None for any other."""
    if entry is None or entry[1]["under"] != dict(under):
        return None
    tensors, record = entry
    found: list[tuple[Certification, NllCertification | None]] = []
    for place, outcome in enumerate(record["outcomes"]):
        tested = []
        for number, (threshold, tokens) in enumerate(outcome["tested"]):
            exits, errors = _arrays(f"{place}.exits.{number}", tensors, _EXIT_COUNTS)
            tested.append((threshold, ExitCounts(exits, errors, tokens)))
        certification = Certification(
            tuple(Certificate(**each) for each in outcome["certificates"]),
            tuple(tested),
            tuple((threshold, tuple(split)) for threshold, split in outcome["by_exit"]),
        )
        found.append((certification, _nll(place, tensors, outcome["nll"])))
    return found


def _nll(place: int, tensors: Mapping[str, Tensor], outcome: Any) -> NllCertification | None:
    if outcome is None:
        return None
    certificates = tuple(
        NllCertificate(
            **{**each, "unclipped": None if each["unclipped"] is None else Measure(**each["unclipped"])}
        )
        for each in outcome["certificates"]
    )
    tested = tuple(
        (threshold, NllCounts(*_arrays(f"{place}.nll.{number}", tensors, _NLL_COUNTS)))
        for number, threshold in enumerate(outcome["tested"])
    )
    return NllCertification(certificates, tested)


def _tensors(prefix: str, counts: ExitCounts | NllCounts, names: Sequence[str]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": torch.from_numpy(getattr(counts, name).copy()) for name in names}


def _arrays(prefix: str, tensors: Mapping[str, Tensor], names: Sequence[str]) -> list[Any]:
    return [tensors[f"{prefix}.{name}"].numpy() for name in names]
