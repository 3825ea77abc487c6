"""Certificates: which share of the tokens may leave early at which stated risk, for every combination and two risks."""

from collections.abc import Sequence
from typing import Final

from matplotlib.axes import Axes

from exeunt.calibration.certificates import CertifiedVariant
from exeunt.calibration.nll_risk import CLIP
from exeunt.calibration.report.certificate_tables import disagreement_table, nll_table, ways
from exeunt.calibration.report.content import ReportContent
from exeunt.calibration.report.drawing import INK, SOFT, draw, label_ends, series
from exeunt.calibration.report.parts import Details, Figure, Section, Table, Text
from exeunt.calibration.report.verdict import deployed_outcome
from exeunt.calibration.report.words import count, skipped_name, variant_name
from exeunt.calibration.risk import percent


def certificates_section(content: ReportContent) -> Section | None:
    """The section; None where there are no exits to certify."""
    deployed = deployed_outcome(content.certified)
    if deployed is None:
        return None
    own = [each for each in content.certified if each.variant == deployed.variant]
    others = [each for each in content.certified if each.variant != deployed.variant]
    figures = [_disagreement(content, deployed, own)]
    tables = [disagreement_table(own)]
    other_tables = [disagreement_table(others)]
    if any(each.nll is not None and each.nll.certificates for each in own):
        figures.append(_nll(own))
        tables.append(nll_table(own))
        other_tables.append(nll_table(others))
    parts: list[Figure | Table | Text | Details] = [*figures, *tables]
    if others:
        number = len({each.variant for each in others})
        summary = f"The other {number} variants" if number > 1 else "The other variant"
        parts.append(Details(summary, tuple(table for table in other_tables if table.rows)))
    return Section(
        "certificates",
        "Certificates",
        f"A target is certified where, with {percent(_confidence(content))} confidence, the risk on text like the "
        "certify split, which nothing else has seen, is at most the target. Disagreement: among the tokens that leave "
        "early, the share with another top token than full depth of the same variant. Likelihood: by how many "
        f"nats the text's tokens become less likely, on average over all of them, each counted with at most "
        f"{CLIP:g} nats. {_unit(deployed, others)}{_coverage(deployed, others, content.selection.plan.correlation)}",
        "It says nothing about sampled tokens, nothing about text unlike the certify split, and each "
        "certificate holds by itself; unclipped perplexity has an interval and no certificate. The server "
        "refuses a target that is not certified by name.",
        tuple(parts),
    )


def _confidence(content: ReportContent) -> float:
    entries = content.manifest.risk_table
    return entries[0].confidence if entries else 0.95


def _unit(deployed: CertifiedVariant, others: Sequence[CertifiedVariant]) -> str:
    """How many blocks of text there are, and what so many may have none of."""
    if not deployed.text_blocks:
        return "Tokens of one text are not independent, so the unit is a block of text."
    fewest = min((each.text_blocks for each in others), default=deployed.text_blocks)
    apart = fewest != deployed.text_blocks
    numbers = f"{count(deployed.text_blocks)} of them here" + (
        f", {count(fewest)} for the other variants" if apart else ""
    )
    rarest = f"{_may_miss(deployed.text_blocks):.1%}" + (f" ({_may_miss(fewest):.1%})" if apart else "")
    return (
        f"Tokens of one text are not independent, so the unit is a block of text: {numbers}. Of a kind of text that is "
        f"less than {rarest} of all there may be none among these, and no certificate speaks of it."
    )


def _may_miss(blocks: int) -> float:
    """The share of all text that a kind may have and yet be missing from so many blocks, but for a chance of 5 %."""
    return float(1.0 - _MISSED ** (1.0 / blocks))


_MISSED: Final = 0.05
"""The chance that a kind of text is missing from the units, above which the page says that it may be."""
_ALIKE: Final = 0.1
"""The correlation of errors within a unit up to which simulation finds the bound of disagreement to keep its level."""
_FEW: Final = 40
"""Units below which not every kind of text that was simulated kept the level."""


