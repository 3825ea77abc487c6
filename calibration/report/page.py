"""The report for people: `report.html`, one file with everything in it, light or dark as the reader's system asks."""

from collections.abc import Sequence
from typing import Any, Final

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from exeunt.calibration.certificates import CertifiedVariant
from exeunt.calibration.report.content import ReportContent
from exeunt.calibration.report.plots import (
    agreement_plot,
    linearity_plot,
    reliability_plot,
    risk_plot,
    trade_plot,
)
from exeunt.calibration.risk import Certificate
from exeunt.compression.variant import Variant

_PAGE: Final = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>Calibration of {{ manifest.base_model.name }}</title>
<style>
:root { --ink: #1d2430; --paper: #fdfdfc; --line: #d5d8dd; --soft: #5d6675; --good: #1f7a4d; --bad: #a33b3b; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e7ec; --paper: #15181d; --line: #353b45; --soft: #9aa3b1; --good: #5ec48f; --bad: #e08585; }
}
body { color: var(--ink); background: var(--paper); font: 16px/1.5 system-ui, sans-serif; max-width: 62rem;
  margin: 2rem auto; padding: 0 1rem; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2.5rem; }
table { border-collapse: collapse; font-size: 0.85rem; font-variant-numeric: tabular-nums; width: 100%; }
th, td { border-bottom: 1px solid var(--line); padding: 0.3rem 0.5rem; text-align: left; vertical-align: top; }
.wide { overflow-x: auto; } .soft { color: var(--soft); } .good { color: var(--good); } .bad { color: var(--bad); }
svg { max-width: 100%; height: auto; }
</style>
</head>
<body>
<h1>Calibration of {{ manifest.base_model.name }}</h1>
<p>{{ manifest.base_model.architecture }}, {{ "{:,}".format(manifest.base_model.parameters) }} parameters in
{{ manifest.base_model.blocks }} blocks.
Calibrated on {{ data.data }}{% if data.origin %} ({{ data.origin }}){% endif %}:
{% for name, count in data.splits.items() %}{{ "{:,}".format(count) }} tokens to {{ name }}, {% endfor %}
seed {{ data.seed }}.</p>

