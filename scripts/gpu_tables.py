"""What `make gpu-check` found, as headers and rows for docs/performance.md: `scripts.result_tables` writes them there.

Shares are of the fastest rate at which any kernel of the run read memory, so that none can pass 100 %.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from scripts.gpu_load_tables import LARGE, MODELS, Row, Table, load_tables, speeds_of

_PARTS: Final = ("gate_up", "out", "down", "qkv")
_OTHERS: Final = {
    "gated_linear": "gate and up with their activation, INT4",
    "rms_norm": "RMS norm",
    "turn_and_write_kv": "RoPE, rotation and writing",
    "exit_gate": "an exit's gate without its projection",
    "penalise_scores": "penalties",
    "truncate_scores": "top-k and top-p",
}
_VERSIONS: Final = ("torch", "triton", "transformers")


def gpu_tables(record: Row) -> Iterator[Table]:
    """Machine, targets, steps, what a step is made of, linears and what one order of their sums costs, attention,
    other kernels, the engine, checks."""
    yield ("on a GPU", "measured on"), _machine(record)
    yield ("target on a GPU", "measured", "wanted", ""), _targets(record)
    yield (
        ("decode step", "weights/KV", "ms", "of the memory's rate", "tokens/s", "ms without a graph"),
        _steps(record),
    )
    yield ("ms of one stream's step at 512 tokens", "full/full", "int4/int4"), _parts(record)
    rows = sorted({case["rows"] for case in _cases(record, "int4_linear")})
    columns = ("of the memory's rate at 1 row", *(f"{each} row{'s' * (each > 1)}" for each in rows))
    yield ("linear, µs: INT4 / full / PyTorch", *columns), _linears(record, rows)
    yield (
        ("a linear's time over that of one chosen by its rows", "against", *columns[1:]),
        _order_costs(record),
    )
    yield (
        ("attention of one block, sequences × context", "full, µs", "INT4, µs", "SDPA, µs", "full / INT4"),
        _attention(record),
    )
    if others := [case for op in _OTHERS for case in _cases(record, op)]:
        yield ("other kernel of the mistral-7b shape", "µs", "PyTorch, µs"), map(_other, others)
    yield from load_tables(record)
    yield ("check on the GPU", "compared", "result"), _checks(record)


def memory_rate(record: Row) -> float:
    """Bytes per second of the kernel that read memory the fastest in the run.

    Of kernels whose data no cache holds: small ones may be read faster than memory is.
    """
    machine = record["sections"]["machine"]
    cases = [case for op in ("int4_linear", "paged_attention") for case in _cases(record, op)]
    found = [machine[key] for key in ("copy_bytes_per_s", "read_bytes_per_s") if key in machine]
    for case in cases:
        all_of_it = (case, *_inner(case))
        found += [
            each["bytes_per_s"] for each in all_of_it if "bytes_per_s" in each and not each.get("cached")
        ]
    return float(max(found))


def step_of(record: Row, weights: str, kv: str, sequences: int, context: int, model: str = LARGE) -> Row:
    """One decode step of the run."""
    wanted = {"weights": weights, "kv": kv, "sequences": sequences, "context": context, "model": model}
    return _only(record["sections"]["decode"]["steps"], wanted)


def steps_of(record: Row, model: str) -> list[Row]:
    """All decode steps of a model."""
    return [step for step in record["sections"]["decode"]["steps"] if step["model"] == model]


def linear_times(record: Row, layer: str) -> dict[int, tuple[float, float, float]]:
    """Microseconds of INT4, full weights and PyTorch, by rows."""
    own = sorted(
        (case for case in _cases(record, "int4_linear") if case["layer"] == layer),
        key=lambda case: int(case["rows"]),
    )
    return {case["rows"]: (case["us"], case["full_linear"]["us"], case["torch"]["us"]) for case in own}


def order_costs(record: Row) -> dict[str, dict[str, dict[int, float]]]:
    """By layer with its weights, by what it is held against and by rows: our time over that of the other.

    Our sums go in one order for any number of rows. PyTorch's product is chosen by their number; so are, where they
    were searched for, tile and parts of our own kernel.
    """
    found: dict[str, dict[str, dict[int, float]]] = {}
    for kind in ("full", "int4"):
        for case in sorted(_cases(record, "int4_linear"), key=lambda each: int(each["rows"])):
            ours = case["us"] if kind == "int4" else case["full_linear"]["us"]
            against = {"PyTorch in bfloat16": case["torch"], "our kernel": case.get(f"{kind}_free", {})}
            name = f"{case['layer']}, {'INT4' if kind == 'int4' else 'full weights'}"
            for other, figures in against.items():
                if "us" in figures:
                    found.setdefault(name, {}).setdefault(other, {})[case["rows"]] = ours / figures["us"]
    return found


def linears_ms(record: Row, kind: str) -> float:
    """Milliseconds of all linears of the large model for one row: "int4", "full_linear" or "torch"."""
    blocks = 32
    block = sum(_linear_us(record, part, kind) for part in _PARTS)
    return (blocks * block + _linear_us(record, "head", kind)) / 1e3


def _linear_us(record: Row, part: str, kind: str) -> float:
    case = _only(_cases(record, "int4_linear"), {"layer": f"{LARGE} {part}", "rows": 1})
    return float(case["us"] if kind == "int4" else case[kind]["us"])


def attention_us(record: Row, kv: str, sequences: int, context: int) -> float:
    """Microseconds of one block's attention."""
    wanted = {"kv": kv, "sequences": sequences, "context": context}
    return float(_only(_cases(record, "paged_attention"), wanted)["us"])


