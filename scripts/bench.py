"""Measures the packaged model beside `transformers` in one run and writes JSON: what `make bench` calls.

Every ratio is taken pair by pair (ours and theirs in turn), and the median over the repeats is quoted, so that a
drifting machine moves both sides. Tokens are greedy, end-of-text is ignored, prompts come from the calibration text.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from exeunt.compression.variant import Variant
from exeunt.deploy.bench import INFORMATIVE
from exeunt.deploy.packaged_model import path as checkpoint
from scripts.bench_runs import (
    MANY,
    RESULTS,
    VARIANTS,
    Count,
    EngineRuns,
    Out,
    Prompts,
    Run,
    Sizes,
    in_turn,
    packaged_runs,
    write_result,
)

console = Console()


def main(
    out: Out = None,
    prompt_tokens: Count = 128,
    new_tokens: Count = 256,
    repeats: Count = 5,
    streams: Count = 8,
) -> None:
    """Measure, print a table, write JSON."""
    sizes = Sizes(prompt_tokens, new_tokens, repeats, streams)
    with packaged_runs(sizes) as ours:
        rows = _measure(ours, _Transformers(checkpoint(), new_tokens), ours.prompts(streams), repeats)
        for count in (1, streams, MANY * streams):
            rows |= _measure_exits(ours, ours.prompts(count), repeats)
    path = out or RESULTS / "packaged-cpu.json"
    write_result(path, ours.model, sizes, results=rows)
    _print(rows)
    console.print(f"written to {path}")


class _Transformers:
    """`transformers` generate on the same checkpoint, float32, greedy."""

    def __init__(self, path: Path, new_tokens: int) -> None:
        from transformers import AutoModelForCausalLM

        self._model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self._new_tokens = new_tokens

    def one_after_another(self, prompts: Prompts) -> Run:
        began, tokens = time.perf_counter(), 0
        for prompt in prompts:
            ids = torch.tensor([prompt])
            with torch.inference_mode():
                answer = self._model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=self._new_tokens,
                    min_new_tokens=self._new_tokens,
                    do_sample=False,
                    pad_token_id=0,
                )
            tokens += answer.shape[1] - ids.shape[1]
        return Run(tokens, time.perf_counter() - began)


def _measure(ours: EngineRuns, reference: _Transformers, prompts: Prompts, repeats: int) -> dict[str, Any]:
    streams = f"{len(prompts)} streams"
    return {
        f"{name}, {label}, against {what}": _pair(
            partial(ours.at_once, asked, variant), partial(reference.one_after_another, asked), repeats
        )
        for name, asked, what in (
            ("one stream", prompts[:1], "generate"),
            (streams, prompts, "as many generate calls in turn"),
        )
        for label, variant in VARIANTS.items()
    }


def _measure_exits(ours: EngineRuns, prompts: Prompts, repeats: int) -> dict[str, Any]:
    """Exits on against off, at the loosest certified target and at a threshold where enough tokens leave."""
    rows: dict[str, Any] = {}
    name = "one stream" if len(prompts) == 1 else f"{len(prompts)} streams"
    for label, variant in VARIANTS.items():
        for what, early_exit in _exits(ours, variant, prompts):
            rows[f"{name}, {label}, exits {what}, against exits off"] = _pair(
                partial(ours.at_once, prompts, variant, early_exit),
                partial(ours.at_once, prompts, variant),
                repeats,
            )
    return rows


def _exits(ours: EngineRuns, variant: Variant, prompts: Prompts) -> list[tuple[str, dict[str, Any]]]:
    found: list[tuple[str, dict[str, Any]]] = []
    if certified := ours.certified(variant):
        target = max(certified)
        early_exit = {"mode": "approximate", "max_disagreement": target, "skipped_kv": "propagate"}
        found.append((f"at the certified target {target:g}", early_exit))
        if ours.at_once(prompts, variant, early_exit).exit_rate >= INFORMATIVE:
            return found
    for threshold in (0.9, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5, 0.4, 0.3):
        early_exit = {"mode": "approximate", "threshold": threshold, "skipped_kv": "propagate"}
        if ours.at_once(prompts, variant, early_exit).exit_rate >= INFORMATIVE:
            found.append((f"at threshold {threshold:g} (not certified)", early_exit))
            break
    return found


def _pair(ours: Callable[[], Run], theirs: Callable[[], Run], repeats: int) -> dict[str, Any]:
    """Both in turn; where tokens left early, also how many, and what it gained for the blocks it saved."""
    row, pairs = in_turn(ours, theirs, repeats)
    mine = [each for each, _ in pairs]
    if mine[0].exit_rate:
        skipped = statistics.median(a.skipped for a in mine)
        row |= {"exit_rate": statistics.median(a.exit_rate for a in mine), "blocks_skipped_share": skipped}
        row["informative"] = row["exit_rate"] >= INFORMATIVE
        row["gain_over_skipped_share"] = (row["ratio"] - 1) / skipped
    return row


def _print(rows: dict[str, Any]) -> None:
    table = Table("what", "tokens/s", "against", "ratio", "min–max", "exit rate", "blocks skipped")
    for name, row in rows.items():
        exits = [f"{row[k]:.1%}" if k in row else "" for k in ("exit_rate", "blocks_skipped_share")]
        spread = f"{row['ratio_min']:.2f}–{row['ratio_max']:.2f}"
        speeds = (f"{row['tokens_per_s']:.0f}", f"{row['against_tokens_per_s']:.0f}")
        table.add_row(name, *speeds, f"{row['ratio']:.2f}", spread, *exits)
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
