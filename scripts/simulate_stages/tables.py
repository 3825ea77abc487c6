"""The study's tables, in Markdown: docs/simulation.md shows them as they are printed."""

from collections.abc import Iterable, Sequence
from typing import Any, Final

from scripts.simulate_stages.simulation import POLICIES, Policy
from scripts.simulate_stages.sweep import (
    ACCEPTANCES,
    DEPTHS,
    EXIT_RATES,
    HOST_US,
    MAX_WAITS,
    Point,
    costs_of,
)

Points = Sequence[Point]
NAMES: Final = {"bf16": "bf16", "int4": "INT4"}
_BATCHES: Final = (4, 16, 256, 3669)  # of the tables that show one format and context


def tables(parts: dict[str, list[Point]], decisions: dict[str, Any]) -> dict[str, str]:
    """Every table by its title."""
    approximate, verified = parts["approximate"], parts["verified"]
    return {
        "What fits": _fits(),
        "Policies": _policies(approximate),
        "Exit rate and depth": _rates(approximate),
        "Verified": _verified(verified),
        "Verified, policies": _verified_policies(verified, parts["gated drafts"]),
        "Latency": _latency(approximate),
        "Host time": _host(parts["host time"]),
        "Longest wait": _max_wait(parts["longest wait"]),
        "Decisions": _decisions(decisions),
    }


def only(points: Iterable[Point], **fields: Any) -> list[Point]:
    """The points with these values."""
    return [p for p in points if all(getattr(p, name) == value for name, value in fields.items())]


def best(points: Iterable[Point]) -> Point:
    """The point with the highest ratio."""
    return max(points, key=lambda point: point.ratio)


def gathers(point: Point) -> bool:
    """Whether the point is of the queues that waste least; a single stream has no queues."""
    return point.resident == 1 or point.policy == "least waste"


def _markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cells(points: Points) -> list[Points]:
    """The points by formats, context and residents, in the order in which they come."""
    cells: dict[tuple[str, int, int], list[Point]] = {}
    for point in points:
        cells.setdefault((point.formats, point.context, point.resident), []).append(point)
    return list(cells.values())


def _name(point: Point) -> list[str]:
    full = " (memory full)" if point.resident < point.sequences else ""
    return [NAMES[point.formats], f"{point.context}", f"{point.resident:,}{full}"]


def _ratio(points: Points, **fields: Any) -> str:
    (point,) = only(points, **fields)
    return f"{point.ratio:.2f}"


def _of_policy(points: Points, policy: Policy, **fields: Any) -> str:
    """A ratio; one row at a time has only one policy."""
    return _ratio(points, policy=policy if len({p.policy for p in points}) > 1 else "run through", **fields)


def _fits() -> str:
    rows = []
    for formats in ("bf16", "int4"):
        for context in (256, 1024, 4096):
            costs = costs_of(formats, context)
            most = costs.most_sequences
            weights = costs.model.parameters * costs.formats.weight_bytes / 1e9
            rows.append([
                NAMES[formats],
                f"{weights:.1f} GB",
                f"{context}",
                f"{most:,}",
                "all" if most >= 10_000 else f"{10_000 - most:,} wait",
                f"{1 / costs.full(1):,.0f}",
                f"{most / costs.full(most):,.0f}",
                f"{costs.full(most) * 1e3:.1f} ms",
            ])  # fmt: skip
    head = ["format", "weights", "context", "sequences that fit", "of 10,000", "tokens/s, one stream"]
    return _markdown([*head, "tokens/s, memory full", "a step, memory full"], rows)


def _policies(points: Points) -> str:
    chosen = only(points, depth=0.5, exit_rate=0.6)
    rows = [
        [
            *_name(cell[0]),
            *(_of_policy(cell, policy, mode="propagate") for policy in POLICIES),
            *(_of_policy(cell, policy, mode="backfill") for policy in POLICIES[1:]),
        ]
        for cell in _cells(chosen)
    ]
    head = ["format", "context", "sequences", *(f"{p}, propagate" for p in POLICIES)]
    return _markdown([*head, *(f"{p}, backfill" for p in POLICIES[1:])], rows)


