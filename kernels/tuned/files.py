"""Measured launches as files: one per kind of GPU in this package, or, of a kind that has none, in the user's cache.

A file is JSON: the format's version, the GPU's name, with what and when it was measured, and a line per launch. Its
`tile` is [rows, outputs, stages, warps], or null where nothing was faster than the rule. What was measured here for a
GPU of another name, or by another release's format, is not used: a file is taken whole or, with a warning, not at all.

Other kernels, or another compiler, may be fastest with other launches; the bits are the same. So a file of the package
says of which it was measured (`triton`, and `kernels`, a digest of their sources), and where it was of others, what the
cache holds comes before it: that is of these kernels and this compiler by its name.
"""

import hashlib
import json
import logging
import os
import re
import secrets
import time
from collections.abc import Iterable
from dataclasses import astuple, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

import torch

from exeunt.kernels.linear_tiles import Tile
from exeunt.kernels.native.build import cache_folder
from exeunt.kernels.tuned.launches import DTYPES, MEASURED_ROWS, Key, Launches, LaunchKey, TunedLaunch

FORMAT: Final = 2
PACKAGED: Final = Path(__file__).parent
_KERNELS: Final = (
    "int4_linear/triton.py",
    "int4_linear/ordered_triton.py",
    "full_linear/triton.py",
    "linear_parts.py",
    "linear_rule.py",
    "codes_triton.py",
    "arithmetic_triton.py",
)
"""The sources by which a measurement is of these kernels: another version's may not even fit the GPU."""
_MADE_FOR: Final = ("triton", "kernels")
"""What is measured of: where one of these differs, other launches may be the fastest."""
_WARPS: Final = {"int4": (1, 2, 4, 8), "full": (2, 4, 8)}
_SIZES: Final = (8, 16, 32, 64, 128, 256)
_MOST_STAGES: Final = 8

_log = logging.getLogger(__name__)


class LaunchFileError(ValueError):
    """A file that holds no measured launches of this GPU; the message says why."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What was measured of one call: its fastest launch (None: the rule's), seconds with it and by the rule."""

    key: LaunchKey
    launch: TunedLaunch | None
    seconds: float
    rule_seconds: float

    @property
    def speed_up(self) -> float:
        """How many times as fast as by the rule."""
        return self.rule_seconds / self.seconds


def slug(gpu: str) -> str:
    """The GPU's name as a file's: "NVIDIA H200" is nvidia-h200."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")


def packaged_file(gpu: str) -> Path:
    """Where this package has the launches of a kind of GPU, if it has."""
    return PACKAGED / f"{slug(gpu)}.json"


def cached_file(gpu: str) -> Path:
    """Where this user's cache has them, for these kernels under this compiler, if it has."""
    made_for = f"{_version('triton')} {kernels_digest()}"
    digest = hashlib.sha256(made_for.encode()).hexdigest()
    return cache_folder().parent / "tuned" / f"{slug(gpu)}-{digest[:12]}.json"


def kernels_digest() -> str:
    """The kernels whose launches are measured here, by their sources."""
    digest = hashlib.sha256()
    for name in _KERNELS:
        digest.update((PACKAGED.parent / name).read_bytes())
    return digest.hexdigest()[:12]


def read_known(gpu: str) -> Launches:
    """The package's launches for a kind of GPU and the cache's for other calls; a warning of each file that is no good.

    Where the package's are of other kernels or of another compiler, the cache's come first.
    """
    packaged, cached = (_good(path, gpu) for path in (packaged_file(gpu), cached_file(gpu)))
    if packaged is None:
        return {} if cached is None else cached.launches
    others = [f"{name} {told}" for name, told in _others(packaged.measured)]
    if others:
        _log.debug(
            "The launches in %s were measured with %s: another search may find faster ones.",
            packaged_file(gpu),
            " and ".join(others),
        )
    kept = {} if cached is None else cached.launches
    return {**packaged.launches, **kept} if others else {**kept, **packaged.launches}


def measured_calls(gpu: str) -> frozenset[Key]:
    """The calls whose launches were measured on that kind of GPU with these kernels and this compiler.

    Where some lines of the package's file are of others, none of it counts: which they are does not stand there.
    """
    packaged, cached = (_there(path, gpu) for path in (packaged_file(gpu), cached_file(gpu)))
    calls = frozenset() if cached is None else frozenset(cached.launches)
    return calls if packaged is None or _others(packaged.measured) else calls | packaged.launches.keys()


def read_launches(path: Path, gpu: str) -> Launches:
    """The launches in a file. Raises LaunchFileError where they are another GPU's or malformed, and OSError."""
    return _read(path, gpu).launches


@dataclass(frozen=True, slots=True)
class _File:
    """A good file: its launches and their lines in one order, and what those were measured with, the last first."""

    launches: Launches
    lines: list[dict[str, Any]]
    measured: list[dict[str, Any]]


def _good(path: Path, gpu: str) -> _File | None:
    """A file that is there and good; a warning where it is there and not good."""
    try:
        return _read(path, gpu)
    except FileNotFoundError:
        return None
    except (OSError, LaunchFileError) as error:
        _log.warning("The measured launches in %s are not used: %s.", path, error)
        return None


