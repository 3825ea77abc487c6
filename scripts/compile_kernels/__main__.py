"""`python -m scripts.compile_kernels`: registers and spills of every kernel for every kind of GPU, as JSON."""

import json
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Final

import triton
import typer

from scripts.compile_kernels.in_processes import compile_all
from scripts.compile_kernels.sources import source_digests

RESULTS: Final = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "triton-registers.json"

Out = Annotated[Path, typer.Option(help="Where to write the JSON.")]
Tested = Annotated[bool, typer.Option(help="Only the cases that the test suite compiles.")]
Processes = Annotated[int, typer.Option(min=1, help="Processes that compile side by side.")]


def main(out: Out = RESULTS, tested: Tested = False, processes: Processes = 2) -> None:
    """Compile, and write what a thread and a program of each kernel take in each case on each kind of GPU.

    Raises RuntimeError where the kernels' sources change meanwhile.
    """
    sources = source_digests()
    rows = compile_all(processes, tested=tested)
    if source_digests() != sources:
        raise RuntimeError("the kernels changed while they were compiled: compile them again")
    made = {"triton": version("triton"), "ptxas": _ptxas(), "torch": version("torch")}
    document = {"made": made, "sources": sources, "kernels": rows}
    out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    spilling = sum(row["spill_store_bytes"] + row["spill_load_bytes"] > 0 for row in rows)
    print(f"{len(rows)} compiled, {spilling} of them with spills; written to {out}")


def _ptxas() -> str:
    said = subprocess.run(
        [triton.knobs.nvidia.ptxas.path, "--version"], capture_output=True, text=True, check=True
    ).stdout
    return said.strip().splitlines()[-1]


if __name__ == "__main__":
    typer.run(main)
