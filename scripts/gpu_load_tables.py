"""What `make gpu-check` found of whole loads, as headers and rows: tokens per second, and what loads take of memory.

Of a record that lacks a section, or is older than what is told of it, the tables that it has.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

Row = Mapping[str, Any]
Table = tuple[Sequence[str], Iterator[Sequence[str]]]

LARGE: Final = "mistral-7b"
MODELS: Final = {
    "packaged": "packaged model",
    LARGE: f"{LARGE} shape",
    "llama-1.1b": "llama-1.1b shape",
}
_BATCH: Final = "transformers generate_batch"
_GENERATE: Final = "transformers generate, "


def load_tables(record: Row) -> Iterator[Table]:
    """Speeds by model, those in long contexts, how transformers ran, and what loads take of memory."""
    for called, speeds in _loads(record):
        streams = _streams(speeds)
        columns = tuple(f"{each} stream{'s' * (each > 1)}" for each in streams)
        yield (f"{called}, tokens/s", *columns), _engine(speeds, streams)
    if rows := list(_batches(record)):
        columns = ("tokens/s", "attention", "CUDA graphs", "batches prepared ahead")
        yield ("`generate_batch`", *columns), iter(rows)
    if rows := list(_loops(record)):
        columns = ("of `generate`", "of forward passes alone", "share of the host's `generate`")
        yield ("`transformers`, tokens/s", *columns), iter(rows)
    if rows := list(_memory(record)):
        columns = ("KV of a sequence, MB", "by the layout of its pages, MB", "the device's at most, GB")
        yield ("memory of a load, measured", *columns), iter(rows)


def speeds_of(record: Row, model: str) -> Row:
    """All that was timed of a model's texts, by name and streams; compiled `generate` is a section of its own."""
    sections = record["sections"]
    both = (sections.get(name, {}).get(model, {}) for name in ("end_to_end", "compiled"))
    return {name: found for each in both for name, found in each.items()}


def _loads(record: Row) -> Iterator[tuple[str, Row]]:
    """What was timed, by what it is called: of each model, then in long contexts."""
    for model, called in MODELS.items():
        if speeds := speeds_of(record, model):
            yield called, speeds
    for name, found in record["sections"].get("long_contexts", {}).items():
        if isinstance(found, Mapping) and "prompt" in found:
            model = name.partition(",")[0]
            called = MODELS.get(model, model)
            yield f"{called}, prompts of {found['prompt']} tokens, {found['answer']} new ones", found


def _batches(record: Row) -> Iterator[Sequence[str]]:
    """Both tries of `generate_batch`, the one that is compared marked."""
    for called, speeds in _loads(record):
        for name, found in speeds.items():
            if not name.startswith(_BATCH) or "tries" not in found:
                continue
            for kind, each in found["tries"].items():
                chosen = " (compared)" if kind == found["chosen"] else ""
                said = (each.get(key) for key in ("attention", "use_cuda_graph", "use_async_batching"))
                speed = f"{each['tokens_per_s']:.0f}" if "tokens_per_s" in each else each["error"]
                yield f"{called}, {kind}{chosen}", speed, *map(_told, said)


def _told(value: object) -> str:
    """What a manager decided on: of graphs, for steps of mixed lengths and for decoding."""
    if isinstance(value, list):
        return " / ".join(map(_told, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "not told" if value is None else str(value)


def _loops(record: Row) -> Iterator[Sequence[str]]:
    """`generate` beside the forward passes that it makes."""
    for called, speeds in _loads(record):
        for name, found in speeds.items():
            loop = found.get("forward_loop", {}) if isinstance(found, Mapping) else {}
            if name.startswith(_GENERATE) and "seconds" in loop and "seconds" in found:
                own = 1 - loop["seconds"] / found["seconds"]
                yield (
                    f"{called}, {name.removeprefix(_GENERATE)}",
                    f"{found['tokens_per_s']:.0f}",
                    f"{loop['tokens_per_s']:.0f}",
                    f"{own:.0%}",
                )


def _memory(record: Row) -> Iterator[Sequence[str]]:
    for called, speeds in _loads(record):
        for name, found in speeds.items():
            if not isinstance(found, Mapping) or not found.keys() & {
                "kv_bytes_per_sequence",
                "device_bytes_at_most",
            }:
                continue
            sizes = (found.get(key) for key in ("kv_bytes_per_sequence", "kv_bytes_by_layout"))
            device = found.get("device_bytes_at_most")
            yield (
                f"{called}, {name}",
                *("" if size is None else f"{size / 1e6:.1f}" for size in sizes),
                "" if device is None else f"{device / 1e9:.2f}",
            )


def _streams(found: Row) -> list[int]:
    return sorted({int(name.split(", ")[1].split()[0]) for name in found if ", " in name})


def _engine(found: Row, streams: Sequence[int]) -> Iterator[Sequence[str]]:
    wanted = found.get("wanted_exit_rate")
    for name in dict.fromkeys(name.split(", ")[0] for name in found if ", " in name):
        cells = [found.get(f"{name}, {each} streams", {}) for each in streams]
        if not any("tokens_per_s" in cell for cell in cells):
            continue
        shown = name.replace("transformers ", "`transformers` ").replace(
            "at 0.5", "at the threshold 0.5, approximate"
        )  # a random model's exit is synthetic, and says so
        if wanted is not None and "at 0.5" in name:
            shown = shown.replace("(synthetic)", f"(synthetic, {wanted:.0%} are to leave)")
        yield shown, *(_speed(cell, leave="at 0.5" in name) for cell in cells)


def _speed(cell: Row, *, leave: bool) -> str:
    if "tokens_per_s" not in cell:
        return ""
    left = f" ({cell['exit_rate']:.0%} leave)" if leave else ""
    return f"{cell['tokens_per_s']:.0f}{left}"
