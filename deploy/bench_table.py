"""Runs a benchmark with a progress bar and shows it as a table."""

from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from exeunt.calibration.progress import TerminalProgress
from exeunt.deploy.bench import BenchMode, Driver, Load, ModeSpeed, bench


def measure(driver: Driver, modes: Sequence[BenchMode], load: Load) -> list[ModeSpeed]:
    """The speed of every mode, with a bar on standard error. Raises BenchError."""
    progress = TerminalProgress(Console(stderr=True))
    speeds = []
    with progress.phase("Measuring every mode", len(modes)) as advance:
        for speed in bench(driver, modes, load):
            speeds.append(speed)
            advance(1)
    return speeds


def speed_table(speeds: Sequence[ModeSpeed]) -> Table:
    """One line a mode."""
    blocks = max((speed.blocks for speed in speeds), default=0)
    caption = (
        f"against: the same variant with exits off, in this run; time to the first token and between tokens: "
        f"median/p99; depth in blocks, of {blocks}; saved: passes that no block had to make"
    )
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption=caption, caption_justify="left")
    table.add_column("mode", no_wrap=True)
    for name in ("tok/s", "against", "first ms", "next ms", "exits", "depth", "drafts right", "saved"):
        table.add_column(name, justify="right", no_wrap=True)
    for speed in speeds:
        table.add_row(
            speed.name,
            f"{speed.tokens_per_second:.0f}",
            _ratio(speed),
            _milliseconds(speed.time_to_first_token_s),
            _milliseconds(speed.inter_token_latency_s),
            f"{speed.exit_rate:.1%}",
            f"{speed.mean_depth:.2f}",
            f"{speed.drafts_accepted}/{speed.drafts}" if speed.drafts else "",
            f"{speed.passes_saved:.1%}",
        )
    return table


def _ratio(speed: ModeSpeed) -> str:
    if speed.ratio is None:
        return ""
    return speed.ratio if isinstance(speed.ratio, str) else f"{speed.ratio:.2f}×"


def _milliseconds(quantiles: Mapping[str, float]) -> str:
    return "/".join(f"{quantiles[name] * 1000:.1f}" for name in ("p50", "p99") if name in quantiles)
