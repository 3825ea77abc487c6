"""What `make gpu-check` found of a machine, of steps and of kernels, as tables for docs/performance.md.

Shares are of the fastest rate at which any kernel of the run read memory, so that none can pass 100 %. Of a record that
lacks a section, or is older than what is told of it, come the rows and tables that it has.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from scripts.gpu_records import (
    LARGE,
    LARGE_BLOCKS,
    Row,
    Table,
    attention_us,
    called,
    cases,
    copy_rate,
    gpu_name,
    linear_us,
    linears_ms,
    memory_rate,
    only,
    section,
    step_of,
)
from scripts.gpu_targets import counted_shapes, targets

_OTHERS: Final = {
    "gated_linear": "gate and up with their activation, INT4",
    "rms_norm": "RMS norm",
    "write_kv": "writing keys and values",
    "turn_and_write_kv": "RoPE, rotation and writing",
    "exit_gate": "an exit's gate without its projection",
    "penalise_scores": "penalties",
    "truncate_scores": "top-k and top-p",
    "draw_tokens": "drawing a token",
}
_THEIRS: Final = ("torch", "softmax and multinomial")
"""What stands beside a kernel, by the name it has in the record."""
_VERSIONS: Final = ("exeunt", "torch", "triton", "transformers")
_MOST_TOLD: Final = 3
"""Of what a section left out, so much is told; the rest is in the JSON."""
_LONGEST: Final = 160


def machine_tables(record: Row) -> Iterator[Table]:
    """The machine with its versions, and which parts of the run were done."""
    yield Table(("on a GPU", "measured on"), list(_machine(record)))
    headers = ("part of the run", "how it ended", "seconds", "left out")
    yield Table(headers, [_part(name, found) for name, found in record["sections"].items()])


def _machine(record: Row) -> Iterator[Sequence[str]]:
    found = section(record, "machine")
    yield "command", f"`python -m scripts.gpu_check --seconds {record['seconds_given']:.0f}`"
    if "started" in record:
        yield "begun", str(record["started"]).replace("T", " ")
    multiprocessors, size = found.get("multiprocessors"), found.get("memory_bytes")
    more = [] if multiprocessors is None else [f"{multiprocessors} multiprocessors"]
    more += [] if size is None else [f"{size / 1e9:.0f} GB"]
    yield "machine", ", ".join([gpu_name(record), *more])
    versions = [f"{name} {found[name]}" for name in _VERSIONS if found.get(name)]
    versions += [f"CUDA {found['cuda']}"] if found.get("cuda") else []
    versions += [f"driver {found['driver']}"] if found.get("driver") else []
    yield "versions", ", ".join([f"Python {found.get('python')}", *versions])
    if "int4_group_size" in found:
        yield "INT4 weights", f"in groups of {found['int4_group_size']}"
    if "kernels" in found:
        commit, changed = found.get("commit"), " with changes" if found.get("changed") else ""
        yield "kernels", f"{found['kernels']}{f', of the commit {commit[:12]}{changed}' if commit else ''}"
    if "linear_kernels" in found:
        yield "linears, as measured launches name them", found["linear_kernels"]
    rate, copy = memory_rate(record), copy_rate(record)
    if rate is not None:
        beside = "" if copy is None else f"; a copy moved {copy / 1e12:.2f}"
        yield "memory's rate", f"{rate / 1e12:.2f} TB/s, the fastest read of the run{beside}"
    if "matmul_bf16_flop_per_s" in found:
        yield "bfloat16 product of 8192 × 8192", f"{found['matmul_bf16_flop_per_s'] / 1e12:.0f} TFLOP/s"
    if "metrics" in record:
        yield "engines' metrics", record["metrics"]


def _part(name: str, found: Row) -> Sequence[str]:
    lacking = [f"needs {', '.join(found['needs'])}"] if "needs" in found else []
    told = [*lacking, *([found["error"]] if "error" in found else []), *_left_out(found)]
    more = f"; and {len(told) - _MOST_TOLD} more" if len(told) > _MOST_TOLD else ""
    shown = "; ".join(_short(each) for each in told[:_MOST_TOLD])
    seconds = f"{found['seconds']:.0f}" if "seconds" in found else ""
    return name, str(found.get("status", "")), seconds, f"{shown}{more}"


def _left_out(found: Row, where: str = "") -> Iterator[str]:
    """What a section, or a part of it, had no time or room for, and what of it raised."""
    for name, each in found.items():
        if name == "skipped" and isinstance(each, list):  # of tests it is their number
            yield from map(str, each)
        elif name in ("broken", "without") and isinstance(each, Mapping):
            yield from (f"{part}: {said}" for part, said in each.items())
        elif isinstance(each, Mapping):
            at = f"{where}{name}"
            if "error" in each:
                yield f"{at}: {each['error']}"
            yield from _left_out(each, f"{at}, ")


def _short(said: str) -> str:
    """On one line, and no cell's end in it."""
    line = " ".join(said.split()).replace("|", "\\|")
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 1]}…"


