"""Every kernel compiles to machine code for GPUs that are not here, within the registers and spills on record."""

import ast
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

import exeunt.kernels.gpu
from scripts.compile_kernels.cases import all_cases
from scripts.compile_kernels.in_processes import CAPABILITIES, key_of
from scripts.compile_kernels.sources import KERNELS, digest_of, source_digests

ROOT = Path(__file__).resolve().parents[3]
RECORD = ROOT / "benchmarks" / "results" / "triton-registers.json"
Rows = dict[tuple[str, str, int], dict[str, Any]]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # cores may be busy


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    """What `python -m scripts.compile_kernels` wrote."""
    document: dict[str, Any] = json.loads(RECORD.read_text(encoding="utf-8"))
    return document


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    """The cases of this test, compiled here and now; the interpreter of this process is no part of it."""
    if torch.cuda.is_available():
        pytest.skip("the other tests compile the kernels for the GPU that is here")
    out = tmp_path_factory.mktemp("compiled") / "registers.json"
    command = [sys.executable, "-m", "scripts.compile_kernels", "--tested", "--out", str(out)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=880, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return {key_of(row): row for row in json.loads(out.read_text(encoding="utf-8"))["kernels"]}


def _launched() -> set[str]:
    """The kernels that any wrapper launches, as the record names them."""
    folder = Path(exeunt.kernels.gpu.__file__).parent
    names = set()
    for path in sorted(folder.rglob("*.py")):
        module = ".".join(path.relative_to(folder).with_suffix("").parts)
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        imports = [node for node in nodes if isinstance(node, ast.ImportFrom)]
        homes = {
            each.name: str(node.module).removeprefix("exeunt.kernels.")
            for node in imports
            for each in node.names
        }
        for node in nodes:
            match node:  # kernel[grid](…)
                case ast.Call(func=ast.Subscript(value=ast.Name(id=name))):
                    names.add(f"{homes.get(name, module)}.{name}")
    return names


def test_every_kernel_that_is_launched_is_compiled_for_every_gpu(compiled: Rows) -> None:
    launched = _launched()
    assert len(launched) > 15
    for capability in CAPABILITIES:
        assert {kernel for kernel, _, found in compiled if found == capability} == launched


def test_the_record_has_all_cases_for_all_their_gpus(record: dict[str, Any]) -> None:
    found = {(row["case"], row["capability"]) for row in record["kernels"]}
    assert found == {(case.name, capability) for case in all_cases() for capability in case.capabilities}


def test_the_record_is_of_the_kernels_that_are_here(record: dict[str, Any]) -> None:
    here, there = source_digests(), record["sources"]
    changed = sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))
    assert not changed, "compile them all with python -m scripts.compile_kernels"


def test_a_digest_is_of_every_file_that_holds_a_kernel() -> None:
    kernels = {
        path.relative_to(KERNELS).as_posix()
        for path in KERNELS.rglob("*.py")
        if "@triton.jit" in path.read_text(encoding="utf-8")
    }
    assert len(kernels) > 8
    assert kernels <= source_digests().keys()


def test_a_digest_changes_with_the_code_alone() -> None:
    text = '"""What it is."""\nX = 1  # why\n\n\ndef f():\n    """What."""\n    return "#"\n'
    said = text.replace("What", "Which").replace("why", "wherefore").replace("\n\n\n", "\n")
    assert digest_of(said) == digest_of(text)
    for changed in (text.replace("X = 1", "X = 2"), text.replace('"#"', '"##"')):
        assert digest_of(changed) != digest_of(text)


def test_registers_and_spills_stay_within_the_record(compiled: Rows, record: dict[str, Any]) -> None:
    recorded = {key_of(row): row for row in record["kernels"]}
    same = version("triton") == record["made"]["triton"]
    more, spilt = (0, 0) if same else (16, 64)  # another compiler allots them in another way
    beyond = []
    for key, row in compiled.items():
        bound = recorded[key]
        if row["registers"] > bound["registers"] + more:
            beyond.append(f"{key}: {row['registers']} registers, on record are {bound['registers']}")
        for kind in ("spill_store_bytes", "spill_load_bytes"):
            if row[kind] > bound[kind] + spilt:
                beyond.append(f"{key}: {kind} are {row[kind]}, on record {bound[kind]}")
    assert not beyond, "compile them all with python -m scripts.compile_kernels\n" + "\n".join(beyond)


def test_the_record_is_of_the_pinned_compiler(record: dict[str, Any]) -> None:
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert f"triton=={record['made']['triton']}" in [pin.split(";")[0] for pin in pins]
    assert {row["capability"] for row in record["kernels"]} == set(CAPABILITIES)
    for capability, most in {80: 163, 89: 99, 90: 227}.items():  # KiB that a program may take
        taken = [row["shared_bytes"] for row in record["kernels"] if row["capability"] == capability]
        assert max(taken) <= most * 1024
