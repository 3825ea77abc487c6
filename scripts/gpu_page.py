"""The GPU part of docs/performance.md, and README's table of it: a subsection for each record of `make gpu-check`.

Every section of a record has a region of its own. Where the page has it, its content is written anew, and what stands
around it stays; where a record has figures for which the page has no region, one is put in with a heading, behind the
section before it; a record that the page does not know gets a subsection at `NEXT`. A region whose record has no such
figures says so.

Prose beside the regions was written of one run. It says of which in a comment, `<!-- NAME: text of the run of
STARTED -->`; where the record is of another, the first region says that too.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from textwrap import fill
from typing import Final

from scripts.gpu_exit_tables import exit_tables
from scripts.gpu_load_tables import (
    engine_tables,
    grid_tables,
    host_tables,
    long_tables,
    memory_tables,
    transformers_tables,
)
from scripts.gpu_records import (
    LARGE,
    LARGE_LAYER,
    MODELS,
    Row,
    Table,
    copy_rate,
    gpu_name,
    linear_times,
    memory_rate,
    speed,
    speeds_of,
    step_of,
    steps_of,
    streams_text,
)
from scripts.gpu_tables import (
    attention_tables,
    check_tables,
    kv_tables,
    linear_tables,
    machine_tables,
    order_tables,
    other_tables,
    part_tables,
    step_tables,
    target_tables,
    tuning_tables,
)
from scripts.page_regions import markdown_table, region, region_keys, section_end, with_region

NEXT: Final = "<!-- gpu-check: the subsection of another GPU goes in front of this line -->"
NOTHING: Final = "(Not in this run.)"
SPEEDS: Final = "gpu-check speeds"
"""The key of README's region."""
_PICTURES: Final = {"decode": "steps", "linears": "linears"}
_NOT_THERE: Final = "(There is no record of it.)"
_WIDTH: Final = 120
_STREAMS: Final = (1, 16, 64)
_PLAIN: Final = "engine int4/int4"
_VERIFIED: Final = "engine int4/int4 verified"
_OFF: Final = '{"early_exit": false}'
_COLUMNS: Final[Mapping[str, tuple[str, ...]]] = {
    "bfloat16": ("engine full/full",),
    "INT4": (_PLAIN,),
    "INT4, verified exits (the default)": (_VERIFIED,),
    "INT4, approximate exits": ("engine int4/int4 exits at 0.5", "engine int4/int4 exits at 0.5 (synthetic)"),
    "`generate_batch`": ("transformers generate_batch",),
    "`generate`": ("transformers generate",),
}
"""Of README's table, with what the record calls each; where weights are random the exit is synthetic."""
_TEXT: Final = "<!-- {name}: text of the run of (.+?) -->"

Tables = Callable[[Row], Iterator[Table]]
SECTIONS: Final[Mapping[str, tuple[str, tuple[Tables, ...]]]] = {
    "machine": ("", (machine_tables,)),
    "targets": ("Targets", (target_tables,)),
    "decode": ("Decode steps", (step_tables,)),
    "parts": ("One stream's step", (part_tables,)),
    "orders": ("What one order of sums costs", (order_tables,)),
    "linears": ("Linears", (linear_tables,)),
    "attention": ("Attention", (attention_tables,)),
    "kernels": ("Other kernels", (other_tables,)),
    "tuning": ("Search for launches", (tuning_tables,)),
    "engine": ("The engine", (engine_tables,)),
    "exits": ("Exits", (exit_tables,)),
    "long": ("Long contexts", (long_tables,)),
    "grid": ("Batches and contexts", (grid_tables,)),
    "transformers": ("How transformers ran", (transformers_tables,)),
    "memory": ("Memory", (kv_tables, memory_tables)),
    "host": ("The host's part of a tick", (host_tables,)),
    "checks": ("Checks", (check_tables,)),
}
"""By the name in its key, a section's title and what makes its tables; the first one has the subsection's own title."""


def picture(name: str, what: str) -> str:
    """The file of a section's picture, without ending: `gpu-check-nvidia-h200` has gpu-nvidia-h200-steps."""
    return f"gpu-{name.removeprefix('gpu-check-')}-{_PICTURES[what]}"


def pictures(record: Row) -> dict[str, str]:
    """Which pictures a record has the figures for, by section, each with its caption."""
    found = {}
    if any(step["weights"] == step["kv"] for step in steps_of(record, LARGE)):
        found["decode"] = "Milliseconds of decode steps beside reading what they must"
    if linear_times(record, LARGE_LAYER):
        found["linears"] = "Microseconds of a linear layer by rows"
    return found


def with_gpu_parts(text: str, records: Mapping[str, Row]) -> str:
    """The page with every record's figures. Raises ValueError where it has no place for another GPU's."""
    for name, record in records.items():
        text = _with_part(text, name, record)
    for key in region_keys(text):
        name = key.partition(" ")[0]
        if name.startswith("gpu-check-") and name not in records:
            text = with_region(text, key, _NOT_THERE)
    return text