def target_tables(record: Row) -> Iterator[Table]:
    """What was wanted beside what was measured."""
    yield Table(("target on a GPU", "measured", "wanted", ""), list(targets(record)))


def step_tables(record: Row) -> Iterator[Table]:
    """Decode steps of whole models."""
    headers = ("decode step", "weights/KV", "ms", "of the memory's rate", "tokens/s", "ms without a graph")
    yield Table(headers, list(_steps(record)))


def _steps(record: Row) -> Iterator[Sequence[str]]:
    rate = memory_rate(record)
    for step in sorted(section(record, "decode").get("steps", ()), key=_place):
        yield (
            f"{step['model']} {step['sequences']} × {step['context']}",
            f"{step['weights']}/{step['kv']}",
            f"{step['ms']:.2f}",
            "" if rate is None else f"{step['bytes_per_s'] / rate:.0%}",
            f"{step['tokens_per_s']:.0f}",
            f"{step['eager_ms']:.1f}" if "eager_ms" in step else "",
        )


def _place(step: Row) -> tuple[bool, str, int, int, str, str]:
    """Where a step stands in its table."""
    model = step["model"]
    return model != LARGE, model, step["context"], step["sequences"], step["weights"], step["kv"]


def part_tables(record: Row) -> Iterator[Table]:
    """What one stream's step is made of, and how far above its floor it is."""
    columns = {
        name: parts
        for name, kind, kv in (("full/full", "full_linear", "full"), ("int4/int4", "int4", "int4"))
        if (parts := _parts(record, kind, kv)) is not None
    }
    names = next(iter(columns.values()), {})
    rows = [(name, *(f"{parts[name]:.2f}" for parts in columns.values())) for name in names]
    yield Table(("ms of one stream's step at 512 tokens", *columns), rows)


def _parts(record: Row, kind: str, kv: str) -> dict[str, float] | None:
    """Milliseconds of each part; None where one of them was not timed."""
    write = only(cases(record, "write_kv"), {"kv": kv, "tokens": 1})
    step, rate = step_of(record, kv, kv, 1, 512), memory_rate(record)
    linears, head = linears_ms(record, kind), linear_us(record, "head", kind)
    attention = attention_us(record, kv, 1, 512)
    if write is None or step is None or rate is None or linears is None or head is None or attention is None:
        return None
    parts = {
        "linears of all blocks": linears - head / 1e3,
        "output matrix": head / 1e3,
        "attention": LARGE_BLOCKS * attention / 1e3,
        "writing keys and values": LARGE_BLOCKS * write["us"] / 1e3,
    }
    rest = {"norms and all else": step["ms"] - sum(parts.values()), "**whole step**": step["ms"]}
    return parts | rest | {"reading alone, at the memory's rate": step["bytes"] / rate * 1e3}


def order_costs(record: Row) -> dict[str, dict[str, dict[int, float]]]:
    """By layer with its weights, by what it is held against and by rows: our time over that of the other.

    Our sums go in one order for any number of rows. PyTorch's product is chosen by their number; so are, where they
    were searched for, tile and parts of our own kernel.
    """
    found: dict[str, dict[str, dict[int, float]]] = {}
    for kind in ("full", "int4"):
        for case in sorted(cases(record, "int4_linear"), key=lambda each: int(each["rows"])):
            ours = case["us"] if kind == "int4" else case["full_linear"]["us"]
            against = {"PyTorch in bfloat16": case["torch"], "our kernel": case.get(f"{kind}_free", {})}
            name = f"{case['layer']}, {'INT4' if kind == 'int4' else 'full weights'}"
            for other, figures in against.items():
                if "us" in figures:
                    found.setdefault(name, {}).setdefault(other, {})[case["rows"]] = ours / figures["us"]
    return found


def order_tables(record: Row) -> Iterator[Table]:
    """What one order of summation costs."""
    rows = _rows_of_linears(record)
    headers = ("a linear's time over that of one chosen by its rows", "against", *map(_rows, rows))
    costs = [
        (layer, other, *(f"{ratios[each]:.2f}" if each in ratios else "" for each in rows))
        for layer, others in order_costs(record).items()
        for other, ratios in others.items()
    ]
    yield Table(headers, costs)


def linear_tables(record: Row) -> Iterator[Table]:
    """Linears by layer and rows."""
    rows = _rows_of_linears(record)
    first = "of the memory's rate at 1 row"
    yield Table(("linear, µs: INT4 / full / PyTorch", first, *map(_rows, rows)), list(_linears(record, rows)))


def _linears(record: Row, rows: Sequence[int]) -> Iterator[Sequence[str]]:
    found, rate = cases(record, "int4_linear"), memory_rate(record)
    for layer in dict.fromkeys(case["layer"] for case in found):
        first = only(found, {"layer": layer, "rows": 1})
        three = () if first is None else (first, first["full_linear"], first["torch"])
        times = (_three_times(only(found, {"layer": layer, "rows": each})) for each in rows)
        yield layer, " / ".join(_share(each, rate) for each in three), *times


