"""docs/operating.md quotes what is said of a GPU: every message of its table is one that the sources can say."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
SAYING = (
    "kernels/gpu.py",
    "compression/device.py",
    "compression/graph_pool.py",
    "deploy/loading.py",
    "deploy/failures.py",
)
PYTORCHS = {"CUDA out of memory; Tried to allocate", "CUDA error", "Triton Error [CUDA]"}
_VALUE = re.compile(r"…|%[ds]|\bcuda:\d|\d+(?:\.\d+)+|\d+ %")
_TABLE = re.compile(r"^\| message \|.*?(?=^$|\Z)", re.MULTILINE | re.DOTALL)


def _parts(message: str) -> set[str]:
    """What of a message is the same whatever it is about."""
    cut = (part.strip(" ():") for part in _VALUE.split(message))
    return {part for part in cut if len(part) > 4}


def _said() -> str:
    """All texts of the sources, what is filled in left out."""
    texts = []
    for name in SAYING:
        for node in ast.walk(ast.parse((ROOT / name).read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                pieces = (part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
                texts.append("".join(str(piece) for piece in pieces))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return "\n".join(_VALUE.sub("…", text) for text in texts)


def test_every_message_of_the_table_is_said_somewhere() -> None:
    found = _TABLE.search((ROOT / "docs" / "operating.md").read_text(encoding="utf-8"))
    assert found is not None
    rows = found[0].splitlines()[2:]
    assert len(rows) >= 15
    said = _said()
    for row in rows:
        quoted = re.findall(r'"([^"]+)"', row.split("|")[1])
        assert quoted, row
        for part in set().union(*(_parts(message) for message in quoted)) - PYTORCHS:
            assert part in said, part