def _others(measured: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """In what a file was measured with something else than what is here, and what that was."""
    here = _made_for()
    told = [(name, each[name]) for each in measured for name in _MADE_FOR if each[name] != here[name]]
    return list(dict.fromkeys(told))


def _made_for() -> dict[str, str]:
    return {"triton": _version("triton"), "kernels": kernels_digest()}


def _read(path: Path, gpu: str) -> _File:
    """A file. Raises as `read_launches`."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise LaunchFileError(f"it is no JSON ({error})") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise LaunchFileError(f"it is not of format {FORMAT}")
    if found.get("gpu") != gpu:
        raise LaunchFileError(f"it is of {found.get('gpu')!r}, this GPU is {gpu!r}")
    if not isinstance(found.get("launches"), list):
        raise LaunchFileError("it has no list of launches")
    launches: dict[Key, TunedLaunch | None] = dict(map(_launch, found["launches"]))
    if len(launches) < len(found["launches"]):
        raise LaunchFileError("it has two lines about one call")
    return _File(launches, found["launches"], _measured(found))


def _measured(found: dict[str, Any]) -> list[dict[str, Any]]:
    """What a file says that its lines were measured with. Raises LaunchFileError."""
    earlier = found.get("earlier", [])
    if not isinstance(earlier, list):
        raise LaunchFileError("what was measured earlier is no list")
    measured = [found.get("measured"), *earlier]
    if not all(
        isinstance(each, dict) and all(isinstance(each.get(n), str) for n in _MADE_FOR) for each in measured
    ):
        raise LaunchFileError("it does not say which kernels were measured with which Triton")
    return measured


def write_launches(path: Path, gpu: str, findings: Iterable[Finding], *, add: bool = False) -> None:
    """Write what was measured now, whole or not at all; `add` keeps what a good file there says of other calls.

    What was `measured` of other kernels or with another compiler is told beside, as `earlier`. Raises OSError.
    """
    entries: dict[Key, dict[str, Any]] = {finding.key: entry_of(finding) for finding in findings}
    made = {name: _version(name) for name in ("exeunt", "torch")} | _made_for()
    head = {"format": FORMAT, "gpu": gpu, "measured": {"date": time.strftime("%Y-%m-%d"), **made}}
    there = _there(path, gpu) if add else None
    if there is not None:
        kept = {
            key: line for key, line in zip(there.launches, there.lines, strict=True) if key not in entries
        }
        earlier = [each for each in there.measured if any(each[name] != made[name] for name in _MADE_FOR)]
        head |= {"earlier": earlier} if kept and earlier else {}
        entries |= kept
    ordered = sorted(entries.items(), key=lambda item: (not item[0][0], str(item[0][1]), *item[0][2:]))
    lines = ",\n".join(f"  {json.dumps(entry)}" for _, entry in ordered)
    text = json.dumps(head, indent=1).removesuffix("\n}") + f',\n "launches": [\n{lines}\n ]\n}}\n'
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def _there(path: Path, gpu: str) -> _File | None:
    """A file that is there and good; no warning of one that is not."""
    try:
        return _read(path, gpu)
    except (OSError, LaunchFileError):
        return None


def entry_of(finding: Finding) -> dict[str, Any]:
    """A file's line of a finding: times in microseconds."""
    key, launch = finding.key, finding.launch
    return {
        "format": "int4" if key.int4 else "full",
        "dtype": str(key.dtype).removeprefix("torch."),
        "in_features": key.in_features,
        "outputs": key.outputs,
        "gated": key.gated,
        "group_size": key.group_size,
        "rows": key.rows,
        "tile": None if launch is None else list(astuple(launch.tile)),
        "split": None if launch is None else launch.split,
        "us": round(finding.seconds * 1e6, 2),
        "rule_us": round(finding.rule_seconds * 1e6, 2),
    }


def _launch(entry: Any) -> tuple[LaunchKey, TunedLaunch | None]:
    """A line's key and launch. Raises LaunchFileError."""
    if not isinstance(entry, dict):
        raise LaunchFileError(f"{entry!r} is no launch")
    dtypes = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
    kind, dtype, gated = entry.get("format"), entry.get("dtype"), entry.get("gated")
    group_size = entry.get("group_size")
    numbers = [entry.get(name) for name in ("in_features", "outputs", "rows")]
    if (
        kind not in list(_WARPS)  # of a list, since what is there need not be hashable
        or dtype not in list(dtypes)
        or not isinstance(gated, bool)
        or not all(type(number) is int and number > 0 for number in numbers)
        or entry["rows"] not in MEASURED_ROWS
        or type(group_size) is not int
        or (group_size > 0) != (kind == "int4")
        or group_size < 0
    ):
        raise LaunchFileError(f"{entry} says nothing of a call that is measured")
    key = LaunchKey(
        kind == "int4",
        dtypes[dtype],
        entry["in_features"],
        entry["outputs"],
        gated,
        group_size,
        entry["rows"],
    )
    if entry.get("tile") is None:
        return key, None
    return key, TunedLaunch(_tile(entry["tile"], kind), _split(entry))


def _tile(numbers: Any, kind: str) -> Tile:
    """The tile of a line. Raises LaunchFileError for one that would not run, or not to the same bits."""
    if (
        not isinstance(numbers, list)
        or len(numbers) != 4
        or any(type(number) is not int for number in numbers)
    ):
        raise LaunchFileError(f"the tile {numbers!r} is not rows, outputs, stages and warps")
    tile = Tile(*numbers)
    if tile.warps not in _WARPS[kind]:
        allowed = " or ".join(map(str, _WARPS[kind]))
        raise LaunchFileError(f"a tile of {kind} weights has {tile.warps} warps, it must have {allowed}")
    if tile.rows not in _SIZES or tile.outputs not in _SIZES[1:] or not 1 <= tile.stages <= _MOST_STAGES:
        raise LaunchFileError(f"the tile {numbers} is of a size that no kernel has")
    return tile


def _split(entry: dict[str, Any]) -> bool:
    split = entry.get("split")
    if not isinstance(split, bool):
        raise LaunchFileError(f"{entry} does not say whether parts have programs of their own")
    return split


def _version(name: str) -> str:
    try:
        return torch.__version__ if name == "torch" else version(name)
    except PackageNotFoundError:
        return "unknown"