def token_bytes(record: Row, kv: str) -> float:
    """Bytes that the keys and values of one token of the large model take."""
    long, short = (step_of(record, kv, kv, 16, context) for context in (4096, 512))
    return float((long["bytes"] - short["bytes"]) / (16 * (4096 - 512)))


def speed(record: Row, what: str, streams: int, model: str = "packaged") -> float:
    """Tokens per second of a model."""
    return float(speeds_of(record, model)[f"{what}, {streams} streams"]["tokens_per_s"])


def _machine(record: Row) -> Iterator[Sequence[str]]:
    found = record["sections"]["machine"]
    yield "command", f"`python -m scripts.gpu_check --seconds {record['seconds_given']:.0f}`"
    yield (
        "machine",
        f"{found['gpu']}, {found['multiprocessors']} multiprocessors, {found['memory_bytes'] / 1e9:.0f} GB",
    )
    versions = ", ".join(f"{name} {found[name]}" for name in _VERSIONS)
    yield "versions", f"Python {found['python']}, {versions}, CUDA {found['cuda']}"
    if "int4_group_size" in found:
        yield "INT4 weights", f"in groups of {found['int4_group_size']}"
    if found.get("commit"):
        yield "kernels", f"{found['kernels']}, of the commit {found['commit'][:12]}{_changed(found)}"
    yield "memory's rate", f"{memory_rate(record) / 1e12:.2f} TB/s, the fastest read of the run"
    yield "bfloat16 product of 8192 × 8192", f"{found['matmul_bf16_flop_per_s'] / 1e12:.0f} TFLOP/s"


def _changed(machine: Row) -> str:
    return " with changes" if machine.get("changed") else ""


def _targets(record: Row) -> Iterator[Sequence[str]]:
    rate = memory_rate(record)
    full, int4 = (step_of(record, each, each, 1, 512) for each in ("full", "int4"))
    one = f"one stream, {LARGE} shape, "
    for name, step, wanted in (("full", full, 0.8), ("INT4", int4, 0.6)):
        share = step["bytes_per_s"] / rate
        yield (
            f"{one}{name} weights: of the memory's rate",
            f"{share:.0%}",
            f"≥ {wanted:.0%}",
            _verdict(share, wanted),
        )
    yield _times(f"{one}INT4 against our own bfloat16", full["ms"] / int4["ms"], 2.3)
    yield from _sequences(record)
    for sequences in (1, 16, 64):
        ratio = attention_us(record, "full", sequences, 16384) / attention_us(
            record, "int4", sequences, 16384
        )
        yield _times(f"attention at 16k, batch of {sequences}, INT4 against full KV", ratio, 2.0)
    for model, called in MODELS.items():
        for variant in ("full/full", "int4/int4"):
            try:
                theirs = speed(record, "transformers generate_batch", 64, model)
                ratio = speed(record, f"engine {variant}", 64, model) / theirs
            except KeyError:  # one of them is not in this run
                continue
            yield _times(f"{called}, 64 streams, {variant} against `generate_batch`", ratio, 3.0)


def _sequences(record: Row) -> Iterator[Sequence[str]]:
    """Of each shape whose pages were counted; else of the large one by its decode steps."""
    shapes = {
        name: found
        for name, found in record["sections"].get("memory", {}).items()
        if isinstance(found, Mapping) and "sequences_in_the_same_memory" in found
    }
    for name, found in shapes.items():
        yield _times(
            f"sequences of {found['context']} tokens in the same memory, {name} shape, INT4 against full KV",
            found["sequences_in_the_same_memory"],
            found["wanted"],
        )
    if not shapes:
        ratio = token_bytes(record, "full") / token_bytes(record, "int4")
        yield _times(
            "sequences in the same memory, INT4 against full KV, by the bytes of a token", ratio, 3.5
        )


def _times(name: str, ratio: float, wanted: float) -> Sequence[str]:
    return name, f"{ratio:.2f}×", f"≥ {wanted}×", _verdict(ratio, wanted)


def _verdict(value: float, wanted: float) -> str:
    return "reached" if value >= wanted else f"missed: {value / wanted:.0%} of it"


def _steps(record: Row) -> Iterator[Sequence[str]]:
    rate = memory_rate(record)
    steps = record["sections"]["decode"]["steps"]
    for step in sorted(steps, key=_place):
        yield (
            f"{step['model']} {step['sequences']} × {step['context']}",
            f"{step['weights']}/{step['kv']}",
            f"{step['ms']:.2f}",
            f"{step['bytes_per_s'] / rate:.0%}",
            f"{step['tokens_per_s']:.0f}",
            f"{step['eager_ms']:.1f}",
        )


