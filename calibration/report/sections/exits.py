"""Exits: the search over all blocks, agreement before and after training, what training did, and which were kept."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import MaxNLocator

from exeunt.calibration.exit_records import FittedExit
from exeunt.calibration.exit_screen import ExitScreen, ScreenedExit
from exeunt.calibration.exit_training import TrainedHead
from exeunt.calibration.loss_comparison import LossComparison, LossOutcome
from exeunt.calibration.report.content import ReportContent
from exeunt.calibration.report.drawing import INK, draw, draw_panels, label_ends, series
from exeunt.calibration.report.parts import Cell, Details, Figure, Section, Table, Text
from exeunt.calibration.report.words import count, share
from exeunt.calibration.risk import percent


def exits_section(content: ReportContent) -> Section | None:
    """The section; None where no exit was fitted."""
    if not content.candidates:
        return None
    screen = content.exit_screen
    losses = [each.losses for each in content.candidates if each.losses is not None]
    figures = [_search(screen)] if screen is not None and screen.exits else []
    figures.append(_agreement(content))
    if any(len(each.training.curve) > 1 for each in content.candidates):
        figures.append(_training(content.candidates))
    if losses:
        figures.append(_losses(losses))
    parts: list[Figure | Table | Text | Details] = [*figures, _table(content)]
    if screen is not None and screen.exits:
        summary = f"Every block that was looked at ({count(screen.tokens)} tokens)"
        parts.append(Details(summary, (_screen_table(screen),)))
    if losses:
        parts.append(
            Details("Cross-entropy against matching distributions", tuple(map(_losses_table, losses)))
        )
    tokens = max(each.training.tokens for each in content.candidates)
    return Section(
        "exits",
        "Exits",
        f"An exit is looked at behind every block, the best few are trained, and those are kept that save most. "
        f"Agreement is with full depth, on {count(tokens)} tokens of the select split: the share of tokens on "
        "which the exit's top token is the deployed full-depth model's own; selective agreement is its mean "
        "over the surest shares of the tokens, and what training is stopped by. Tokens of the approximate mode "
        "may leave at the certified exits; in the verified mode one exit drafts.",
        "Agreement is not safety: an exit that agrees on half the tokens may let only a few leave, which is "
        "what gates and certificates decide.",
        tuple(parts),
    )


def _search(screen: ExitScreen) -> Figure:
    exits = screen.exits
    blocks = [each.block for each in exits]
    trained = [each for each in exits if each.trained]

    def paint(canvas: Canvas) -> None:
        upper, lower = canvas.subplots(2, 1, sharex=True)
        lines = (
            ("may be told apart (AUC)", [100 * each.separability for each in exits]),
            ("agree, surest first", [100 * each.selective for each in exits]),
            ("agree", [100 * max(each.agreement, each.ridge_agreement) for each in exits]),
        )
        for number, (_, values) in enumerate(lines):
            upper.plot(blocks, values, **series(number).look)
        upper.set(ylabel="%", ylim=(0, 100))
        label_ends(upper, [(v[-1], name, series(n).colour) for n, (name, v) in enumerate(lines)], least=0.11)
        saving, speed = series(3), series(4)
        lower.axhline(0.0, color=INK, linewidth=1)
        lower.plot(blocks, [100 * each.saving for each in exits], **saving.look)
        ends = [(100 * exits[-1].saving, "blocks saved, net", saving.colour)]
        if any(each.draft_speed > 0 for each in exits):
            lower.plot(blocks, [100 * (each.draft_speed - 1) for each in exits], **speed.look)
            ends.append((100 * (exits[-1].draft_speed - 1), "speed-up of drafts", speed.colour))
        for each in trained:
            lower.plot([each.block], [_what_for(each)], "o", ms=10, mfc="none", mew=1.4, color=INK)
        lower.set(xlabel="exit after block", ylabel="%")
        lower.xaxis.set_major_locator(MaxNLocator(integer=True))
        label_ends(lower, ends, least=0.11)

    return draw_panels(
        "exit-search",
        "Agreement, separability, saving and speed of drafts of an untrained exit behind every block",
        "Untrained exits behind every block: agreement and how well they tell it; what leaving there is expected to "
        "save at the risk targets, and drafts from there to gain, at measured costs. Rings mark the "
        f"{len(trained)} that were trained.",
        paint,
        height=4.6,
    )


def _what_for(each: ScreenedExit) -> float:
    """Where the ring of a trained exit stands: on what it was trained for."""
    return 100 * (each.draft_speed - 1) if each.reason.startswith("draft") else 100 * each.saving


def _agreement(content: ReportContent) -> Figure:
    exits = content.candidates

    def paint(axes: Axes) -> None:
        blocks = [each.head.block for each in exits]
        lines = (
            ("trained head", [each.training.agreement for each in exits]),
            ("ridge adapter", [each.training.ridge_agreement for each in exits]),
            ("own head", [each.training.untrained_agreement for each in exits]),
        )
        for number, (_, values) in enumerate(lines):
            axes.plot(blocks, [100 * value for value in values], **series(number).look)
        kept = [each for each in exits if content.keeps(each)]
        axes.plot(
            [each.head.block for each in kept],
            [100 * each.training.agreement for each in kept],
            "o",
            ms=11,
            mfc="none",
            mew=1.6,
            color=INK,
        )
        axes.set(xlabel="exit after block", ylabel="agreement, %", ylim=(0, 100), xticks=blocks)
        ends = [
            (100 * values[-1], name, series(number).colour) for number, (name, values) in enumerate(lines)
        ]
        label_ends(axes, ends)

    return draw(
        "agreement",
        "Agreement with full depth at each exit, before and after training",
        "Top-1 agreement with full depth, before and after training, by depth of the exit. Rings mark the "
        "exits that were kept.",
        paint,
    )


def _training(exits: Sequence[FittedExit]) -> Figure:
    shown = [each for each in exits if len(each.training.curve) > 1]

    def paint(axes: Axes) -> None:
        ends = []
        for number, each in enumerate(shown):
            look, curve = series(number), each.training.curve
            values = [100 * point.selective for point in curve]
            axes.plot([point.visits / 1000 for point in curve], values, **look.look)
            ends.append((values[-1], each.head.name, look.colour))
        axes.set(xlabel="tokens seen in training, thousands", ylabel="selective agreement, %")
        label_ends(axes, ends)

    return draw(
        "training",
        "Selective agreement of exit heads while they were trained",
        "Selective agreement on the select split while heads were trained; the best point is kept. "
        + _ends_of_training(shown),
        paint,
    )


def _ends_of_training(exits: Sequence[FittedExit]) -> str:
    """Which heads stopped because agreement rose no more, and which because the visits were used up."""
    early = [each.head.name for each in exits if each.training.stopped_early]
    cut = [each.head.name for each in exits if each.training.still_rising]
    stopped = f"Stopped early: {', '.join(early)}." if early else "None was stopped early."
    if not cut:
        return stopped
    return (
        f"{stopped} Cut off by the preset's limit of visits while still rising: {', '.join(cut)}; --preset thorough "
        "trains on, for as long as it helps."
    )


def _outcomes(each: LossComparison) -> tuple[tuple[str, LossOutcome, bool], ...]:
    """Each head with its name and whether it serves."""
    return (
        ("before training", each.start, False),
        ("top token (cross-entropy)", each.top_token, each.served == "top token"),
        ("distribution (KL)", each.distribution, each.served == "distribution"),
        *(() if each.both is None else (("half of both", each.both, each.served == "both"),)),
    )


def _losses(comparisons: Sequence[LossComparison]) -> Figure:
    def paint(axes: Axes) -> None:
        for number in range(len(_outcomes(comparisons[0]))):
            look = series((5, 0, 1, 2)[number])
            outcomes = [_outcomes(each)[number] for each in comparisons]
            axes.plot(
                [100 * outcome.selective for _, outcome, _ in outcomes],
                range(len(outcomes)),
                look.marker,
                color=look.colour,
                label=outcomes[0][0],
            )
        served = [
            (place, outcome)
            for place, each in enumerate(comparisons)
            for _, outcome, serves in _outcomes(each)
            if serves
        ]
        axes.plot(
            [100 * outcome.selective for _, outcome in served],
            [place for place, _ in served],
            "o",
            ms=12,
            mfc="none",
            mew=1.4,
            color=INK,
        )
        axes.set_yticks(range(len(comparisons)), [f"block_{each.block}" for each in comparisons])
        axes.set_ylim(len(comparisons) - 0.5, -0.5 - 0.3 * 4)
        axes.set(xlabel="selective agreement, %")
        axes.margins(x=0.12)
        axes.legend(loc="upper center", ncols=1)

    return draw(
        "losses",
        "Selective agreement of heads trained by cross-entropy and by matching distributions",
        "Heads trained by cross-entropy to full depth's top token against heads trained to match its "
        "distribution, and by half of both: same tokens in the same order. Rings mark the heads that serve.",
        paint,
        height=1.9 + 0.4 * len(comparisons),
    )


def _table(content: ReportContent) -> Table:
    headers = ("exit", "kept for", "own head", "ridge", "trained", "selective", "tokens seen", "gate's AUC")
    exits = sorted(content.candidates, key=lambda each: each.head.block)
    return Table(headers, [_row(content, each) for each in exits], words=2, caption="Exits that were trained")


def _row(content: ReportContent, each: FittedExit) -> list[Cell]:
    kept, training = content.keeps(each), each.training
    return [
        Cell(each.head.name, strong=kept),
        Cell(content.use(each) if kept else "left out", tone="" if kept else "soft"),
        Cell(share(training.untrained_agreement)),
        Cell(share(training.ridge_agreement)),
        Cell(share(training.agreement), strong=kept),
        Cell(share(training.selective)),
        Cell(count(training.visits), _how_it_ended(training)),
        Cell(f"{each.gate.auc:.3f}"),
    ]


def _how_it_ended(training: TrainedHead) -> str:
    if training.stopped_early:
        return "stopped early"
    return "cut off, still rising" if training.still_rising else ""


def _screen_table(screen: ExitScreen) -> Table:
    headers = ("block", "trained for", "own head", "ridge", "selective", "AUC")
    leaving = tuple(f"leave at {percent(risk)}" for risk in screen.risks)
    rows = [
        [
            Cell(f"{each.block}", strong=each.trained),
            Cell(each.reason or "–"),
            Cell(share(each.agreement)),
            Cell(share(each.ridge_agreement)),
            Cell(share(each.selective)),
            Cell(f"{each.separability:.3f}"),
            *(Cell(share(leaves)) for leaves in each.leaving),
            Cell(f"{100 * each.saving:+.1f} %"),
            Cell(f"{each.draft_speed:.2f}×" if each.draft_speed > 0 else "–"),
        ]
        for each in screen.exits
    ]
    return Table((*headers, *leaving, "saving", "drafts' speed"), rows, words=2)


def _losses_table(each: LossComparison) -> Table:
    headers = ("loss", "agreement", "selective", *(f"leave at {percent(risk)}" for risk in each.risks))
    rows = [
        [
            Cell(name, "serves" if serves else "", strong=serves),
            Cell(share(outcome.agreement)),
            Cell(share(outcome.selective)),
            *(Cell(share(leaves)) for leaves in outcome.leaving),
        ]
        for name, outcome, serves in _outcomes(each)
    ]
    return Table(headers, rows, caption=f"Behind block {each.block}, on {count(each.tokens)} tokens")
