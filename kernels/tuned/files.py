"""Measured launches as files: one per kind of GPU in this package, or, of a kind that has none, in the user's cache.

A file is JSON: the format's version, the GPU's name, with what and when it was measured, and a line per launch. Its
`tile` is [rows, outputs, stages, warps], or null where nothing was faster than the rule. What was measured here for a
GPU of another name, or by another release's format, is not used: a file is taken whole or, with a warning, not at all.
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

FORMAT: Final = 1
PACKAGED: Final = Path(__file__).parent
_KERNELS: Final = ("int4_linear/triton.py", "full_linear/triton.py", "linear_parts.py", "codes_triton.py")
"""The sources by which a cached measurement is of these kernels: another version's may not even fit the GPU."""
_WARPS: Final = {"int4": (1, 2), "full": (2, 4, 8)}
"""INT4 tiles of four warps would be summed by other instructions, to other bits (`exeunt.kernels.linear_parts`)."""
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
    digest = hashlib.sha256(_version("triton").encode())
    for name in _KERNELS:
        digest.update((PACKAGED.parent / name).read_bytes())
    return cache_folder().parent / "tuned" / f"{slug(gpu)}-{digest.hexdigest()[:12]}.json"


def read_known(gpu: str) -> Launches:
    """The package's launches for a kind of GPU, else the cache's, else none; one warning of a file that is no good."""
    for path in (packaged_file(gpu), cached_file(gpu)):
        try:
            return read_launches(path, gpu)
        except FileNotFoundError:
            continue
        except (OSError, LaunchFileError) as error:
            _log.warning("The measured launches in %s are not used: %s.", path, error)
            return {}
    return {}


def read_launches(path: Path, gpu: str) -> Launches:
    """The launches in a file. Raises LaunchFileError where they are another GPU's or malformed, and OSError."""
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
    return dict(_launch(entry) for entry in found["launches"])


def write_launches(path: Path, gpu: str, findings: Iterable[Finding], *, add: bool = False) -> None:
    """Write what was measured now, whole or not at all; `add` keeps what a good file there says of other calls.

    Raises OSError.
    """
    entries = _entries(path, gpu) if add else {}
    entries |= {finding.key: entry_of(finding) for finding in findings}
    made = {name: _version(name) for name in ("exeunt", "torch", "triton")}
    head = {"format": FORMAT, "gpu": gpu, "measured": {"date": time.strftime("%Y-%m-%d"), **made}}
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


def _entries(path: Path, gpu: str) -> dict[Key, dict[str, Any]]:
    """The lines of a file that is there and good, as they are."""
    try:
        keys = read_launches(path, gpu)
        return dict(zip(keys, json.loads(path.read_text(encoding="utf-8"))["launches"], strict=True))
    except (OSError, ValueError):
        return {}


def entry_of(finding: Finding) -> dict[str, Any]:
    """A file's line of a finding: times in microseconds."""
    key, launch = finding.key, finding.launch
    return {
        "format": "int4" if key.int4 else "full",
        "dtype": str(key.dtype).removeprefix("torch."),
        "in_features": key.in_features,
        "outputs": key.outputs,
        "gated": key.gated,
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
    numbers = [entry.get(name) for name in ("in_features", "outputs", "rows")]
    if (
        kind not in list(_WARPS)  # of a list, since what is there need not be hashable
        or dtype not in list(dtypes)
        or not isinstance(gated, bool)
        or not all(type(number) is int and number > 0 for number in numbers)
        or entry["rows"] not in MEASURED_ROWS
    ):
        raise LaunchFileError(f"{entry} says nothing of a call that is measured")
    key = LaunchKey(
        kind == "int4", dtypes[dtype], entry["in_features"], entry["outputs"], gated, entry["rows"]
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
