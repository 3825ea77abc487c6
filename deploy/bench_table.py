"""Runs a benchmark with a progress bar and shows it as a table."""

from collections.abc import Mapping, Sequence

from exeunt.calibration.progress import watched_progress
from exeunt.deploy.bench import (
    BenchMode,
    Driver,
    ModeSpeed,
    bench,
)
from exeunt.deploy.bench_load import Load
from exeunt.deploy.figure_table import FigureColumn, FigureTable


def measure(driver: Driver, modes: Sequence[BenchMode], load: Load) -> list[ModeSpeed]:
    """The speed of every mode, with its progress on standard error. Raises BenchError."""
    progress = watched_progress()
    speeds = []
    with progress.phase("Measuring every mode", len(modes)) as advance:
        for speed in bench(driver, modes, load):
            speeds.append(speed)
            advance(1)
    return speeds


def speed_table(speeds: Sequence[ModeSpeed]) -> FigureTable:
    """One line a mode."""
    blocks = max((speed.blocks for speed in speeds), default=0)
    caption = (
        f"against: the same variant with exits off, in this run; first, next ms: to the first token and between "
        f"tokens, median/p99; depth in blocks, of {blocks}; saved: passes that no block had to make"
    )
    first, following = (
        [speed.time_to_first_token_s for speed in speeds],
        [speed.inter_token_latency_s for speed in speeds],
    )
    columns = (
        FigureColumn("tok/s", tuple(f"{speed.tokens_per_second:.0f}" for speed in speeds), 8),
        FigureColumn("against", tuple(map(_ratio, speeds)), 7),
        FigureColumn("first ms", *_milliseconds(first, 4)),
        FigureColumn("next ms", *_milliseconds(following, 6)),
        FigureColumn("exits", tuple(f"{speed.exit_rate:.1%}" for speed in speeds), 5),
        FigureColumn("depth", tuple(f"{speed.mean_depth:.2f}" for speed in speeds), 3),
        FigureColumn("drafts right", tuple(map(_drafts, speeds)), 1),
        FigureColumn("saved", tuple(f"{speed.passes_saved:.1%}" for speed in speeds), 2),
    )
    return FigureTable(tuple(speed.name for speed in speeds), columns, caption=caption)


def _ratio(speed: ModeSpeed) -> str:
    if speed.ratio is None:
        return ""
    return speed.ratio if isinstance(speed.ratio, str) else f"{speed.ratio:.2f}×"


def _drafts(speed: ModeSpeed) -> str:
    return f"{speed.drafts_accepted}/{speed.drafts}" if speed.drafts else ""


def _milliseconds(
    quantiles: Sequence[Mapping[str, float]], worth: int
) -> tuple[tuple[str, ...], int, tuple[str, ...], str]:
    """Medians with the 99th percentile, their worth, the medians alone, and what those leave out."""

    def cells(*names: str) -> tuple[str, ...]:
        return tuple(
            "/".join(f"{each[name] * 1000:.1f}" for name in names if name in each) for each in quantiles
        )

    return cells("p50", "p99"), worth, cells("p50"), "p99"