def _rates(points: Points) -> str:
    chosen = only(points, formats="int4", context=1024)
    rows = []
    for depth in DEPTHS:
        for rate in EXIT_RATES:
            at = only(chosen, depth=depth, exit_rate=rate)
            row = [f"{depth:g}", f"{rate:.0%}", _ratio(only(at, resident=1), mode="propagate")]
            for resident in _BATCHES:
                batch = only(at, resident=resident, policy="least waste")
                row += [_ratio(batch, mode=mode) for mode in ("propagate", "backfill")]
            rows.append(row)
    head = ["exit after", "leave", "1 stream"]
    return _markdown(head + [f"{n:,}, {m}" for n in _BATCHES for m in ("propagate", "backfill")], rows)


def _verified(points: Points) -> str:
    """The best of the draft lengths and stage policies, for an exit after a quarter and after half."""
    rows = []
    for cell in _cells(points):
        row = _name(cell[0])
        for depth in DEPTHS[:2]:
            for acceptance in ACCEPTANCES:
                top = best(p for p in only(cell, depth=depth, acceptance=acceptance) if gathers(p))
                row.append(f"{top.ratio:.2f} ({top.max_owed})")
        rows.append(row)
    head = ["format", "context", "sequences"]
    return _markdown(head + [f"{d:g}, a = {a:g}" for d in DEPTHS[:2] for a in ACCEPTANCES], rows)


def _verified_policies(steady: Points, gated: Points) -> str:
    steady = only(steady, context=1024, depth=0.25, acceptance=0.7, max_owed=2)
    gated = only(gated, context=1024)
    rows = []
    for cell, other in zip(_cells(steady), _cells(gated), strict=True):
        ratios = [[_of_policy(points, policy) for policy in POLICIES] for points in (cell, other)]
        rows.append([*_name(cell[0]), *ratios[0], *ratios[1]])
    head = ["format", "context", "sequences", *POLICIES]
    return _markdown([*head, *(f"{policy}, gated" for policy in POLICIES)], rows)


def _latency(points: Points) -> str:
    rows = []
    for cell in _cells(only(points, formats="int4", depth=0.5, exit_rate=0.6, mode="propagate")):
        row = [*_name(cell[0]), f"{cell[0].off_gap_ms:.3g}"]
        for policy in POLICIES[1:]:
            (point,) = only(cell, policy=policy) or cell
            row.append(f"{point.gap_p50_ms:.3g} / {point.gap_p99_ms:.3g}")
        rows.append(row)
    return _markdown(["format", "context", "sequences", "exits off", *POLICIES[1:]], rows)


def _host(points: Points) -> str:
    modes = {"propagate": "propagate, half, 60 % leave", "verified": "verified, quarter, a = 0.7, 2 drafts"}
    rows = []
    for mode, name in modes.items():
        for cell in _cells(only(points, mode=mode)):
            if cell[0].resident <= 64:
                ratios = [_of_policy(only(cell, host_us=us), "least waste") for us in HOST_US]
                rows.append([name, f"{cell[0].resident:,}", *ratios])
    return _markdown(["mode", "sequences", *(f"{us} µs" for us in HOST_US)], rows)


def _max_wait(points: Points) -> str:
    rows = []
    for cell in _cells(points):
        if len(cell) == len(MAX_WAITS) * 2 and cell[0].resident in _BATCHES:
            for policy in POLICIES[2:]:
                row = [f"{cell[0].resident:,}", policy, f"{cell[0].off_gap_ms:.3g}"]
                for wait in MAX_WAITS:
                    (point,) = only(cell, policy=policy, max_wait=wait)
                    row.append(f"{point.ratio:.2f}, {point.gap_p99_ms:.3g} ms")
                rows.append(row)
    return _markdown(["sequences", "rule", "a step, off (ms)", *(f"{w:g} passes" for w in MAX_WAITS)], rows)


def _decisions(decisions: dict[str, Any]) -> str:
    rows = [
        [rule, f"{int(rows):,}", f"{cost['p50_us']:.0f}", f"{cost['p90_us']:.0f}"]
        for rule, costs in decisions.items()
        for rows, cost in costs.items()
    ]
    return _markdown(["rule", "rows", "median µs", "90 % µs"], rows)
