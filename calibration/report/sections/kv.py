"""INT4 keys and values: what each form of them costs, keys and values apart and together, and by length of context."""

from matplotlib.axes import Axes

from exeunt.calibration.bootstrap import Measure
from exeunt.calibration.kv_forms import PER_CHANNEL
from exeunt.calibration.kv_study import KVCost, KVDifference, KVStudy, KVWeightsCosts
from exeunt.calibration.papers import KV_JOINT
from exeunt.calibration.report.charts import Line, forest, forest_height
from exeunt.calibration.report.content import ReportContent
from exeunt.calibration.report.drawing import INK, draw, series, whiskers
from exeunt.calibration.report.parts import Cell, Details, Figure, Section, Table, Text
from exeunt.calibration.report.verdict import relative_to
from exeunt.calibration.report.words import count, measured, share, signed_share


def kv_section(content: ReportContent) -> Section | None:
    """The section; None where the forms were not compared."""
    study = content.kv_study
    if study is None or not study.subjects:
        return None
    subject = study.subjects[-1]
    parts: list[Figure | Table | Text | Details] = [_forms(subject)]
    if any(each.by_context for each in _joint(subject)):
        parts.append(_by_context(subject))
    parts.append(_table(subject))
    parts += _acceptance(subject)
    parts += [
        Details(f"Under {_weights_name(each)}", (_table(each), *_acceptance(each)))
        for each in study.subjects
        if each is not subject
    ]
    saved = 1 - _joint(subject)[0].bytes_per_token / subject.bytes_per_token if _joint(subject) else 0.0
    return Section(
        "kv",
        "INT4 keys and values",
        f"Teacher-forced on {_text(study)}, under {_weights_name(subject)}. Costs are over full keys and values under "
        "the same weights, so that they are the cache's alone; errors are |x − x̂|² over |x|². The server holds the "
        f"first form: per token and head, keys in a rotated basis, which saves {share(saved)} of the cache. The form "
        "with a scale per channel needs the whole sequence before it can quantise its first token: no server can hold "
        f"it. It is the paper's, which reports {signed_share(KV_JOINT[1] / KV_JOINT[0] - 1)} perplexity for it on "
        "Mistral 7B, keys and values together.",
        f"The longest context here is {count(study.row_tokens)} tokens: the longest rows of the text were taken, and "
        "rows end there. What a longer cache costs is not seen.",
        tuple(parts),
    )


def _text(study: KVStudy) -> str:
    return (
        f"{count(study.tokens)} tokens in {study.text_blocks} blocks of text, rows of at most "
        f"{count(study.row_tokens)} tokens"
    )


def _weights_name(subject: KVWeightsCosts) -> str:
    return {"int4": "INT4 weights", "full": "full weights"}[subject.weights]


def _joint(subject: KVWeightsCosts) -> list[KVCost]:
    """The costs of keys and values together."""
    return [each for each in subject.costs if each.part == "both"]


def _forms(subject: KVWeightsCosts) -> Figure:
    forms = list(dict.fromkeys(each.form for each in subject.costs))
    costs = sorted(
        subject.costs, key=lambda each: (each.part != "both", each.part != "keys", forms.index(each.form))
    )
    base = subject.perplexity.value

    def paint(axes: Axes) -> None:
        lines = [
            Line(_name(each), relative_to(each.increase, base / 100), forms.index(each.form))
            for each in costs
        ]
        forest(axes, lines, form="{:+.2f} %")
        axes.set_xlabel("change of perplexity, %")

    return draw(
        "kv-forms",
        "Increase of perplexity of each form of INT4 keys and values",
        f"Change of perplexity over full keys and values ({base:.2f}), with 95 % intervals, by form.",
        paint,
        height=forest_height(len(costs)),
    )


def _name(cost: KVCost) -> str:
    what = {"both": "keys and values", "keys": "keys alone", "values": "values alone"}[cost.part]
    return f"{cost.form}: {what}"


