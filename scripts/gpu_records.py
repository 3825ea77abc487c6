"""The records that `make gpu-check` leaves in benchmarks/results, one per kind of GPU, and single figures out of them.

A record has what its run had time and room for: whatever is asked of one may not be there, and is None then.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

Row = Mapping[str, Any]

ROOT: Final = Path(__file__).resolve().parents[1]
RESULTS: Final = ROOT / "benchmarks" / "results"
LARGE: Final = "mistral-7b"
LARGE_BLOCKS: Final = 32
LARGE_LAYER: Final = f"{LARGE} gate_up"
MODELS: Final = {
    "packaged": "packaged model",
    LARGE: f"{LARGE} shape",
    "llama-1.1b": "llama-1.1b shape",
}
PARTS: Final = ("gate_up", "out", "down", "qkv")
"""A block's linears."""


@dataclass(frozen=True, slots=True)
class Table:
    """What a table shows; its caption, if any, stands in front of it."""

    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""


def gpu_records(folder: Path = RESULTS) -> dict[str, Row]:
    """The records of whole runs by their files' names without ending, toy runs of the script left out."""
    found = {
        path.stem: json.loads(path.read_text("utf-8")) for path in sorted(folder.glob("gpu-check-*.json"))
    }
    return {name: record for name, record in found.items() if "." not in name and not record.get("quick")}


def gpu_name(record: Row) -> str:
    """The GPU's own name, else the device's."""
    machine = section(record, "machine")
    return str(machine.get("gpu") or machine.get("device") or "unknown device")


def section(record: Row, name: str) -> Row:
    """What a section found; empty where it was not run."""
    found: Row = record["sections"].get(name, {})
    return found


def cases(record: Row, op: str) -> list[Row]:
    """The timed cases of a kernel."""
    return [case for case in section(record, "kernels").get("cases", ()) if case["op"] == op and "us" in case]


def only(rows: Sequence[Row], wanted: Row) -> Row | None:
    """The first row with these values."""
    found = (row for row in rows if all(row.get(key) == value for key, value in wanted.items()))
    return next(found, None)


def memory_rate(record: Row) -> float | None:
    """Bytes per second of the kernel that read memory the fastest in the run.

    Of kernels whose data no cache holds: small ones may be read faster than memory is.
    """
    machine = section(record, "machine")
    found = [machine[key] for key in ("copy_bytes_per_s", "read_bytes_per_s") if key in machine]
    for case in (case for op in ("int4_linear", "paged_attention") for case in cases(record, op)):
        all_of_it = (case, *(each for each in case.values() if isinstance(each, Mapping)))
        found += [
            each["bytes_per_s"] for each in all_of_it if "bytes_per_s" in each and not each.get("cached")
        ]
    return max(map(float, found), default=None)


def copy_rate(record: Row) -> float | None:
    """Bytes per second that a kernel which reads and writes moves."""
    found = section(record, "machine").get("copy_bytes_per_s")
    return None if found is None else float(found)


def steps_of(record: Row, model: str) -> list[Row]:
    """All decode steps of a model."""
    return [step for step in section(record, "decode").get("steps", ()) if step["model"] == model]


def step_of(
    record: Row, weights: str, kv: str, sequences: int, context: int, model: str = LARGE
) -> Row | None:
    """One decode step."""
    wanted = {"weights": weights, "kv": kv, "sequences": sequences, "context": context}
    return only(steps_of(record, model), wanted)


def linear_times(record: Row, layer: str) -> dict[int, tuple[float, float, float]]:
    """Microseconds of INT4, full weights and PyTorch, by rows."""
    own = sorted(
        (case for case in cases(record, "int4_linear") if case["layer"] == layer),
        key=lambda case: int(case["rows"]),
    )
    return {case["rows"]: (case["us"], case["full_linear"]["us"], case["torch"]["us"]) for case in own}


def linear_us(record: Row, part: str, kind: str) -> float | None:
    """Microseconds of a linear of the large model for one row: "int4", "full_linear" or "torch"."""
    case = only(cases(record, "int4_linear"), {"layer": f"{LARGE} {part}", "rows": 1})
    return None if case is None else float(case["us"] if kind == "int4" else case[kind]["us"])


def linears_ms(record: Row, kind: str) -> float | None:
    """Milliseconds of all linears of the large model for one row."""
    block = [linear_us(record, part, kind) for part in PARTS]
    head = linear_us(record, "head", kind)
    if head is None or None in block:
        return None
    return (LARGE_BLOCKS * sum(each for each in block if each is not None) + head) / 1e3


def attention_us(record: Row, kv: str, sequences: int, context: int) -> float | None:
    """Microseconds of one block's attention."""
    wanted = {"kv": kv, "sequences": sequences, "context": context}
    case = only(cases(record, "paged_attention"), wanted)
    return None if case is None else float(case["us"])


def speeds_of(record: Row, model: str) -> Row:
    """All that was timed of a model's texts, by name and streams; compiled `generate` is a section of its own."""
    both = (section(record, name).get(model, {}) for name in ("end_to_end", "compiled"))
    return {name: found for each in both for name, found in each.items()}


def speed(record: Row, what: str, streams: int, model: str = "packaged") -> float | None:
    """Tokens per second of a model."""
    found = speeds_of(record, model).get(f"{what}, {streams} streams", {}).get("tokens_per_s")
    return None if found is None else float(found)


def models_of(record: Row) -> Iterator[tuple[str, str]]:
    """Models whose texts were timed, and what they are called, the known ones first."""
    timed = [name for each in ("end_to_end", "compiled") for name in loads_in(section(record, each))]
    for name in sorted(dict.fromkeys(timed), key=lambda name: [*MODELS, name].index(name)):
        yield name, called(name)


def called(model: str) -> str:
    """A model as tables call it."""
    return MODELS.get(model, f"{model} shape")


def streams_text(count: int) -> str:
    """A number of streams as tables call it."""
    return f"{count} stream{'s' * (count > 1)}"


def exits_model(record: Row) -> str:
    """What the section of exits runs: the large shape, or where the script itself is tried a toy."""
    return called("toy" if record.get("quick") else LARGE)


def loads_in(found: Row) -> dict[str, Row]:
    """By name what of a section holds speeds."""
    loads = {name: each for name, each in found.items() if isinstance(each, Mapping)}
    return {name: each for name, each in loads.items() if any(map(_is_timed, each.values()))}


def _is_timed(found: object) -> bool:
    return isinstance(found, Mapping) and bool({"tokens_per_s", "error"} & found.keys())