<h2>Every mode</h2>
<p>Teacher-forced on {{ "{:,}".format(table.tokens) }} tokens ({{ table.text_blocks }} blocks) of text that nothing was
fitted on. The change is in perplexity over the first row; KL is in nats per token against it, agreement of top tokens
with it; the last column is the share of the tokens that left early whose top token differs from full depth of the
same variant. In brackets 95 % intervals, bootstrapped over blocks of text, all modes on the same blocks. Where a
mode's threshold was certified on the same split, its figures lean a little to the good side. Skipped keys and values
are propagated, or backfilled where a row says so. The verified mode has the figures of exits off: its output is the
same.</p>
<div class="wide"><table><tr>{% for head in table.HEADERS %}<th>{{ head }}</th>{% endfor %}</tr>
{% for row in table.rows() %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table></div>
{{ plots.trade }}

{% if certificates %}
<h2>Certified exits</h2>
<p>A target is certified where, with {{ "{:.0%}".format(confidence) }} confidence, among the tokens that leave
early at most that share has another top token than full depth of the same variant, on text like the certify split.
With backfill later tokens attend to the keys and values of full depth, with propagate to what tokens left behind
where they left. It says
nothing about sampled tokens. {{ tested }} thresholds were planned on other text and tested from strict to
loose.</p>
<div class="wide"><table><tr><th>combination</th><th>target</th><th>threshold</th><th>leave early</th>
<th>of them differ</th><th>upper bound</th><th>outcome</th></tr>
{% for variant, lines in certificates %}{% for line in lines %}<tr>
<td>{{ variant if loop.first }}</td><td>{{ line.target }}</td><td>{{ line.threshold }}</td><td>{{ line.rate }}</td>
<td>{{ line.risk }}</td><td>{{ line.bound }}</td>
<td class="{{ 'good' if line.certified else 'bad' }}">{{ "certified" if line.certified else line.reason }}</td>
</tr>{% endfor %}{% endfor %}</table></div>
{{ plots.risk }}

<h2>Exits</h2>
<p>Agreement with full depth on the select split, where training was stopped; AUC is the chance that the gate puts
an agreeing token above a disagreeing one. Tokens of the approximate mode may leave at the certified exits; in the
verified mode one exit drafts.</p>
<div class="wide"><table><tr><th>exit</th><th>use</th><th>own head</th><th>ridge</th><th>trained</th><th>AUC</th>
<th>probe alone</th><th>top probability alone</th><th>calibration error</th></tr>
{% for exit in exits %}<tr>{% for cell in exit %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor %}</table></div>
{{ plots.agreement }}
{{ plots.reliability }}
{% endif %}

{% if drafting %}
<h2>Drafts</h2>
<p>In the verified mode an exit drafts tokens and full depth confirms them. For each candidate the threshold of its gate
and the longest draft that are expected to be fastest with one stream: how many of the select split's tokens its gate
then lets it draft, how many of these are full depth's own top tokens, and the expected speed over that without
drafts, from the times of passes measured on the machine that calibrated. Below 1 drafts at that exit are not expected
to pay there; the server finds out by itself.</p>
<table><tr><th>exit</th><th>depth</th><th>threshold</th><th>longest draft</th><th>drafted</th><th>of them right</th>
<th>expected speed</th></tr>
{% for line in drafting %}<tr>{% for cell in line %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor %}</table>
{% endif %}

{% if choice %}
<h2>Linear block</h2>
<p>{% if choice.chosen %}Block {{ choice.chosen.block }} can be replaced by an affine map of rank
{{ choice.chosen.map.rank }}: {{ "{:,}".format(choice.chosen.map.parameters) }} parameters for
{{ "{:,}".format(replaced) }}.{% endif %} R² is that of the block's residual under the deployed upstream, on the
select split. Perplexities are over {{ "{:,}".format(choice.tokens) }} tokens of it.</p>
<table><tr><th>replaced</th><th>perplexity</th><th>change</th></tr>
{% for line in replacements %}<tr><td>{{ line.blocks | join(" and ") }}</td>
<td>{{ "{:.2f}".format(line.perplexity) }}</td><td>{{ "{:+.2f}".format(line.increase) }}</td></tr>{% endfor %}</table>
{{ plots.linearity }}
{% endif %}

{% if weight_errors %}
<h2>INT4 weights</h2>
<p>Groups of {{ manifest.int4_group_size }} inputs share a scale and an offset. Squared error over squared weight,
mean over blocks: {% for name, error in weight_errors %}{{ name }} {{ "{:.5f}".format(error) }} {% endfor %}</p>
{% endif %}
<p class="soft">Made by Exeunt {{ manifest.exeunt_version }} with
{% for name, version in manifest.versions.items() %}{{ name }} {{ version }}{{ ", " if not loop.last }}{% endfor %}.</p>
</body>
</html>
"""


def report_html(content: ReportContent) -> str:
    """The text of `report.html`."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    template = environment.from_string(_PAGE)
    plots = {"trade": trade_plot(content)}
    if content.exits:
        plots |= {
            "agreement": agreement_plot(content),
            "reliability": reliability_plot(content),
            "risk": risk_plot(content),
        }
    if content.choice is not None:
        plots["linearity"] = linearity_plot(content.choice)
    return template.render(_values(content), plots={name: Markup(svg) for name, svg in plots.items()}) + "\n"


def _values(content: ReportContent) -> dict[str, Any]:
    choice, manifest = content.choice, content.manifest
    record = manifest.linear_block
    entries = manifest.risk_table
    return {
        "manifest": manifest,
        "data": manifest.calibration,
        "table": content.table,
        "confidence": entries[0].confidence if entries else 0.0,
        "tested": len(content.selection.plan.thresholds),
        "certificates": _certificates(content.certified),
        "exits": _exit_rows(content),
        "drafting": _draft_rows(content),
        "choice": choice,
        "replaced": record.replaced_parameters if record is not None else 0,
        "replacements": _replacements(content),
        "weight_errors": _weight_errors(content),
    }


def _certificates(certified: Sequence[CertifiedVariant]) -> list[tuple[str, list[dict[str, object]]]]:
    """Every combination's name and lines; both ways of skipped KV under the variant's name where they say the same."""
    by_variant: dict[Variant, list[CertifiedVariant]] = {}
    for each in certified:
        by_variant.setdefault(each.variant, []).append(each)
    shown = []
    for variant, several in by_variant.items():
        if len(several) > 1 and len({each.certification.certificates for each in several}) == 1:
            shown.append(
                (
                    f"{variant} skipped_kv={' or '.join(each.skipped_kv for each in several)}",
                    _lines(several[0]),
                )
            )
        else:
            shown += [(f"{variant} skipped_kv={each.skipped_kv}", _lines(each)) for each in several]
    return shown


def _lines(each: CertifiedVariant) -> list[dict[str, object]]:
    return [_line(certificate) for certificate in each.certification.certificates]


def _line(certificate: Certificate) -> dict[str, object]:
    def percent(value: float | None) -> str:
        return "" if value is None else f"{value:.2%}"

    rate = certificate.exits / certificate.tokens if certificate.tokens else None
    return {
        "target": f"{certificate.target}",
        "threshold": "" if certificate.threshold is None else f"{certificate.threshold:.4f}",
        "rate": percent(rate),
        "risk": percent(certificate.disagreement),
        "bound": percent(certificate.upper_bound),
        "certified": certificate.certified,
        "reason": certificate.reason or "",
    }


def _exit_rows(content: ReportContent) -> list[tuple[str, ...]]:
    return [
        (
            each.head.name,
            content.use(each),
            f"{each.training.untrained_agreement:.1%}",
            f"{each.training.ridge_agreement:.1%}",
            f"{each.training.agreement:.1%}",
            f"{each.gate.auc:.3f}",
            f"{each.gate.auc_probe:.3f}",
            f"{each.gate.auc_top:.3f}",
            f"{each.gate.calibration_error:.3f}",
        )
        for each in content.exits
    ]


def _draft_rows(content: ReportContent) -> list[tuple[str, ...]]:
    drafting = content.selection.drafting
    if drafting is None:
        return []
    return [
        (
            f"{each.head.name}{' (chosen)' if each is drafting.exit else ''}",
            f"{each.head.depth} of {content.manifest.base_model.blocks}",
            f"{plan.rates.threshold:.4f}",
            f"{plan.length}",
            f"{plan.rates.drafted:.1%}",
            f"{plan.rates.acceptance:.1%}",
            f"{plan.speed:.2f}×",
        )
        for each, plan in zip(drafting.candidates, drafting.choice.plans, strict=True)
    ]


def _replacements(content: ReportContent) -> list[object]:
    if content.choice is None:
        return []
    together = content.choice.together
    return [*content.choice.candidates, *([together] if together is not None else [])]


def _weight_errors(content: ReportContent) -> list[tuple[str, float]]:
    if content.int4 is None:
        return []
    errors: dict[str, list[float]] = {}
    for (_, name), error in content.int4.relative_error.items():
        errors.setdefault(name, []).append(error)
    return [(name, sum(values) / len(values)) for name, values in errors.items()]
