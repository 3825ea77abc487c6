"""What `make gpu-check` found of exits: each load with exits on beside the same with exits off."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final, TypeGuard

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

_ON: Final = re.compile(r"engine (\S+) (verified|exits at 0\.5|backfilled exits at 0\.5)(?: \(synthetic\))?")
_BY_NAME: Final = re.compile(r"engine (propagate|backfill)")
_STREAMS: Final = re.compile(r"(.*), (\d+) streams")
_PLACE: Final = re.compile(r"after block (\d+) of (\d+)")
_MODES: Final = {"exits at 0.5": "propagate", "backfilled exits at 0.5": "backfill"}


@dataclass(frozen=True, slots=True)
class ExitLoad:
    """A load with exits and the same without; `mode` is "verified", "propagate" or "backfill"."""

    load: str
    variant: str
    mode: str
    streams: int
    on: Row
    off: Row
    gates: str

    @property
    def name(self) -> str:
        """The load with its streams and variant."""
        return f"{self.load}, {streams_text(self.streams)}, {self.variant}"

    @property
    def ratio(self) -> float:
        """The speed with exits over that without, prompts included."""
        return float(self.on["tokens_per_s"] / self.off["tokens_per_s"])

    @property
    def decode_ratio(self) -> float:
        """The same from the moment on at which the last prompt was read."""
        return float(self.on["decode_tokens_per_s"] / self.off["decode_tokens_per_s"])

    @property
    def skipped_alone(self) -> float | None:
        """What the skipped blocks alone would give; None where the record does not tell how many are skipped.

        With backfill they are computed later, and of several exits a record has the rate of all together.
        """
        place = _PLACE.search(self.gates)
        if self.mode != "propagate" or place is None:
            return None
        last, blocks = int(place[1]), int(place[2])
        return float(1 / (1 - self.on["exit_rate"] * (blocks - 1 - last) / blocks))


def exit_loads(record: Row) -> Iterator[ExitLoad]:
    """Every load that was timed with exits on and off: of each model, in long contexts, by how rows wait."""
    for model, shown in models_of(record):
        yield from _of(shown, speeds_of(record, model), "")
    for name, found in loads_in(section(record, "long_contexts")).items():
        model, _, context = name.partition(", ")
        yield from _of(f"{called(model)}, {context}", found, "")
    exits = section(record, "exits")
    for name, found in loads_in(exits).items():
        yield from _of(f"{exits_model(record)}, {name}", found, str(exits.get("gates", "")))


def _of(load: str, found: Row, gates: str) -> Iterator[ExitLoad]:
    gates = str(found.get("gates", gates))
    for name, on in found.items():
        parts = _STREAMS.fullmatch(name)
        if parts is None or not _has_speed(on):
            continue
        if named := _ON.fullmatch(parts[1]):
            variant, mode, off = named[1], _MODES.get(named[2], named[2]), f"engine {named[1]}"
        elif named := _BY_NAME.fullmatch(parts[1]):
            variant, mode, off = "int4/int4", named[1], "engine off"
        else:
            continue
        without = found.get(f"{off}, {parts[2]} streams")
        if _has_speed(without):
            yield ExitLoad(load, variant, mode, int(parts[2]), on, without, gates)


def _has_speed(found: object) -> TypeGuard[Row]:
    return isinstance(found, Mapping) and "tokens_per_s" in found and "decode_tokens_per_s" in found


def exit_tables(record: Row) -> Iterator[Table]:
    """One table of all of them."""
    found = list(exit_loads(record))
    places = list(dict.fromkeys((load.load, load.variant) for load in found))
    loads = sorted(
        found,
        key=lambda load: (load.mode != "verified", places.index((load.load, load.variant)), load.streams),
    )
    headers = (
        *("exits against off", "tokens/s", "off", "ratio", "while decoding"),
        *("leave", "skipped blocks alone would give", "drafts a token", "right"),
    )
    yield Table(headers, [(f"{load.name}, {_mode(load)}", *_cells(load)) for load in loads])


def _mode(load: ExitLoad) -> str:
    synthetic = " (synthetic)" * load.gates.startswith("synthetic")
    return f"{load.mode}{synthetic}" if load.mode == "verified" else f"{load.mode} at 0.5{synthetic}"


def _cells(load: ExitLoad) -> tuple[str, ...]:
    on, verified, alone = load.on, load.mode == "verified", load.skipped_alone
    tokens = on["tokens_per_s"] * on["seconds"]
    return (
        f"{on['tokens_per_s']:.0f}",
        f"{load.off['tokens_per_s']:.0f}",
        f"{load.ratio:.2f}",
        f"{load.decode_ratio:.2f}",
        "" if verified else f"{on['exit_rate']:.0%}",
        "" if alone is None else f"{alone:.2f}",
        f"{on['drafts'] / tokens:.2f}" if verified else "",
        f"{on['drafts_accepted'] / on['drafts']:.0%}" if verified and on["drafts"] else "",
    )
