"""INT4 weights: how they are rounded, at equal bits, and how far each layer lies from full precision."""

from collections.abc import Mapping

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from exeunt.calibration.report.charts import Line, forest, forest_height
from exeunt.calibration.report.content import ReportContent
from exeunt.calibration.report.drawing import INK, draw, label_ends, series
from exeunt.calibration.report.parts import Cell, Details, Figure, Section, Table, Text
from exeunt.calibration.report.verdict import relative_to
from exeunt.calibration.report.words import NOTHING, count, measured
from exeunt.calibration.weight_study import FormName, WeightForm, WeightStudy
from exeunt.calibration.weights_int4 import Int4Weights

_FORMS: Mapping[FormName, str] = {"nearest": "round to nearest", "gptq": "GPTQ", "nf4": "NF4 levels"}


def weights_section(content: ReportContent) -> Section | None:
    """The section; None for a bundle without INT4 weights."""
    int4, study = content.int4, content.weight_study
    if int4 is None:
        return None
    figures: list[Figure] = []
    parts: list[Figure | Table | Text | Details] = []
    compared = ""
    if study is not None and study.forms:
        figures += [_forms(study, int4), _layers(study)]
        parts.append(_forms_table(study, int4))
        compared = (
            f" Three ways of rounding are compared at about equal bits, on {count(study.tokens)} held-out tokens in "
            f"{study.text_blocks} blocks of text, with full keys and values: to nearest, each group's range searched "
            f"so that least is lost; GPTQ; and NF4's levels in groups of {study.group_size // 2}, which share their "
            "largest magnitude as scale and have no offset, so that the bits are equal. The literature that finds NF4 "
            "better than a uniform grid has groups of 64 and more, and no search for the grid."
        )
    figures.append(_by_block(int4))
    return Section(
        "weights",
        "INT4 weights",
        f"Weights are held in four bits; groups of {int4.group_size} inputs share a scale and an offset, rounded "
        f"{_how(int4)}.{compared} The error of a layer is |W − Ŵ|² over |W|², that of its outputs |X(W − Ŵ)ᵀ|² over "
        "|XWᵀ|² on the inputs X that it gets.",
        "GPTQ gives up weights that matter little for those that matter: its weights may lie farther from the "
        "full ones while its outputs lie closer. What counts is KL and perplexity; activations are not rounded in this "
        "comparison.",
        (*figures, *parts, Details("Every layer of the bundle", (_table(int4),))),
    )


def _how(int4: Int4Weights) -> str:
    return {"gptq": "by GPTQ, each input's error made good by those that follow", "nearest": "to nearest"}[
        int4.rounding
    ]


def _used(int4: Int4Weights, form: WeightForm) -> bool:
    return form.name == int4.rounding


def _forms(study: WeightStudy, int4: Int4Weights) -> Figure:
    base = study.perplexity.value

    def paint(axes: Axes) -> None:
        lines = [
            Line(
                f"{_FORMS[form.name]}, {form.bits:g} bits{', in the bundle' if _used(int4, form) else ''}",
                relative_to(form.increase, base / 100),
                number,
            )
            for number, form in enumerate(study.forms)
        ]
        forest(axes, lines, form="{:+.2f} %")
        axes.set_xlabel("change of perplexity, %")

    return draw(
        "weight-forms",
        "Increase of perplexity of each way of rounding weights to four bits",
        f"Change of perplexity over full weights ({base:.2f}) with 95 % intervals, by how weights are rounded.",
        paint,
        height=forest_height(len(study.forms)),
    )


def _layers(study: WeightStudy) -> Figure:
    kinds = list(study.forms[0].output_error)

    def paint(axes: Axes) -> None:
        for number, form in enumerate(study.forms):
            look = series(number)
            axes.plot(
                [100 * form.output_error[kind] for kind in kinds],
                range(len(kinds)),
                look.marker,
                color=look.colour,
                label=_FORMS[form.name],
            )
        axes.set_yticks(range(len(kinds)), [_short(kind) for kind in kinds])
        axes.set_ylim(len(kinds) - 0.5, -0.5)
        axes.set_xlim(left=0)
        axes.set_xlabel("squared error of outputs, %")
        axes.legend(
            loc="lower center", bbox_to_anchor=(0.45, 1.0), ncols=3, columnspacing=1.0, handletextpad=0.2
        )

    return draw(
        "weight-layers",
        "Relative squared error of each kind of layer's outputs, by how weights are rounded",
        "Squared error of the outputs over their squared size, mean over the blocks, by kind of layer; held-out text.",
        paint,
        height=1.3 + 0.34 * len(kinds),
    )


def _short(name: str) -> str:
    return name.rpartition(".")[2]


def _by_name(errors: Mapping[tuple[int, str], float]) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {}
    for (block, name), error in errors.items():
        if block >= 0:
            found.setdefault(name, []).append((block, error))
    return found


def _by_block(int4: Int4Weights) -> Figure:
    of_outputs = bool(int4.output_error)
    what = "the outputs, on the text that GPTQ saw" if of_outputs else "the weights"

    def paint(axes: Axes) -> None:
        ends = []
        for number, (name, points) in enumerate(_by_name(int4.output_error or int4.relative_error).items()):
            look = series(number)
            blocks, errors = zip(*sorted(points), strict=True)
            axes.plot(blocks, [100 * error for error in errors], **look.look)
            ends.append((100 * errors[-1], _short(name), look.colour))
        axes.axhline(0.0, color=INK, linewidth=1)
        axes.set(xlabel="block", ylabel=f"squared error of {'outputs' if of_outputs else 'weights'}, %")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        label_ends(axes, ends)

    return draw(
        "weight-errors",
        "Relative squared error of INT4 weights by block and layer",
        f"Relative squared error of {what}, for each linear layer of the bundle.",
        paint,
    )


def _forms_table(study: WeightStudy, int4: Int4Weights) -> Table:
    kinds = list(study.forms[0].output_error)
    headers = (
        "rounding",
        "bits",
        "perplexity",
        "change",
        "KL",
        *(f"{_short(kind)}, outputs" for kind in kinds),
    )
    full = [Cell("full weights"), Cell(NOTHING), measured(study.perplexity), Cell(NOTHING), Cell(NOTHING)]
    rows = [[*full, *(Cell(NOTHING) for _ in kinds)]]
    for form in study.forms:
        used = _used(int4, form)
        rows.append(
            [
                Cell(_FORMS[form.name], "in the bundle" if used else "", strong=used),
                Cell(f"{form.bits:g}"),
                measured(form.perplexity),
                measured(form.increase, "{:+.3f}"),
                measured(form.kl, "{:.4f}"),
                *(
                    Cell(
                        f"{100 * form.output_error[kind]:.3f} %",
                        f"weights {100 * form.weight_error[kind]:.3f} %",
                    )
                    for kind in kinds
                ),
            ]
        )
    return Table(headers, rows, caption="Ways of rounding; errors are means over the blocks")


def _table(int4: Int4Weights) -> Table:
    names = list(_by_name(int4.relative_error))
    blocks = sorted({block for block, _ in int4.relative_error if block >= 0})
    rows = [[Cell(f"block {block}"), *(_errors(int4, (block, name)) for name in names)] for block in blocks]
    return Table(
        ("", *(_short(name) for name in names)),
        rows,
        caption="Error of the weights; small, that of the outputs",
    )


def _errors(int4: Int4Weights, key: tuple[int, str]) -> Cell:
    outputs = int4.output_error.get(key)
    return Cell(
        f"{100 * int4.relative_error[key]:.3f} %", "" if outputs is None else f"outputs {100 * outputs:.3f} %"
    )
