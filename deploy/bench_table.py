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
    """One line a mode; latencies are p50 / p90 / p99 in milliseconds."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("mode", no_wrap=True)
    for name in ("tokens/s", "first token ms", "between tokens ms", "exit rate", "mean depth"):
        table.add_column(name, justify="right")
    for speed in speeds:
        table.add_row(
            speed.name,
            f"{speed.tokens_per_second:.0f}",
            _milliseconds(speed.time_to_first_token_s),
            _milliseconds(speed.inter_token_latency_s),
            f"{speed.exit_rate:.1%}",
            f"{speed.mean_depth:.2f} of {speed.blocks}",
        )
    return table


def _milliseconds(quantiles: Mapping[str, float]) -> str:
    return " / ".join(f"{seconds * 1000:.1f}" for seconds in quantiles.values())
