"""The tables of README.md and docs/performance.md, made from benchmarks/results: `python -m scripts.result_tables`.

The CPU's tables stand where their like stood; the GPUs' parts are regions (`scripts.gpu_page`), with pictures of their
own in docs/images (`scripts.gpu_figures`).
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

import typer

from scripts.gpu_page import SPEEDS, speeds_text, with_gpu_parts
from scripts.gpu_records import RESULTS, ROOT, gpu_records
from scripts.page_regions import markdown_table, with_region, with_tables

PAGES: Final = {
    "README.md": ("packaged-eval", "packaged-cpu"),
    "docs/performance.md": (
        *("packaged-cpu", "packaged-llama-cpp", "packaged-parts", "packaged-adaptive", "packaged-whole"),
        *("packaged-gaps", "packaged-server"),
        "calibration-cost",
    ),
}

Row = Mapping[str, Any]
TARGETS: Final = {
    "one stream, full weights": "≥ 1",
    "one stream, INT4 weights and KV": "≥ 5",
    "8 streams, full weights": "≥ 3",
}
"""Against `generate`; exits are to gain half of the share of blocks that they skip."""


def _ratio(row: Row) -> str:
    if row["ratio"] == "uninformative":
        return "uninformative"
    return f"{row['ratio']:.2f} ({row['ratio_min']:.2f} to {row['ratio_max']:.2f})"


def _speeds(row: Row) -> tuple[str, str]:
    return f"{row['tokens_per_s']:.0f}", f"{row['against_tokens_per_s']:.0f}"


def speed_tables(record: Row) -> Iterator[str]:
    """The engine beside `generate`, and exits on beside exits off."""

    def row(name: str, measured: Row) -> Sequence[str]:
        target = TARGETS.get(name.split(", against")[0], "") if "generate" in name else ""
        shown = name.replace(" generate", " `generate`", 1)
        if "exit_rate" in measured:
            skipped = measured["blocks_skipped_share"]
            target = f"≥ {1 + skipped / 2:.2f}"
            shown += f" ({measured['exit_rate']:.0%} leave, {skipped:.1%} of the blocks skipped)"
        return shown, *_speeds(measured), _ratio(measured), target

    headers = (
        "what (two shared CPU cores, float32)",
        "tokens/s",
        "against",
        "ratio (min to max of 5)",
        "target",
    )
    yield markdown_table(headers, (row(*item) for item in record["results"].items()))


def llama_cpp_tables(record: Row) -> Iterator[str]:
    """The engine beside llama.cpp, and how much of our text in full precision each of them writes."""
    rows = ((name, *_speeds(row), _ratio(row)) for name, row in record["results"].items())
    yield markdown_table(("beside llama.cpp", "tokens/s", "llama.cpp", "ratio (min to max)"), rows)
    texts = (
        (name, f"{row['tokens_equal']:.0%}", f"{row['equal_before_first_other']:g}")
        for name, row in record["texts"].items()
    )
    yield markdown_table(
        ("text beside that of full weights", "tokens equal", "before the first other, median"), texts
    )


def eval_tables(record: Row) -> Iterator[str]:
    """The README's choice of modes: the two uniform variants, all targets for the deployed one."""
    headers = (
        *("mode", "perplexity", "change (95 %)", "KL", "agreement", f"mean depth of {record['blocks']}"),
        *("exit rate", "exits that differ", "compute saved", "tokens/s"),
    )
    yield markdown_table(headers, (_eval_row(each) for each in record["modes"] if _is_shown(each["mode"])))


def _is_shown(mode: Row) -> bool:
    variant, target = mode["variant"], mode["target"]
    if variant["weights"] != variant["kv_cache"] or (target is None and mode["threshold"] is not None):
        return False
    if variant["weights"] == "full":
        return not variant["linear_block"] and target in (None, 0.1)
    return not variant["linear_block"] or target in (None, 0.1)