def _three_times(case: Row | None) -> str:
    if case is None:
        return ""
    return f"{case['us']:.1f} / {case['full_linear']['us']:.1f} / {case['torch']['us']:.1f}"


def _rows_of_linears(record: Row) -> list[int]:
    return sorted({case["rows"] for case in cases(record, "int4_linear")})


def _rows(count: int) -> str:
    return f"{count} row{'s' * (count > 1)}"


def _share(figures: Row, rate: float | None) -> str:
    """Of the memory's rate; of buffers that the cache may hold that says nothing."""
    if figures.get("cached"):
        return "in the cache"
    return "" if rate is None else f"{figures['bytes_per_s'] / rate:.0%}"


def attention_tables(record: Row) -> Iterator[Table]:
    """Attention of one block."""
    headers = ("attention of one block, sequences × context", "full, µs", "INT4, µs", "SDPA, µs")
    yield Table((*headers, "full / INT4"), list(_attention(record)))


def _attention(record: Row) -> Iterator[Sequence[str]]:
    rate, found = memory_rate(record), cases(record, "paged_attention")
    sizes = sorted({(case["context"], case["sequences"]) for case in found})
    for context, sequences in sizes:
        wanted = {"sequences": sequences, "context": context}
        full, int4 = (only(found, {**wanted, "kv": kv}) for kv in ("full", "int4"))
        three = (full, int4, None if full is None else full.get("sdpa"))
        times = ("" if each is None else f"{each['us']:.1f} ({_share(each, rate)})" for each in three)
        ratio = "" if full is None or int4 is None else f"{full['us'] / int4['us']:.2f}"
        yield f"{sequences} × {context}", *times, ratio


def other_tables(record: Row) -> Iterator[Table]:
    """What stands around products and attention."""
    rows = [_other(case) for op in _OTHERS for case in cases(record, op)]
    yield Table(("other kernel, sizes of the mistral-7b shape", "µs", "PyTorch, µs"), rows)


def _other(case: Row) -> Sequence[str]:
    """Of gate and up also that of full weights."""
    name = f"{_OTHERS[case['op']]}, {_rows(case.get('rows', case.get('tokens')))}"
    if case["op"] == "draw_tokens":
        name += f" of {case['vocab']:,} logits"
    if "kv" in case:
        name += f", {'INT4' if case['kv'] == 'int4' else 'full'} pages"
    ours = f"{case['us']:.1f}"
    if "full" in case:
        name, ours = f"{name} / full", f"{ours} / {case['full']['us']:.1f}"
    theirs = next((case[each] for each in _THEIRS if each in case), None)
    return name, ours, "" if theirs is None else f"{theirs['us']:.1f}"


def kv_tables(record: Row) -> Iterator[Table]:
    """What keys and values take, by the layout of their pages."""
    headers = ("bytes of keys and values", "a token, full", "a token, INT4", "sequences in the same memory")
    rows = [
        (
            f"{called(name)}, sequences of {found['context']} tokens",
            f"{found['full_bytes_per_token']:,}",
            f"{found['int4_bytes_per_token']:,}",
            f"{found['sequences_in_the_same_memory']:.2f} times",
        )
        for name, found in counted_shapes(record).items()
    ]
    yield Table(headers, rows)


def tuning_tables(record: Row) -> Iterator[Table]:
    """What a search for launches found, where it was asked for."""
    found = section(record, "tuning")
    rows: list[Sequence[str]] = []
    if "launches" in found:
        best = max((each["speed_up"] for each in found["launches"]), default=1.0)
        rows = [
            ("calls searched", f"{found['tried']} of {found['calls']} in {found['search_seconds']:.0f} s"),
            ("faster than by the rule", f"{found['faster']}, the best {best:.2f} times as fast"),
            ("did not run / other bits", f"{len(found['failed'])} / {len(found['unequal'])}"),
        ]
    yield Table(("search for launches of linears", "found"), rows)


def check_tables(record: Row) -> Iterator[Table]:
    """Answers, bits and tests."""
    rows = [
        (check["name"], _compared(check), "good" if check["good"] else "**failed**")
        for check in record["checks"]
    ]
    yield Table(("check on the GPU", "compared", "result"), rows)


def _compared(check: Row) -> str:
    if "chosen_alike" in check:
        found = f"{check['tokens']} tokens, {check['chosen_alike']} the other's own choice"
        if check["worst_margin"]:
            found += f", worst {check['worst_margin']:.2g} below it (at most {check['tolerance']:.2g})"
        return found
    if "tolerance" in check:
        return f"error {check['error']:.2%} of the norm (at most {100 * check['tolerance']:g}%)"
    if "error" in check:
        return _short(str(check["error"]))
    if "compared" in check:
        left_out = f", {len(check['left_out'])} left out" if check.get("left_out") else ""
        return f"{check['compared']} ways, {len(check['differ'])} differ{left_out}"
    if "passed" in check:
        return f"{check['passed']} passed, {check['failed']} failed, {check['skipped']} skipped"
    return f"{check['tokens']} tokens" if "tokens" in check else ""
