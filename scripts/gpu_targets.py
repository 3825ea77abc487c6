"""What is wanted of a GPU beside what a run of `make gpu-check` measured: only what its record can say."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from scripts.gpu_exit_tables import exit_loads
from scripts.gpu_records import (
    LARGE,
    Row,
    attention_us,
    called,
    copy_rate,
    memory_rate,
    models_of,
    section,
    speed,
    step_of,
)

_BATCH: Final = 16
"""The batch whose approximate exits have a target."""
_LONG: Final = 16384


def targets(record: Row) -> Iterator[Sequence[str]]:
    """Rows of what was measured, what was wanted, and the verdict."""
    yield from _one_stream(record)
    yield from _sequences(record)
    for sequences in (1, 16, 64):
        full, int4 = (attention_us(record, kv, sequences, _LONG) for kv in ("full", "int4"))
        if full is not None and int4 is not None:
            yield _times(f"attention at 16k, batch of {sequences}, INT4 against full KV", full / int4, 2.0)
    for model, shown in models_of(record):
        for variant in ("full/full", "int4/int4"):
            theirs = speed(record, "transformers generate_batch", 64, model)
            ours = speed(record, f"engine {variant}", 64, model)
            if ours is not None and theirs is not None:
                yield _times(f"{shown}, 64 streams, {variant} against `generate_batch`", ours / theirs, 3.0)
    yield from _verified(record)
    yield from _approximate(record)


def _one_stream(record: Row) -> Iterator[Sequence[str]]:
    """The floor is at the rate of a copy; beside it stands the share of the fastest read."""
    one = f"one stream, {LARGE} shape, "
    steps = {kind: step_of(record, kind, kind, 1, 512) for kind in ("full", "int4")}
    copy, read = copy_rate(record), memory_rate(record)
    for kind, name, wanted in (("full", "full", 0.8), ("int4", "INT4", 0.6)):
        step = steps[kind]
        if step is None or copy is None or read is None:
            continue
        share = step["bytes_per_s"] / copy
        yield (
            f"{one}{name} weights: of a copy's rate (of the fastest read's)",
            f"{share:.0%} ({step['bytes_per_s'] / read:.0%})",
            f"≥ {wanted:.0%}",
            _verdict(share, wanted),
        )
    if steps["full"] is not None and steps["int4"] is not None:
        yield _times(f"{one}INT4 against our own bfloat16", steps["full"]["ms"] / steps["int4"]["ms"], 2.3)


def _sequences(record: Row) -> Iterator[Sequence[str]]:
    """Of each shape whose pages were counted; else of the large one by its decode steps."""
    shapes = counted_shapes(record)
    for name, found in shapes.items():
        yield _times(
            f"sequences of {found['context']} tokens in the same memory, {called(name)}, INT4 against full KV",
            found["sequences_in_the_same_memory"],
            found["wanted"],
        )
    full, int4 = (_token_bytes(record, kv) for kv in ("full", "int4"))
    if not shapes and full is not None and int4 is not None:
        name = "sequences in the same memory, INT4 against full KV, by the bytes of a token"
        yield _times(name, full / int4, 3.5)


def counted_shapes(record: Row) -> dict[str, Row]:
    """Shapes whose keys and values were counted, by name."""
    return {
        name: found
        for name, found in section(record, "memory").items()
        if isinstance(found, Mapping) and "sequences_in_the_same_memory" in found
    }


def _token_bytes(record: Row, kv: str) -> float | None:
    """Bytes that the keys and values of one token of the large model take."""
    long, short = (step_of(record, kv, kv, 16, context) for context in (4096, 512))
    if long is None or short is None:
        return None
    return float((long["bytes"] - short["bytes"]) / (16 * (4096 - 512)))


def _verified(record: Row) -> Iterator[Sequence[str]]:
    """Of exits that a calibration made, one stream. What its costs predict takes a bundle's report, not a record."""
    for load in exit_loads(record):
        if load.mode == "verified" and load.streams == 1 and load.gates == "calibrated":
            name, *rest, verdict = _times(f"verified exits, {load.name} against exits off", load.ratio, 1.3)
            if load.ratio < 1.3:
                verdict += "; that or 90% of what its costs predict, which the record does not have"
            yield name, *rest, verdict


def _approximate(record: Row) -> Iterator[Sequence[str]]:
    """Of an exit whose place the record tells, while decoding: prompts skip nothing."""
    for load in exit_loads(record):
        if load.mode == "propagate" and load.streams == _BATCH and load.skipped_alone is not None:
            share = load.decode_ratio / load.skipped_alone
            yield (
                f"approximate exits, {load.name}, while decoding: of what the skipped blocks would give",
                f"{share:.0%}",
                "≥ 90%",
                _verdict(share, 0.9),
            )


def _times(name: str, ratio: float, wanted: float) -> tuple[str, str, str, str]:
    return name, f"{ratio:.2f}×", f"≥ {wanted}×", _verdict(ratio, wanted)


def _verdict(value: float, wanted: float) -> str:
    return "reached" if value >= wanted else f"missed: {value / wanted:.0%} of it"