def _eval_row(each: Row) -> Sequence[str]:
    change, differ = each["perplexity_increase"], each["disagreement"]
    return (
        each["name"],
        f"{each['perplexity']['value']:.2f}",
        f"{change['value']:+.2f} ({change['low']:+.2f} to {change['high']:+.2f})",
        f"{each['kl']['value']:.3f}",
        f"{each['agreement']['value']:.1%}",
        f"{each['mean_depth']['value']:.2f}",
        f"{each['exit_rate']['value']:.1%}",
        "" if differ is None else f"{differ['value']:.1%}",
        f"{each['compute_saved']['value']:+.1%}",
        f"{each['tokens_per_second']:.0f}",
    )


def parts_tables(record: Row) -> Iterator[str]:
    """What a decode step is made of, and what exits save and cost in it."""
    columns = list(record["results"].values())

    def part(name: str) -> Callable[[Row], str]:
        return lambda column: f"{column['parts'].get(name, 0):.0f}"

    def account(group: str, name: str, form: str = ".0f") -> Callable[[Row], str]:
        return lambda column: format(column[group][name], form)

    lines: tuple[tuple[str, Callable[[Row], str]], ...] = (
        *((name, part(name)) for name in ("all blocks", "own head", "draw")),
        ("**step of the engine, exits off**", account("exits_off", "step")),
        ("of it not in the parts above", account("exits_off", "rest")),
        *(
            (name, part(name))
            for name in (
                "blocks behind the exit, all rows",
                "blocks behind the exit, rows that stay",
                "gate with its projection",
                "of it: the projection",
                "keys and values of rows that leave",
            )
        ),
        ("share of tokens that leave", account("exits", "exit_rate", ".0%")),
        ("saved: blocks", account("exits", "saved_in_blocks")),
        ("saved: own head", account("exits", "saved_in_own_head")),
        ("paid: gate, keys and values", account("exits", "paid_in_gate_and_keys")),
        ("paid: around them", account("exits", "paid_around")),
        ("**step of the engine, exits on**", account("exits_on", "step")),
    )
    rows = ([name, *(shown(column) for column in columns)] for name, shown in lines)
    yield markdown_table(["µs per step", *record["results"]], rows)


def adaptive_tables(record: Row) -> Iterator[str]:
    """Depth by token: verified, approximate, policies, batches that wait for all."""
    results = record["results"]

    def table(part: str, against: str, more: Mapping[str, Callable[[Row], str]]) -> str:
        rows = (
            (name, *_speeds(row), _ratio(row), *(shown(row) for shown in more.values()))
            for name, row in results[part].items()
        )
        return markdown_table([part, "tokens/s", against, "ratio (min to max)", *more], rows)

    def share(name: str, form: str = ".0%") -> Callable[[Row], str]:
        return lambda row: "" if row[name] is None else format(row[name], form)

    leave = {"leave": share("exit_rate")}
    yield table(
        "verified against off",
        "off",
        {
            "drafts a token": share("drafts_per_token", ".2f"),
            "right": share("acceptance"),
            "predicted": lambda row: f"{row['predicted_ratio']:.2f}" if "predicted_ratio" in row else "",
        },
    )
    yield table(
        "approximate against off", "off", leave | {"blocks skipped": share("blocks_skipped_share", ".1%")}
    )
    yield table("queues against run-through", "run-through", leave)
    yield table(
        "run-through against wait-for-all",
        "wait-for-all",
        leave | {"leave when all must": share("against_exit_rate")},
    )


def whole_tables(record: Row) -> Iterator[str]:
    """Ticks in one call against the same a stage at a time."""
    rows = (
        (name, *_speeds(row), _ratio(row), f"{row['exit_rate']:.0%}" if row["exit_rate"] else "")
        for name, row in record["results"].items()
    )
    headers = ("one call against stages", "tokens/s", "by stages", "ratio (min to max)", "leave")
    yield markdown_table(headers, rows)


def gaps_tables(record: Row) -> Iterator[str]:
    """Time between tokens, alone and beside long prompts."""

    def row(name: str, measured: Row) -> Sequence[str]:
        times = (1e3 * measured[when][at] for when in ("alone_s", "beside_s") for at in ("p50", "p99"))
        return name, *(f"{each:.1f}" for each in times), f"{measured['p99_ratio']:.2f}"

    headers = ("gaps between tokens, ms", "p50", "p99", "p50 beside", "p99 beside", "p99 ratio")
    yield markdown_table(headers, (row(*item) for item in record["results"].items()))


