"""Measures what depth by token brings: verified exits, backfill, queues; the third part of `make bench`.

Both sides of a ratio run in turn in one engine (for scheduling: in two engines beside each other), and medians of the
pairs are quoted. A ratio for which fewer than a tenth of the tokens left early or were drafted is no ratio of exits: it
is called "uninformative".
"""

import statistics
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from exeunt.compression.bundle import REPORT_JSON
from exeunt.compression.variant import Variant
from exeunt.deploy.bench import INFORMATIVE
from scripts.bench_runs import (
    OFF,
    RESULTS,
    VARIANTS,
    Count,
    EngineRuns,
    Out,
    Run,
    Sizes,
    in_turn,
    packaged_runs,
    write_result,
)
from scripts.predicted import Prediction
from scripts.wait_for_all import by_stages, waiting_for_all

STREAMS = (1, 4, 16)
UNINFORMATIVE = "uninformative"

console = Console()


def main(out: Out = None, prompt_tokens: Count = 128, new_tokens: Count = 256, repeats: Count = 5) -> None:
    """Measure, print tables, write JSON."""
    sizes = Sizes(prompt_tokens, new_tokens, repeats, 8)
    results: dict[str, Any] = {}
    with packaged_runs(sizes) as ours:
        results["verified against off"] = _verified(ours, repeats)
        results["approximate against off"] = _approximate(ours, max(repeats // 2, 1))
        with packaged_runs(sizes, scheduling="queues") as queued:
            results["queues against run-through"] = _scheduling(ours, queued, repeats)
        with (
            packaged_runs(sizes, changed=by_stages) as alone,
            packaged_runs(sizes, changed=waiting_for_all) as waiting,
        ):
            results["run-through against wait-for-all"] = _leaving_alone(alone, waiting, repeats)
        path = out or RESULTS / "packaged-adaptive.json"
        for row in (row for rows in results.values() for row in rows.values()):
            if not row["informative"]:
                row["ratio"] = UNINFORMATIVE
        write_result(path, ours.model, sizes, results=results)
    for name, rows in results.items():
        _print(name, rows)
    console.print(f"written to {path}")


def _verified(ours: EngineRuns, repeats: int) -> dict[str, Any]:
    """The verified mode by streams, with what it drafted and the costs that it went by."""
    rows: dict[str, Any] = {}
    prediction = Prediction.of(ours.model, ours.bundle / REPORT_JSON)
    for streams in STREAMS:
        for label, variant in VARIANTS.items():
            prompts = ours.prompts(streams)
            row, pairs = in_turn(
                partial(ours.at_once, prompts, variant, {"mode": "verified"}),
                partial(ours.at_once, prompts, variant, OFF),
                repeats,
            )
            costs = ours.draft_costs(variant)
            row["draft_costs_us"] = {
                name: 1e6 * value for name, value in asdict(costs).items() if name != "seen"
            }
            if streams == 1 and variant == ours.model.default_variant and prediction is not None:
                row |= _predicted(prediction, row["ratio"], pairs)
            rows[f"{streams} stream{'s' if streams > 1 else ''}, {label}"] = row | _drafted(
                [mine for mine, _ in pairs]
            )
    return rows


def _predicted(prediction: Prediction, ratio: float, pairs: list[tuple[Run, Run]]) -> dict[str, float]:
    """The ratio that measured costs predict for the passes that were run, and how much of it was reached."""
    predicted = statistics.median(prediction.ratio(mine.stage_runs, mine.tokens) for mine, _ in pairs)
    return {"predicted_ratio": predicted, "of_predicted": ratio / predicted}


def _drafted(runs: list[Run]) -> dict[str, Any]:
    drafts = sum(run.drafts for run in runs)
    accepted = sum(run.drafts_accepted for run in runs)
    tokens = sum(run.tokens for run in runs)
    return {
        "drafts_per_token": drafts / tokens,
        "acceptance": accepted / drafts if drafts else None,
        "informative": drafts / tokens >= INFORMATIVE,
        "by_exit": {
            name: sum(run.by_exit.get(name, 0) for run in runs) / tokens for name in sorted(runs[0].by_exit)
        },
    }


def _approximate(ours: EngineRuns, repeats: int) -> dict[str, Any]:
    """Every certified target, keys and values caught up or propagated."""
    rows: dict[str, Any] = {}
    prompts = ours.prompts(8)
    for label, variant in VARIANTS.items():
        for method in ("propagate", "backfill"):
            for target in sorted(ours.certified(variant, method)):
                asked = {"mode": "approximate", "max_disagreement": target, "skipped_kv": method}
                row, pairs = in_turn(
                    partial(ours.at_once, prompts, variant, asked),
                    partial(ours.at_once, prompts, variant, OFF),
                    repeats,
                )
                rows[f"8 streams, {label}, {method}, target {target:g}"] = row | _left(pairs)
    return rows


def _scheduling(ours: EngineRuns, queued: EngineRuns, repeats: int) -> dict[str, Any]:
    """The same load through both policies; both engines are up, one runs at a time."""
    rows: dict[str, Any] = {}
    for streams in (8, 32):
        prompts = ours.prompts(streams)
        for label, variant in VARIANTS.items():
            for name, asked in _modes(ours, variant):
                row, pairs = in_turn(
                    partial(queued.at_once, prompts, variant, asked),
                    partial(ours.at_once, prompts, variant, asked),
                    repeats,
                )
                rows[f"{streams} streams, {label}, {name}"] = row | _left(pairs)
    return rows


def _leaving_alone(ours: EngineRuns, waiting: EngineRuns, repeats: int) -> dict[str, Any]:
    """Rows that leave one by one against batches of which all leave or none; at the loosest target."""
    rows: dict[str, Any] = {}
    for streams in (1, 4, 8):
        prompts = ours.prompts(streams)
        for label, variant in VARIANTS.items():
            for name, asked in _modes(ours, variant)[1:2]:
                row, pairs = in_turn(
                    partial(ours.at_once, prompts, variant, asked),
                    partial(waiting.at_once, prompts, variant, asked),
                    repeats,
                )
                together = statistics.median(theirs.exit_rate for _, theirs in pairs)
                rows[f"{streams} stream{'s' if streams > 1 else ''}, {label}, {name}"] = (
                    row | _left(pairs) | {"against_exit_rate": together}
                )
    return rows


def _modes(ours: EngineRuns, variant: Variant) -> list[tuple[str, Mapping[str, Any]]]:
    found: list[tuple[str, Mapping[str, Any]]] = [("verified", {"mode": "verified"})]
    for method in ("propagate", "backfill"):
        if certified := ours.certified(variant, method):
            asked = {"mode": "approximate", "max_disagreement": max(certified), "skipped_kv": method}
            found.append((f"{method} at {max(certified):g}", asked))
    return found


def _left(pairs: list[tuple[Run, Run]]) -> dict[str, Any]:
    runs = [ours for ours, _ in pairs]
    rate = statistics.median(run.exit_rate for run in runs)
    return {
        "exit_rate": rate,
        "blocks_skipped_share": statistics.median(run.skipped for run in runs),
        "block_passes_share": statistics.median(run.passes_share for run in runs),
        "informative": rate >= INFORMATIVE,
    }


def _print(name: str, rows: Mapping[str, Any]) -> None:
    figures = ("tokens/s", "against", "ratio", "min–max", "predicted")
    table = Table(name, *figures, "left early", "drafts a token", "accepted")
    for what, row in rows.items():
        ratio = row["ratio"] if row["ratio"] == UNINFORMATIVE else f"{row['ratio']:.2f}"
        accepted = row.get("acceptance")
        table.add_row(
            what,
            f"{row['tokens_per_s']:.0f}",
            f"{row['against_tokens_per_s']:.0f}",
            ratio,
            f"{row['ratio_min']:.2f}–{row['ratio_max']:.2f}",
            f"{row['predicted_ratio']:.2f}" if "predicted_ratio" in row else "",
            f"{row['exit_rate']:.0%}" if "exit_rate" in row else "",
            f"{row['drafts_per_token']:.2f}" if "drafts_per_token" in row else "",
            "" if accepted is None else f"{accepted:.0%}",
        )
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