def _place(step: Row) -> tuple[bool, int, int, str, str]:
    """Where a step stands in its table."""
    return step["model"] != LARGE, step["context"], step["sequences"], step["weights"], step["kv"]


def _parts(record: Row) -> Iterator[Sequence[str]]:
    blocks = 32
    columns = []
    for kind, kv in (("full_linear", "full"), ("int4", "int4")):
        write = _only(_cases(record, "write_kv"), {"kv": kv, "tokens": 1})["us"]
        head = _linear_us(record, "head", kind) / 1e3
        parts = {
            "linears of all blocks": linears_ms(record, kind) - head,
            "output matrix": head,
            "attention": blocks * attention_us(record, kv, 1, 512) / 1e3,
            "writing keys and values": blocks * write / 1e3,
        }
        whole = step_of(record, kv, kv, 1, 512)["ms"]
        rest = {"norms and all else": whole - sum(parts.values()), "**whole step**": whole}
        columns.append(parts | rest)
    for name in columns[0]:
        yield name, *(f"{column[name]:.2f}" for column in columns)


def _linears(record: Row, rows: Sequence[int]) -> Iterator[Sequence[str]]:
    cases, rate = _cases(record, "int4_linear"), memory_rate(record)
    for layer in dict.fromkeys(case["layer"] for case in cases):
        found = [_only(cases, {"layer": layer, "rows": each}) for each in rows]
        first = _only(cases, {"layer": layer, "rows": 1})
        shares = (_share(each, rate) for each in (first, first["full_linear"], first["torch"]))
        times = (
            f"{case['us']:.1f} / {case['full_linear']['us']:.1f} / {case['torch']['us']:.1f}"
            for case in found
        )
        yield layer, " / ".join(shares), *times


def _share(figures: Row, rate: float) -> str:
    """Of the memory's rate; of buffers that the cache may hold that says nothing."""
    return "in the cache" if figures.get("cached") else f"{figures['bytes_per_s'] / rate:.0%}"


def _order_costs(record: Row) -> Iterator[Sequence[str]]:
    rows = sorted({case["rows"] for case in _cases(record, "int4_linear")})
    for layer, others in order_costs(record).items():
        for other, ratios in others.items():
            yield layer, other, *(f"{ratios[each]:.2f}" if each in ratios else "" for each in rows)


def _attention(record: Row) -> Iterator[Sequence[str]]:
    rate, cases = memory_rate(record), _cases(record, "paged_attention")
    full = [case for case in cases if case["kv"] == "full"]
    for case in sorted(full, key=lambda each: (each["context"], each["sequences"])):
        sizes = {"sequences": case["sequences"], "context": case["context"]}
        int4 = _only(cases, {**sizes, "kv": "int4"})
        three = (case, int4, case["sdpa"])
        times = (f"{each['us']:.1f} ({_share(each, rate)})" for each in three)
        yield f"{case['sequences']} × {case['context']}", *times, f"{case['us'] / int4['us']:.2f}"


def _other(case: Row) -> Sequence[str]:
    """A kernel that stands around products and attention; of gate and up also that of full weights."""
    rows = case.get("rows", case.get("tokens"))
    name = f"{_OTHERS[case['op']]}, {rows} row{'s' * (rows > 1)}"
    if "kv" in case:
        name += f", {'INT4' if case['kv'] == 'int4' else 'full'} pages"
    ours = f"{case['us']:.1f}"
    if "full" in case:
        name, ours = f"{name} / full", f"{ours} / {case['full']['us']:.1f}"
    return name, ours, f"{case['torch']['us']:.1f}" if "torch" in case else ""


def _checks(record: Row) -> Iterator[Sequence[str]]:
    for check in record["checks"]:
        result = "good" if check["good"] else "**failed**"
        yield check["name"], _compared(check), result


def _compared(check: Row) -> str:
    if "chosen_alike" in check:
        found = f"{check['tokens']} tokens, {check['chosen_alike']} the other's own choice"
        if check["worst_margin"]:
            found += f", worst {check['worst_margin']:.2g} below it (at most {check['tolerance']:.2g})"
        return found
    if "error" in check:
        return f"error {check['error']:.2%} of the norm (at most {check['tolerance']:.0%})"
    if "compared" in check:
        return f"{check['compared']} ways, {len(check['differ'])} differ"
    if "passed" in check:
        return f"{check['passed']} passed, {check['failed']} failed, {check['skipped']} skipped"
    return f"{check['tokens']} tokens" if "tokens" in check else ""


def _cases(record: Row, op: str) -> list[Row]:
    return [case for case in record["sections"]["kernels"]["cases"] if case["op"] == op and "us" in case]


def _inner(case: Row) -> Iterator[Row]:
    return (each for each in case.values() if isinstance(each, Mapping))


def _only(rows: Sequence[Row], wanted: Row) -> Row:
    """The row with these values. Raises ValueError where there is none, or more than one."""
    (found,) = [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]
    return found