def server_tables(record: Row) -> Iterator[str]:
    """The server beside its engine: speed, what CPU it takes, and how soon it is ready."""
    results = record["results"]
    rows = ((name, *_speeds(row), _ratio(row), "≥ 0.95") for name, row in results.items())
    yield markdown_table(("over HTTP", "tokens/s", "the engine alone", "ratio (min to max)", "target"), rows)

    def cpu(name: str, us: Row) -> Sequence[str]:
        return name, *(f"{us[side]:.0f}" for side in ("engine_alone", "server", "clients"))

    headers = ("µs of CPU a token", "the engine alone", "the server", "its clients")
    yield markdown_table(headers, (cpu(name, row["cpu_us_per_token"]) for name, row in results.items()))
    start = ("from `exeunt serve` to `/ready`", f"{record['start']['seconds_to_ready']:.1f}", "≤ 5")
    yield markdown_table(("start, with a bundle that was read before", "seconds", "target"), iter([start]))


def calibration_tables(record: Row) -> Iterator[str]:
    """Peak memory on models that grow, and time against tokens."""

    def mib(count: int) -> str:
        return f"{count / 2**20:.0f}"

    def grown(row: Row) -> Sequence[str]:
        sizes = (row["full_bytes"], row["int4_bytes"], row["embedding_bytes"], row["block_bytes"])
        worst = max(row["phases"], key=lambda phase: phase["peak"]["anonymous"])
        peak = row["peak"]["anonymous"] - row["before"]["anonymous"]
        return (
            f"{row['parameters'] / 1e6:.0f}M",
            *map(mib, (*sizes, peak)),
            str(worst["phase"]).lower(),
        )

    sizes = ("full weights, MiB", "INT4 weights", "embedding and output matrix", "one full block")
    headers = ("random Llama", *sizes, "peak of a calibration", "in this step")
    yield markdown_table(headers, map(grown, record["memory"]))
    fit = record["time_fit"]
    timed = [
        (
            f"{row['tokens']:,}",
            f"{row['seconds']:.0f} s",
            f"{fit['seconds_at_none'] + fit['seconds_per_1000_tokens'] * row['tokens'] / 1000:.0f} s",
        )
        for row in record["time"]
    ]
    yield markdown_table(("tokens, packaged model", "calibration", "by the line"), iter(timed))


_TABLES: Final[Mapping[str, Callable[[Row], Iterator[str]]]] = {
    "packaged-cpu": speed_tables,
    "packaged-llama-cpp": llama_cpp_tables,
    "packaged-eval": eval_tables,
    "packaged-parts": parts_tables,
    "packaged-adaptive": adaptive_tables,
    "packaged-whole": whole_tables,
    "packaged-gaps": gaps_tables,
    "packaged-server": server_tables,
    "calibration-cost": calibration_tables,
}


def tables_of(page: str) -> list[str]:
    """The tables that a page must show."""
    return [
        table
        for name in PAGES[page]
        for table in _TABLES[name](json.loads((RESULTS / f"{name}.json").read_text()))
    ]


def with_results(text: str, page: str) -> str:
    """A page's text with all that is made from the results anew. Raises ValueError where it has no place for some."""
    text, records = with_tables(text, tables_of(page)), gpu_records()
    if page == "README.md":
        return with_region(text, SPEEDS, speeds_text(records))
    return with_gpu_parts(text, records)


def main() -> None:
    """Write the pages and the GPUs' pictures anew."""
    from scripts.gpu_figures import write_figures  # it takes matplotlib, which the pages do not

    for page in PAGES:
        path = ROOT / page
        path.write_text(with_results(path.read_text("utf-8"), page), encoding="utf-8")
        typer.echo(f"written: {page}")
    for path in write_figures():
        typer.echo(f"written: {path.relative_to(ROOT)}")


if __name__ == "__main__":
    typer.run(main)
