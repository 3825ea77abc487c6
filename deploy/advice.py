"""What a bundle's own report advises to serve, in one line with what to copy."""

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from exeunt.calibration.report.words import variant_name
from exeunt.compression.bundle import MANIFEST, REPORT_JSON
from exeunt.compression.variant import Variant

_VARIANT: Final = ("weights", "kv_cache", "linear_block")


def advice_line(bundle: Path) -> str | None:
    """The report's first advice, that of the smallest cost, beside what `exeunt serve` takes by default.

    None where the report advises nothing.
    """
    advice = _read(bundle / REPORT_JSON)["verdict"]["advice"]
    if not advice:
        return None
    use, asked = advice[0]["use"].lower(), advice[0]["compression"]
    held = _read(bundle / MANIFEST)
    own = {
        "weights": "int4" if "int4" in held["weights"] else "full",
        "kv_cache": "int4" if "int4" in held["kv_cache"] else "full",
        "linear_block": False,
    }
    advised, default = _called(asked), _called(own)
    said = f"Its report advises, {use}: {advised}"
    if asked["weights"] not in held["weights"]:
        return f"{said}, but the bundle holds {' and '.join(held['weights'])} weights alone."
    changed = {name: asked[name] for name in _VARIANT if asked[name] != own[name]}
    if not changed:
        return f"{said}, which is what exeunt serve takes by default."
    option = shlex.quote(json.dumps(changed))
    return f"{said}. By default exeunt serve takes {default}; give it --default-compression {option}"


def _called(compression: Mapping[str, Any]) -> str:
    return variant_name(Variant(**{name: compression[name] for name in _VARIANT}))


def _read(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found
