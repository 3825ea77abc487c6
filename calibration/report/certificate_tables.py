"""Tables of certificates: a line for each target, one for both ways with skipped keys and values where they agree."""

from collections.abc import Iterator, Sequence

from exeunt.calibration.certificates import CertifiedVariant
from exeunt.calibration.nll_risk import NllCertificate
from exeunt.calibration.report.parts import Cell, Table
from exeunt.calibration.report.words import NOTHING, count, measured, plain, share, skipped_name, variant_name
from exeunt.calibration.risk import Certificate, percent
from exeunt.compression.variant import Variant


def ways(outcomes: Sequence[CertifiedVariant]) -> list[tuple[CertifiedVariant, str]]:
    """Each outcome with what tells it from the others; one alone where both ways with skipped KV are one."""
    if len({each.certification.certificates for each in outcomes}) == 1:
        return [(outcomes[0], "")]
    return [(each, f", {skipped_name(each.skipped_kv)}") for each in outcomes]


def disagreement_table(outcomes: Sequence[CertifiedVariant]) -> Table:
    """The targets of disagreement of every combination."""
    headers = (
        "combination",
        "target",
        "threshold",
        "leave early",
        "of them differ",
        "upper bound",
        "outcome",
    )
    rows = []
    for variant, skipped, certificates in _merged(outcomes):
        for number, certificate in enumerate(certificates):
            rows.append([_combination(variant, skipped, number), *_cells(certificate)])
    return Table(headers, rows, caption="Disagreement of the tokens that leave")


def nll_table(outcomes: Sequence[CertifiedVariant]) -> Table:
    """The targets of the mean NLL increase of every combination."""
    headers = (
        "combination",
        "target",
        "threshold",
        "leave early",
        "less likely",
        "upper bound",
        "perplexity, unclipped",
        "outcome",
    )
    rows = []
    for each in outcomes:
        for number, certificate in enumerate(each.nll.certificates if each.nll is not None else ()):
            rows.append([_combination(each.variant, each.skipped_kv, number), *_nll_cells(certificate)])
    return Table(headers, rows, caption="Likelihood: nats per token, all tokens, clipped")


def _merged(outcomes: Sequence[CertifiedVariant]) -> Iterator[tuple[Variant, str, tuple[Certificate, ...]]]:
    for variant in dict.fromkeys(each.variant for each in outcomes):
        own = [each for each in outcomes if each.variant == variant]
        if len({each.certification.certificates for each in own}) == 1:
            yield variant, " or ".join(each.skipped_kv for each in own), own[0].certification.certificates
        else:
            yield from ((variant, each.skipped_kv, each.certification.certificates) for each in own)


def _combination(variant: Variant, skipped: str, line: int) -> Cell:
    """What a combination's first line is headed by."""
    return Cell(variant_name(variant), skipped) if line == 0 else Cell("")


def _cells(certificate: Certificate) -> list[Cell]:
    return [
        Cell(percent(certificate.target)),
        Cell(plain(certificate.threshold, "{:.4f}")),
        _left(certificate),
        Cell(share(certificate.disagreement, 2)),
        Cell(share(certificate.upper_bound, 2)),
        _outcome(certificate),
    ]


def _nll_cells(certificate: NllCertificate) -> list[Cell]:
    ratio = certificate.perplexity_ratio
    perplexity = measured(ratio, "{:.3f} ×") if ratio is not None else Cell(NOTHING)
    return [
        Cell(f"{certificate.target:g}"),
        Cell(plain(certificate.threshold, "{:.4f}")),
        _left(certificate),
        Cell(plain(certificate.increase, "{:+.4f}")),
        Cell(plain(certificate.upper_bound, "{:+.4f}")),
        perplexity,
        _outcome(certificate),
    ]


def _left(certificate: Certificate | NllCertificate) -> Cell:
    if not certificate.tokens:
        return Cell(NOTHING)
    return Cell(share(certificate.exits / certificate.tokens), f"{count(certificate.exits)} tokens")


def _outcome(certificate: Certificate | NllCertificate) -> Cell:
    if certificate.certified:
        return Cell("certified", tone="good", strong=True)
    return Cell(f"not certified: {certificate.reason or 'no reason given'}", tone="bad")
