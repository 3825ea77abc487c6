"""What `make gpu-check` found of whole loads, as tables: tokens per second, what loads take of memory and of the host.

Of a record that lacks a section, or is older than what is told of it, the rows that it has.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from scripts.gpu_records import (
    Row,
    Table,
    called,
    exits_model,
    loads_in,
    models_of,
    section,
    speeds_of,
    streams_text,
)

_BATCH: Final = "transformers generate_batch"
_GENERATE: Final = "transformers generate, "
_FUNCTIONS: Final = 5
"""Of a tick's functions so many are shown; the JSON has more."""


def engine_tables(record: Row) -> Iterator[Table]:
    """Speeds by model."""
    for model, shown in models_of(record):
        speeds = speeds_of(record, model)
        streams = sorted({int(name.split(", ")[1].split()[0]) for name in speeds if ", " in name})
        rows = [
            (_named(name, speeds), *(_speed(name, speeds.get(f"{name}, {each} streams")) for each in streams))
            for name in _names(speeds)
        ]
        columns = (streams_text(each) for each in streams)
        yield Table((f"{shown}, tokens/s", *columns), rows, _gates(speeds))


def long_tables(record: Row) -> Iterator[Table]:
    """Speeds in long contexts by model, a column for each context: of the whole load, and from the last prompt on."""
    found = section(record, "long_contexts")
    by_model: dict[str, dict[str, Row]] = {}
    for name, speeds in loads_in(found).items():
        model, _, context = name.partition(", contexts of ")
        by_model.setdefault(model, {})[context] = speeds
    for model, loads in by_model.items():
        columns = [
            (context, int(streams))
            for context, speeds in loads.items()
            for streams in dict.fromkeys(re.findall(r", (\d+) streams$", "\n".join(speeds), re.MULTILINE))
        ]
        names = dict.fromkeys(name for speeds in loads.values() for name in _names(speeds))
        rows = [
            (
                _named(name, found),
                *(_both_speeds(loads[context].get(f"{name}, {each} streams")) for context, each in columns),
            )
            for name in names
        ]
        answers = sorted({speeds["answer"] for speeds in loads.values() if "answer" in speeds})
        tokens = f", of {' or '.join(map(str, answers))} new tokens each" if answers else ""
        said = f"Tokens/s of the whole load{tokens}; behind it those since the last prompt was read."
        headers = (
            f"{called(model)}, prompts of",
            *(f"{each}, {streams_text(count)}" for each, count in columns),
        )
        yield Table(headers, rows, f"{said} {_gates(found)}".strip())


def grid_tables(record: Row) -> Iterator[Table]:
    """Speeds of every number of streams, a table for each model and context: as `long_tables`."""
    found = section(record, "grid")
    for name, speeds in loads_in(found).items():
        model, _, context = name.partition(", contexts of ")
        counts = re.findall(r", (\d+) streams$", "\n".join(speeds), re.MULTILINE)
        streams = sorted({int(each) for each in counts})
        of_model = found.get(f"engine {model}", {})
        rows = [
            (
                _named(mode, of_model),
                *(_both_speeds(speeds.get(f"{mode}, {each} streams")) for each in streams),
            )
            for mode in _names(speeds)
        ]
        headers = (f"{called(model)}, prompts of {context}", *map(streams_text, streams))
        yield Table(headers, rows, _gates(of_model))


def _speed(name: str, cell: Row | None) -> str:
    if cell is None or "tokens_per_s" not in cell:
        return ""
    left = f" ({cell['exit_rate']:.0%} leave)" if "at 0.5" in name else ""
    return f"{cell['tokens_per_s']:.0f}{left}"


def _both_speeds(cell: Row | None) -> str:
    if cell is None or "tokens_per_s" not in cell:
        return ""
    decoding = f" / {cell['decode_tokens_per_s']:.0f}" if "decode_tokens_per_s" in cell else ""
    left = f" ({cell['exit_rate']:.0%} leave)" if cell.get("exit_rate") else ""
    return f"{cell['tokens_per_s']:.0f}{decoding}{left}"


def _gates(found: Row) -> str:
    """Of what kind the exits are, where the record tells; older ones say behind a colon what was hoped for."""
    return f"Exits: {found['gates'].partition(':')[0]}." if "gates" in found else ""


def _names(speeds: Row) -> Iterator[str]:
    """What ran in one of the loads."""
    for name in dict.fromkeys(name.split(", ")[0] for name in speeds if ", " in name):
        if any("tokens_per_s" in found for each, found in speeds.items() if each.split(", ")[0] == name):
            yield name


