"""Which scenarios are simulated, and what came of each as one flat line."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

from scripts.simulate_stages.cost import BF16, H200, INT4, MISTRAL_7B, StageCosts
from scripts.simulate_stages.simulation import MAX_OWED, POLICIES, Mode, Policy, Scenario, simulate

FORMATS: Final = {formats.name: formats for formats in (BF16, INT4)}
SEQUENCES: Final = (1, 4, 16, 64, 256, 1000, 10_000)
CELLS: Final = (  # formats, context, sequences at once
    *(("bf16", context, n) for context in (1024, 4096) for n in SEQUENCES),
    *(("int4", context, n) for context in (1024, 4096) for n in SEQUENCES),
    ("int4", 256, 10_000),
)
DEPTHS: Final = (0.25, 0.5, 0.75)
EXIT_RATES: Final = (0.0, 0.2, 0.4, 0.6, 0.8)
ACCEPTANCES: Final = (0.3, 0.5, 0.7, 0.9)
DRAFTS: Final = (1, 2, 4)
GATED: Final = 0.8  # share of the asked tokens that a drafting gate lets be drafts
HOST_US: Final = (0, 20, 50, 100)
MAX_WAITS: Final = (1.0, 1.5, 2.0, 4.0)
SMALLEST_LOAD: Final = 4  # from here on policies differ: below, every batch is one row


@dataclass(frozen=True, slots=True)
class Point:
    """One scenario and its outcome. Times in milliseconds, depth as a share of the blocks."""

    formats: str
    context: int
    sequences: int  # at once; those beyond `resident` wait for memory
    resident: int
    depth: float
    mode: Mode
    policy: Policy
    exit_rate: float
    acceptance: float
    max_owed: int
    host_us: int = 0
    max_wait: float = 2.0
    tokens_per_s: float = 0.0
    ratio: float = 0.0
    gap_p50_ms: float = 0.0
    gap_p99_ms: float = 0.0
    off_gap_ms: float = 0.0
    deep_rows: float = 0.0
    longest_wait_ms: float = 0.0


def costs_of(formats: str, context: int, depth: float = 0.5, host_us: float = 0.0) -> StageCosts:
    """The costs of a cell, with an exit after this share of the blocks."""
    blocks = round(depth * MISTRAL_7B.blocks)
    return StageCosts(H200, MISTRAL_7B, FORMATS[formats], context, blocks, host_us * 1e-6)


def measured(point: Point) -> Point:
    """The point with its outcome, numbers rounded to three digits."""
    costs = costs_of(point.formats, point.context, point.depth, point.host_us)
    outcome = simulate(
        Scenario(
            costs,
            point.resident,
            point.mode,
            point.policy,
            point.exit_rate,
            point.acceptance,
            point.max_owed,
            point.max_wait,
        )
    )
    return replace(
        point,
        tokens_per_s=_rounded(outcome.tokens_per_s),
        ratio=_rounded(outcome.ratio),
        gap_p50_ms=_rounded(1e3 * outcome.gap_p50_s),
        gap_p99_ms=_rounded(1e3 * outcome.gap_p99_s),
        off_gap_ms=_rounded(1e3 * outcome.off_gap_s),
        deep_rows=_rounded(outcome.deep_rows),
        longest_wait_ms=_rounded(1e3 * outcome.longest_wait_s),
    )


def sweeps() -> dict[str, list[Point]]:
    """All points to measure, by part of the study."""
    return {
        "approximate": list(_approximate()),
        "verified": list(_verified()),
        "gated drafts": list(_gated()),
        "host time": list(_host()),
        "longest wait": list(_max_wait()),
    }


def _cells() -> Iterator[Point]:
    """One point for each load that differs: once memory is full, more sequences only wait."""
    seen = set()
    for formats, context, sequences in CELLS:
        resident = min(sequences, costs_of(formats, context).most_sequences)
        if (formats, context, resident) in seen:
            continue
        seen.add((formats, context, resident))
        for policy in POLICIES if resident >= SMALLEST_LOAD else POLICIES[1:2]:
            yield Point(formats, context, sequences, resident, 0.5, "propagate", policy, 0.0, 1.0, MAX_OWED)


def _approximate() -> Iterator[Point]:
    modes: tuple[Mode, ...] = ("propagate", "backfill")
    for cell in _cells():
        for depth in DEPTHS:
            for mode in modes:
                for rate in EXIT_RATES:
                    yield replace(cell, depth=depth, mode=mode, exit_rate=rate)


def _verified() -> Iterator[Point]:
    for cell in _cells():
        drafting = replace(cell, mode="verified", exit_rate=1.0)
        for depth in DEPTHS:
            for acceptance in ACCEPTANCES:
                for drafts in DRAFTS:
                    yield replace(drafting, depth=depth, acceptance=acceptance, max_owed=drafts)


def _gated() -> Iterator[Point]:
    """Drafts that a gate ends: sequences fall out of step."""
    for cell in _cells():
        yield replace(cell, mode="verified", depth=0.25, exit_rate=GATED, acceptance=0.8, max_owed=4)


def _host() -> Iterator[Point]:
    for cell in _cells():
        if (cell.formats, cell.context) == ("int4", 1024) and cell.policy in ("run through", "least waste"):
            for host_us in HOST_US:
                exits = replace(cell, host_us=host_us, depth=0.5, exit_rate=0.6)
                yield exits
                yield replace(exits, mode="verified", depth=0.25, exit_rate=1.0, acceptance=0.7, max_owed=2)


def _max_wait() -> Iterator[Point]:
    for cell in _cells():
        if cell.formats == "int4" and cell.context == 1024 and cell.policy in ("fullest", "least waste"):
            for max_wait in MAX_WAITS:
                yield replace(cell, max_wait=max_wait, depth=0.25, exit_rate=0.8)


def as_columns(points: list[Point]) -> dict[str, Any]:
    """Points as JSON: what all have in common, the names of the rest once, then one list of values for each."""
    flat = [asdict(point) for point in points]
    common = {name: value for name, value in flat[0].items() if all(point[name] == value for point in flat)}
    columns = [name for name in flat[0] if name not in common]
    return {
        "common": common,
        "columns": columns,
        "rows": [[_short(p[name]) for name in columns] for p in flat],
    }


def from_columns(table: dict[str, Any]) -> list[Point]:
    """What `as_columns` wrote."""
    return [
        Point(**table["common"], **dict(zip(table["columns"], row, strict=True))) for row in table["rows"]
    ]


def _short(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")
