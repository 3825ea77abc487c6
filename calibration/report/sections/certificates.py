"""Certificates: which share of the tokens may leave early at which stated risk, for every combination."""

from collections.abc import Sequence

from matplotlib.axes import Axes

from exeunt.calibration.certificates import CertifiedVariant
from exeunt.calibration.report.content import ReportContent
from exeunt.calibration.report.drawing import INK, SOFT, draw, label_ends, series
from exeunt.calibration.report.parts import Cell, Details, Figure, Section, Table
from exeunt.calibration.report.verdict import deployed_outcome
from exeunt.calibration.report.words import NOTHING, count, plain, share, skipped_name, variant_name
from exeunt.calibration.risk import Certificate, percent
from exeunt.calibration.thresholds import BLOCK_TOKENS
from exeunt.compression.variant import Variant


def certificates_section(content: ReportContent) -> Section | None:
    """The section; None where there are no exits to certify."""
    deployed = deployed_outcome(content.certified)
    if deployed is None:
        return None
    confidence = _confidence(content)
    others = [each for each in content.certified if each.variant != deployed.variant]
    own = [each for each in content.certified if each.variant == deployed.variant]
    parts: list[Figure | Table | Details] = [_risk_plot(content, deployed), _table(own)]
    if others:
        parts.append(
            Details(f"The other {len({each.variant for each in others})} variants", (_table(others),))
        )
    return Section(
        "certificates",
        "Certificates",
        f"A target is certified where, with {percent(confidence)} confidence, among the tokens that leave "
        "early at most that share has another top token than full depth of the same variant, under teacher "
        f"forcing on text like the certify split, which nothing else has seen. "
        f"{len(content.selection.plan.thresholds)} thresholds were planned on other text and are tested from "
        f"strict to loose; the unit is a block of {BLOCK_TOKENS} tokens, for tokens of one text are not independent.",
        "It says nothing about sampled tokens, nothing about text unlike the certify split, and each "
        "certificate holds by itself. With backfill later tokens attend to the keys and values of full depth, "
        "with propagate to what tokens left behind where they left. A target that is not certified is refused by "
        "the server by name.",
        tuple(parts),
    )


def _confidence(content: ReportContent) -> float:
    entries = content.manifest.risk_table
    return entries[0].confidence if entries else 0.0


def _risk_plot(content: ReportContent, deployed: CertifiedVariant) -> Figure:
    targets = list(content.selection.plan.begins)
    own = _lines([each for each in content.certified if each.variant == deployed.variant])

    def paint(axes: Axes) -> None:
        for number, (each, name) in enumerate(own):
            look = series(number)
            seen = [(c.total / c.tokens, c.risk) for _, c in each.certification.tested if c.risk is not None]
            if seen:
                rates, risks = zip(*seen, strict=True)
                axes.plot(
                    [100 * rate for rate in rates],
                    [100 * risk for risk in risks],
                    **look.look,
                    label=f"measured{name}",
                )
        for certificate in deployed.certification.certificates:
            if certificate.certified and certificate.upper_bound is not None:
                rate = 100 * certificate.exits / certificate.tokens
                axes.plot(
                    [rate], [100 * certificate.upper_bound], marker="_", ms=14, mew=2, color=INK, linestyle=""
                )
        axes.set(xlabel="tokens that leave early, %", ylabel="of them differ from full depth, %")
        axes.set_xlim(left=0)
        axes.set_ylim(0, 100 * 1.35 * max(targets, default=0.1))
        for target in targets:
            axes.axhline(100 * target, color=SOFT, linewidth=1, linestyle=(0, (2, 2)))
        label_ends(axes, [(100 * target, percent(target), SOFT) for target in targets])
        axes.legend(loc="upper left")

    return draw(
        "certificates",
        "Disagreement among tokens that leave early against their share, with certified bounds",
        f"{variant_name(deployed.variant)}: each point is a threshold that was tested on the certify split. "
        "Bars are the upper bounds of the certified thresholds; each lies below its target's dotted line.",
        paint,
    )


def _lines(outcomes: Sequence[CertifiedVariant]) -> list[tuple[CertifiedVariant, str]]:
    """Each outcome with what tells it from the others; one alone where both ways with skipped KV are one."""
    if len({each.certification.certificates for each in outcomes}) == 1:
        return [(outcomes[0], "")]
    return [(each, f", {skipped_name(each.skipped_kv)}") for each in outcomes]


def _table(outcomes: Sequence[CertifiedVariant]) -> Table:
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
    for variant, skipped, certificates in _same_merged(outcomes):
        for number, certificate in enumerate(certificates):
            name = Cell(variant_name(variant), skipped) if number == 0 else Cell("")
            rows.append([name, *_cells(certificate)])
    return Table(headers, rows)


def _same_merged(
    outcomes: Sequence[CertifiedVariant],
) -> list[tuple[Variant, str, tuple[Certificate, ...]]]:
    """One line for both ways with skipped keys and values where they have the same certificates."""
    merged: list[tuple[Variant, str, tuple[Certificate, ...]]] = []
    for variant in dict.fromkeys(each.variant for each in outcomes):
        own = [each for each in outcomes if each.variant == variant]
        found = {each.certification.certificates for each in own}
        if len(found) == 1:
            merged.append(
                (variant, " or ".join(each.skipped_kv for each in own), own[0].certification.certificates)
            )
        else:
            merged += [(variant, each.skipped_kv, each.certification.certificates) for each in own]
    return merged


def _cells(certificate: Certificate) -> list[Cell]:
    rate = certificate.exits / certificate.tokens if certificate.tokens else None
    outcome = Cell("certified", tone="good", strong=True)
    if not certificate.certified:
        outcome = Cell(f"not certified: {certificate.reason or 'no reason given'}", tone="bad")
    left = f"{count(certificate.exits)} tokens" if certificate.tokens else ""
    return [
        Cell(percent(certificate.target)),
        Cell(plain(certificate.threshold, "{:.4f}")),
        Cell(share(rate), left),
        Cell(share(certificate.disagreement, 2)),
        Cell(share(certificate.upper_bound, 2)),
        outcome if certificate.certified or certificate.reason else Cell(NOTHING),
    ]