def contents(name: str, record: Row, page: str = "") -> dict[str, str]:
    """The text of every section's region, by its name; empty where the record has no figures for it.

    `page` is what has prose of a run, if any.
    """
    found = {}
    for what, (_, made_by) in SECTIONS.items():
        tables = [table for make in made_by for table in make(record) if table.rows]
        shown = [f"{table.caption}\n\n{_text(table)}" if table.caption else _text(table) for table in tables]
        if shown and what in pictures(record):
            shown = [f"![{pictures(record)[what]}](images/{picture(name, what)}.svg)", *shown]
        found[what] = "\n\n".join(shown)
    source = f"([JSON](../benchmarks/results/{name}.json))"
    older = re.search(_TEXT.format(name=re.escape(name)), page)
    if older is not None and older[1] != record.get("started"):
        source += (
            f" **The text around the tables was written of the run of {older[1].replace('T', ' ')}; "
            "the tables are of another.**"
        )
    found["machine"] = f"{source}\n\n{found['machine']}"
    return found


def _text(table: Table) -> str:
    return markdown_table(table.headers, table.rows)


def _with_part(text: str, name: str, record: Row) -> str:
    before: str | None = None
    gpu = gpu_name(record)
    for what, content in contents(name, record, text).items():
        key = f"{name} {what}"
        if key in region_keys(text):
            text = with_region(text, key, content or NOTHING)
        elif content:
            title = SECTIONS[what][0]
            heading = f"#### {title}, {gpu}" if title else f"### {gpu}"
            at = _place(text, before)
            text = f"{text[:at]}{heading}\n\n{region(key, content)}\n\n{text[at:]}"
        else:
            continue
        before = key
    return text


def _place(text: str, before: str | None) -> int:
    """Where a section goes that stands behind another, or is the first one."""
    last = text.find(NEXT)
    if last < 0:
        raise ValueError(f"the page has no line {NEXT!r}")
    return last if before is None else min(last, section_end(text, before))


def speeds_text(records: Mapping[str, Row]) -> str:
    """README's region: for each GPU one stream's step, and tokens per second."""
    return "\n\n".join(part for record in records.values() for part in _readme(record))


def _readme(record: Row) -> Iterator[str]:
    gpu, begun = gpu_name(record), str(record.get("started", "")).partition("T")[0]
    full, int4 = (step_of(record, each, each, 1, 512) for each in ("full", "int4"))
    read, copy = memory_rate(record), copy_rate(record)
    said = []
    if full is not None and read is not None and copy is not None:
        said.append(
            f"A decode step of one stream takes {full['ms']:.2f} ms in bfloat16. That reads weights, keys and "
            f"values at {100 * full['bytes_per_s'] / copy:.0f} % of the rate of a copy, {copy / 1e12:.2f} TB/s "
            f"(wanted: 80 %), or {100 * full['bytes_per_s'] / read:.0f} % of that of the fastest read of the run, "
            f"{read / 1e12:.2f} TB/s."
        )
    if full is not None and int4 is not None:
        ratio = full["ms"] / int4["ms"]
        said.append(f"INT4 weights and KV make it {ratio:.2f} times as fast (wanted: 2.3).")
    rows = [
        row
        for model in (LARGE, "packaged")
        for streams in _STREAMS
        if any((row := _readme_row(record, model, streams))[1:])
    ]
    if said or rows:
        of = f"One {gpu}{f', {begun}' if begun else ''}, a Mistral-7B shape with random weights and a synthetic"
        yield _filled(" ".join((f"{of} exit half-way.", *said)))
    if rows:
        yield markdown_table((f"one {gpu}, tokens/s", *_COLUMNS), rows)
    if cost := _cost_of_the_default(record):
        yield _filled(cost)


def _filled(text: str) -> str:
    return fill(text, _WIDTH, break_long_words=False, break_on_hyphens=False)


def _cost_of_the_default(record: Row) -> str:
    """What verified exits made of the tokens/s without, where both were timed on the packaged model."""
    timed = {
        streams: (speed(record, _VERIFIED, streams), speed(record, _PLAIN, streams)) for streams in _STREAMS
    }
    ratios = {streams: own / off for streams, (own, off) in timed.items() if own and off}
    if not ratios:
        return ""
    shown = _listed(f"{ratio:.2f}" for ratio in ratios.values())
    each = _listed(str(streams) for streams in ratios)
    said = (
        f"On the packaged model the default, verified exits, made {shown} of the tokens/s without exits with {each} "
        f"stream{'s' * (list(ratios) != [1])}."
    )
    if min(ratios.values()) >= 1:
        return said
    return f"{said} Where that matters `exeunt serve --default-compression '{_OFF}'` goes without; no token changes."


def _listed(words: Iterable[str]) -> str:
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last


def _readme_row(record: Row, model: str, streams: int) -> list[str]:
    shown = MODELS[model].replace(LARGE, "Mistral-7B")
    cells = [f"{shown}, {streams_text(streams)}"]
    speeds = speeds_of(record, model)
    for names in _COLUMNS.values():
        found = next((name for name in names if speed(record, name, streams, model) is not None), None)
        rate = speeds.get(f"{found}, {streams} streams", {}).get("exit_rate")
        left = f" ({100 * rate:.0f} % leave)" if rate and found != _VERIFIED else ""
        cells.append("" if found is None else f"{speed(record, found, streams, model):.0f}{left}")
    return cells