def _by_context(subject: KVWeightsCosts) -> Figure:
    joint = _joint(subject)

    def paint(axes: Axes) -> None:
        axes.axhline(0.0, color=INK, linewidth=1)
        for number, each in enumerate(joint):
            look = series(number)
            shift = 1.0 + 0.06 * (number - (len(joint) - 1) / 2)
            axes.errorbar(
                [cost.last * shift for cost in each.by_context],
                [1000 * cost.increase.value for cost in each.by_context],
                yerr=[
                    [1000 * end for end in ends] for ends in whiskers([c.increase for c in each.by_context])
                ],
                **look.look,
                capsize=2.5,
                elinewidth=1.0,
                label=each.form,
            )
        lasts = [cost.last for cost in joint[0].by_context]
        axes.set_xscale("log", base=2)
        axes.set_xticks(lasts, [f"{last}" for last in lasts])
        axes.minorticks_off()
        axes.set(xlabel="tokens attended to, up to", ylabel="change, thousandths of a nat per token")
        axes.legend(loc="upper left")
        low, high = axes.get_ylim()
        axes.set_ylim(low, high + 0.35 * (high - low))

    return draw(
        "kv-context",
        "Cost of INT4 keys and values by length of context",
        "Change of −log probability by how many tokens are attended to, keys and values together, with 95 % intervals.",
        paint,
        height=3.3,
    )


def _table(subject: KVWeightsCosts) -> Table:
    headers = (
        "form",
        "part",
        "perplexity",
        "change",
        "KL",
        "error of keys",
        "error of values",
        "bytes a token",
    )
    full = [
        Cell("full"),
        Cell("–"),
        measured(subject.perplexity),
        Cell("–"),
        Cell("–"),
        Cell("0"),
        Cell("0"),
        Cell(count(round(subject.bytes_per_token))),
    ]
    return Table(
        headers, [full, *(_row(each) for each in subject.costs)], words=2, caption=_weights_name(subject)
    )


def _acceptance(subject: KVWeightsCosts) -> tuple[Table | Text, ...]:
    """The deployed form against the others, and whether it costs no more than the paper's, in words."""
    if not subject.differences:
        return ()
    rows = [
        [Cell(each.other), measured(each.increase, "{:+.3f}"), measured(each.kl, "{:+.4f}")]
        for each in subject.differences
    ]
    table = Table(
        ("the served form over", "perplexity", "KL"),
        rows,
        caption=f"Keys and values together, on the same resamples; below zero the served form costs less "
        f"({_weights_name(subject)})",
    )
    paper = subject.over(PER_CHANNEL)
    if paper is None:
        return (table,)
    return (table, Text(_accepted(paper, subject)))


def _accepted(paper: KVDifference, subject: KVWeightsCosts) -> str:
    return (
        f"The served form should cost no more than the one with a scale per channel ({_weights_name(subject)}). By KL "
        f"{_holds(paper.kl)}; by perplexity {_holds(paper.increase)}. KL sees every token's whole distribution, "
        "perplexity only the token that followed, so where they differ KL has more to tell on so little text."
    )


def _holds(difference: Measure) -> str:
    """Whether a difference that should not be above zero is, as far as the text tells."""
    if not difference.bounded:
        told = "no more" if difference.value <= 0 else "more"
        return f"it costs {told} here, which one block of text does not show"
    if difference.high <= 0:
        return "that holds"
    if difference.low > 0:
        return "that does not hold: it costs more"
    told = "less" if difference.value <= 0 else "more"
    return f"this text does not decide it: it costs {told} here, and the interval holds zero"


def _row(cost: KVCost) -> list[Cell]:
    return [
        Cell(cost.form, "" if cost.streams else "cannot be served"),
        Cell(cost.part),
        measured(cost.perplexity),
        measured(cost.increase, "{:+.3f}"),
        measured(cost.kl, "{:.4f}"),
        Cell(f"{cost.key_error:.4f}"),
        Cell(f"{cost.value_error:.4f}"),
        Cell(count(round(cost.bytes_per_token))),
    ]