def _named(name: str, speeds: Row) -> str:
    """A random model's exit is synthetic, and says so."""
    shown = name.replace("transformers ", "`transformers` ")
    shown = shown.replace("at 0.5", "at the threshold 0.5, approximate")
    wanted = speeds.get("wanted_exit_rate")
    if wanted is not None and "at 0.5" in name:
        shown = shown.replace("(synthetic)", f"(synthetic, {wanted:.0%} are to leave)")
    return shown


def _loads(record: Row) -> Iterator[tuple[str, Row]]:
    """What was timed, by what it is called: of each model, in long contexts, by how rows wait at exits."""
    for model, shown in models_of(record):
        yield shown, speeds_of(record, model)
    for name, found in loads_in(section(record, "long_contexts")).items():
        model, _, context = name.partition(", ")
        yield f"{called(model)}, {context}", found
    for name, found in loads_in(section(record, "exits")).items():
        yield f"{exits_model(record)}, {name}", found


def transformers_tables(record: Row) -> Iterator[Table]:
    """How `generate_batch` ran, and what of `generate` is its own."""
    columns = ("tokens/s", "attention", "CUDA graphs", "batches prepared ahead")
    yield Table(("`generate_batch`", *columns), list(_batches(record)))
    headers = ("of `generate`", "of forward passes alone", "share of the host's `generate`")
    yield Table(("`transformers`, tokens/s", *headers), list(_loops(record)))


def _batches(record: Row) -> Iterator[Sequence[str]]:
    """Both tries of `generate_batch`, the one that is compared marked."""
    for shown, speeds in _loads(record):
        for name, found in speeds.items():
            if not name.startswith(_BATCH) or "tries" not in found:
                continue
            for kind, each in found["tries"].items():
                chosen = " (compared)" if kind == found["chosen"] else ""
                said = (each.get(key) for key in ("attention", "use_cuda_graph", "use_async_batching"))
                speed = f"{each['tokens_per_s']:.0f}" if "tokens_per_s" in each else each["error"]
                cells = (speed, *map(_told, said))
                yield f"{shown}, {kind}{chosen}", *(cell.replace("|", "\\|") for cell in cells)


def _told(value: object) -> str:
    """What a manager decided on: of graphs, for steps of mixed lengths and for decoding."""
    if isinstance(value, list):
        return " / ".join(map(_told, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "not told" if value is None else str(value)


def _loops(record: Row) -> Iterator[Sequence[str]]:
    """`generate` beside the forward passes that it makes."""
    for shown, speeds in _loads(record):
        for name, found in speeds.items():
            loop = found.get("forward_loop", {}) if isinstance(found, Mapping) else {}
            if name.startswith(_GENERATE) and "seconds" in loop and "seconds" in found:
                own = 1 - loop["seconds"] / found["seconds"]
                yield (
                    f"{shown}, {streams_text(int(name.removeprefix(_GENERATE).split()[0]))}",
                    f"{found['tokens_per_s']:.0f}",
                    f"{loop['tokens_per_s']:.0f}",
                    f"{own:.0%}",
                )


def memory_tables(record: Row) -> Iterator[Table]:
    """What loads take of memory: of each mode the one with the most streams."""
    columns = ("KV of a sequence, MB", "by the layout of its pages, MB", "the device's at most, GB")
    yield Table(("memory of a load, measured", *columns), list(_memory(record)))


def _memory(record: Row) -> Iterator[Sequence[str]]:
    told = {"kv_bytes_per_sequence", "device_bytes_at_most"}
    for shown, speeds in _loads(record):
        most: dict[str, int] = {}
        for name, found in speeds.items():
            mode, _, streams = name.rpartition(", ")
            if isinstance(found, Mapping) and found.keys() & told:
                most[mode] = max(most.get(mode, 0), int(streams.split()[0]))
        for mode, count in most.items():
            found = speeds[f"{mode}, {count} streams"]
            sizes = (found.get(key) for key in ("kv_bytes_per_sequence", "kv_bytes_by_layout"))
            device = found.get("device_bytes_at_most")
            yield (
                f"{shown}, {mode}, {streams_text(count)}",
                *("" if size is None else f"{size / 1e6:.3g}" for size in sizes),
                "" if device is None else f"{device / 1e9:.2f}",
            )


def host_tables(record: Row) -> Iterator[Table]:
    """Where the engine's thread spends a tick of the packaged model."""
    rows = [
        (name, f"{found['us']:.0f}", ", ".join(_longest(found["functions"])))
        for name, found in section(record, "host").items()
        if isinstance(found, Mapping) and "functions" in found
    ]
    yield Table(("the engine's thread, packaged model", "µs of a tick (watched)", "of it in, µs"), rows)


def _longest(functions: Mapping[str, float]) -> Iterator[str]:
    for name, microseconds in list(functions.items())[:_FUNCTIONS]:
        yield f"`{name.rpartition(': ')[2]}` {microseconds:.0f}"
