"""The Dockerfile, read: its stages, their instructions, its health check."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCKERFILE = re.sub(r"\\\n", " ", (ROOT / "Dockerfile").read_text())  # continued lines joined


def stages() -> dict[str, tuple[str, list[tuple[str, str]]]]:
    """Stage name -> (what it is built from, its instructions)."""
    found: dict[str, tuple[str, list[tuple[str, str]]]] = {}
    current: list[tuple[str, str]] = []
    for line in DOCKERFILE.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        word, _, rest = line.strip().partition(" ")
        if word == "FROM":
            base, _, name = rest.partition(" AS ")
            found[name] = (base, current := [])
        else:
            current.append((word, rest.strip()))
    return found


def lineage(name: str) -> list[tuple[str, str]]:
    """A stage's instructions after those of the stages it is built from."""
    every = stages()
    base, own = every[name]
    return (lineage(base) if base in every else []) + own


def health_check() -> list[str]:
    """The command of the image's health check, in its exec form."""
    check = next(rest for word, rest in lineage("cpu") if word == "HEALTHCHECK")
    command: list[str] = json.loads(check.partition("CMD")[2])
    return command