def _coverage(deployed: CertifiedVariant, others: Sequence[CertifiedVariant], correlation: float) -> str:
    """That coverage is no theorem, where the text is of the kind on which simulation finds it to give way."""
    reasons = []
    if correlation > _ALIKE:
        reasons.append(f"errors within a unit may be correlated by {correlation:.2f}, more than {_ALIKE:g}")
    if 0 < deployed.text_blocks < _FEW:
        reasons.append(f"there are fewer than {_FEW} units")
    elif any(0 < each.text_blocks < _FEW for each in others):
        reasons.append(f"the other variants have fewer than {_FEW} units")
    if not reasons:
        return ""
    return (
        f" Here {' and '.join(reasons)}: on such texts simulation has up to 8 % of the certificates unsafe, not the "
        "5 % that they speak of."
    )


def _disagreement(content: ReportContent, deployed: CertifiedVariant, own: list[CertifiedVariant]) -> Figure:
    targets = list(content.selection.plan.begins)

    def paint(axes: Axes) -> None:
        for number, (each, name) in enumerate(ways(own)):
            tested = [counts for _, counts in each.certification.tested if counts.total]
            rates = [100 * counts.exit_rate for counts in tested]
            risks = [100 * counts.wrong / counts.total for counts in tested]
            axes.plot(rates, risks, **series(number).look, label=f"measured{name}")
        for certificate in deployed.certification.certificates:
            if certificate.certified and certificate.upper_bound is not None:
                _bound(axes, 100 * certificate.exits / certificate.tokens, 100 * certificate.upper_bound)
        _bound_key(axes)
        axes.set(xlabel="tokens that leave early, %", ylabel="of them differ, %")
        axes.set_xlim(left=0)
        axes.set_ylim(0, 100 * 1.4 * max(targets, default=0.1))
        _targets(axes, [(100 * target, percent(target)) for target in targets])
        axes.legend(loc="upper left", ncols=2, columnspacing=1.2)

    return draw(
        "certificates",
        "Disagreement among tokens that leave early against their share, with certified bounds",
        f"Disagreement, {variant_name(deployed.variant)}: each point is a threshold that was tested on the "
        "certify split. Each bar, the upper bound of a certified threshold, lies below its target's dotted line.",
        paint,
    )


def _nll(own: list[CertifiedVariant]) -> Figure:
    held = [each for each in own if each.nll is not None and each.nll.certificates]
    targets = sorted(
        {target.target for each in held if each.nll is not None for target in each.nll.certificates}
    )

    def paint(axes: Axes) -> None:
        top = 1.4 * max(targets)
        for number, each in enumerate(held):
            if each.nll is None:
                continue
            look = series(number)
            rates = [100 * counts.exit_rate for _, counts in each.nll.tested]
            increases = [counts.increase for _, counts in each.nll.tested]
            axes.plot(rates, increases, **look.look, label=f"measured, {skipped_name(each.skipped_kv)}")
            for certificate in each.nll.certificates:
                if certificate.certified and certificate.upper_bound is not None:
                    _bound(
                        axes,
                        100 * certificate.exits / certificate.tokens,
                        certificate.upper_bound,
                        look.colour,
                    )
            top = max(top, 1.15 * max(increases, default=0.0))
        _bound_key(axes)
        axes.axhline(0.0, color=INK, linewidth=1)
        axes.set(xlabel="tokens that leave early, %", ylabel="less likely, nats per token")
        axes.set_xlim(left=0)
        axes.set_ylim(top=top)
        _targets(axes, [(target, f"{target:g}") for target in targets])
        axes.legend(loc="upper left")

    return draw(
        "nll-certificates",
        "Mean increase of negative log-likelihood against the share of tokens that leave, with certified bounds",
        "Likelihood: the mean clipped increase of −log probability at the thresholds tested, with the upper bounds of "
        "certified thresholds and the targets.",
        paint,
        height=3.3,
    )


def _bound(axes: Axes, at: float, bound: float, colour: str = INK) -> None:
    axes.plot([at], [bound], marker="_", ms=14, mew=2, color=colour, linestyle="")


def _bound_key(axes: Axes) -> None:
    """The legend's entry for bounds."""
    axes.plot([], [], marker="_", ms=12, mew=2, color=INK, linestyle="", label="certified bound")


def _targets(axes: Axes, targets: list[tuple[float, str]]) -> None:
    for target, _ in targets:
        axes.axhline(target, color=SOFT, linewidth=1, linestyle=(0, (2, 2)))
    label_ends(axes, [(target, name, SOFT) for target, name in targets])
