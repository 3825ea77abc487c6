"""Compiling on first use: once, whole or not at all, on any processor, and doing without when it cannot be done."""

import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from exeunt.kernels.int4_linear import int4_linear, quantize
from exeunt.kernels.int4_linear.native import pack_panels
from exeunt.kernels.native import build, library
from exeunt.kernels.native.library import NativeLibrary, native_library
from exeunt.kernels.paged_attention import paged_attention
from exeunt.kernels.paged_attention.reference import paged_attention_reference
from exeunt.kernels.write_kv.reference import write_kv_reference

COMPILER = build.find_compiler()
needs_compiler = pytest.mark.skipif(
    COMPILER is None, reason="needs a C++ compiler ($CXX, c++, g++ or clang++)"
)

USE = """
import logging, torch
logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
from exeunt.kernels.int4_linear import int4_linear, pack, quantize
torch.manual_seed(0)
weight, x = quantize(torch.randn(24, 64), 32), torch.randn(3, 64)
out, exact = int4_linear(x, pack(weight)), int4_linear(x, weight)
assert float((out - exact).norm() / exact.norm()) < 0.02
print(type(pack(weight)).__name__)
"""


def start(cache: Path, **extra: str) -> "subprocess.Popen[str]":
    """A fresh interpreter that uses INT4 weights once, with its own cache; it prints what they were packed into."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache), "EXEUNT_NATIVE": "1", "CXX": "", **extra}
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", USE], env=environment, stdout=pipe, stderr=pipe, text=True)


def finish(process: "subprocess.Popen[str]") -> tuple[str, str]:
    out, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    return out.strip(), errors


@pytest.fixture
def copying_compiler(tmp_path: Path) -> str:
    """A compiler that takes half a second to hand out the library that this machine has compiled before."""
    compiled = native_library()
    if compiled is None:
        pytest.skip("needs the native kernels (a C++ compiler, and EXEUNT_NATIVE not 0)")
    script = tmp_path / "compiler"
    script.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && exit 0\nsleep 0.5\n'
        f'for last; do :; done\ncp "{compiled.path}" "$last"\n'
    )
    script.chmod(0o755)
    return str(script)


def test_two_processes_compile_once_and_a_damaged_library_again(
    tmp_path: Path, copying_compiler: str
) -> None:
    cache = tmp_path / "cache"
    processes = [start(cache, CXX=copying_compiler) for _ in range(2)]
    results = [finish(process) for process in processes]
    assert [packed for packed, _ in results] == ["PackedInt4", "PackedInt4"]
    assert sum(errors.count("compiling the native kernels") for _, errors in results) == 1
    folder = cache / "exeunt" / "native"
    assert sorted(path.suffix for path in folder.iterdir()) == [".lock", ".so"]
    (held,) = folder.glob("*.so")
    held.write_bytes(b"not a library")
    packed, errors = finish(start(cache, CXX=copying_compiler))
    assert packed == "PackedInt4"
    assert errors.count("compiling the native kernels") == 1


def test_a_cache_that_cannot_be_written_is_replaced(tmp_path: Path, copying_compiler: str) -> None:
    (tmp_path / "exeunt").write_text("a file where the folder should be")
    packed, errors = finish(start(tmp_path, CXX=copying_compiler))
    assert packed == "PackedInt4"
    assert "the cache cannot be used" in errors


def test_without_native_kernels_the_reference_runs(tmp_path: Path) -> None:
    packed, errors = finish(start(tmp_path, EXEUNT_NATIVE="0"))
    assert packed == "Int4Weight"
    assert errors.count("EXEUNT_NATIVE is 0: the kernels run in plain PyTorch") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("compiler", "reason"), [("no-such-compiler", "no C++ compiler found"), ("false", "could not be built")]
)
def test_a_missing_or_failing_compiler_is_logged_once(tmp_path: Path, compiler: str, reason: str) -> None:
    packed, errors = finish(start(tmp_path, CXX=compiler))
    assert packed == "Int4Weight"
    assert errors.count("WARNING") == 1
    assert reason in errors


@needs_compiler
def test_a_failed_compile_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    assert COMPILER is not None
    with pytest.raises(build.NativeBuildError, match="no-such-flag"):
        build.compile_library(COMPILER, ("--no-such-flag",), tmp_path / "kernels.so")
    assert not list(tmp_path.iterdir())


MAPPED_POOLS = """
import torch
from pathlib import Path
from exeunt.kernels.int4_linear import int4_linear, pack, quantize
int4_linear(torch.randn(64, 512), pack(quantize(torch.randn(2048, 512), 32)))
lines = Path("/proc/self/maps").read_text().splitlines()
print(len({line.split()[-1] for line in lines if "libgomp" in line}))
"""


def test_the_kernels_share_one_thread_pool_with_torch() -> None:
    """Looked at in a process of its own: other packages bring pools of theirs into this one."""
    if native_library() is None or not Path("/proc/self/maps").exists():
        pytest.skip("needs the native kernels, and /proc/self/maps to see the libraries of a process")
    found = subprocess.run([sys.executable, "-c", MAPPED_POOLS], capture_output=True, text=True, check=True)
    assert int(found.stdout) <= 1


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("processor", ["haswell", "x86-64", "skylake-avx512"])
def test_other_processors_get_the_same_arithmetic(
    tmp_path: Path, paged_problem: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, processor: str
) -> None:
    """AVX2, plain SSE2 and AVX-512 without VNNI: integer sums are the same, so results differ by rounding only."""
    assert COMPILER is not None
    target = tmp_path / "kernels.so"
    try:
        build.compile_library(COMPILER, (f"-march={processor}", "-O1", "-fopenmp"), target)
    except build.NativeBuildError as error:
        pytest.skip(f"the compiler does not build for {processor}: {error}")
    if processor != "x86-64" and not _has({"haswell": "avx2", "skylake-avx512": "avx512bw"}[processor]):
        pytest.skip(f"this machine cannot run code for {processor}")
    other, native = NativeLibrary(target), native_library()
    assert native is not None
    assert other.lanes == (16 if processor == "skylake-avx512" else 8)
    for out_features, in_features, group in ((37, 324, 32), (64, 256, 128), (5, 10, 6)):
        weight, x = quantize(torch.randn(out_features, in_features), group), torch.randn(9, in_features)
        here, there = (int4_linear(x, pack_panels(weight, each)) for each in (native, other))
        torch.testing.assert_close(there, here, atol=1e-4, rtol=1e-5)
        alone = torch.cat([int4_linear(row[None], pack_panels(weight, other)) for row in x])
        assert torch.equal(alone, there)
    monkeypatch.setattr(library, "_loaded", [other])
    for int4, dtype, head_dim, page_tokens in (
        (False, torch.float32, 48, 9),
        (False, torch.float16, 48, 9),
        (True, torch.bfloat16, 48, 9),
        (True, torch.float32, 16, 31),
        (True, torch.float32, 32, 31),
        (True, torch.float32, 80, 24),
    ):
        shape = {"head_dim": head_dim, "page_tokens": page_tokens}
        problem = paged_problem([[0, 1, 2], [40, 41, 200]], int4=int4, dtype=dtype, **shape)
        arguments = (problem.queries, problem.block, problem.batch, head_dim**-0.5, 90)
        tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
        expected = paged_attention_reference(*arguments)
        torch.testing.assert_close(paged_attention(*arguments), expected, atol=tolerance, rtol=tolerance)
        bits = problem.block.keys.clone()
        slots = problem.batch.slots[-1:]
        write_kv_reference(problem.keys[1][-1:], problem.values[1][-1:], slots, problem.block)
        assert torch.equal(bits.view(torch.uint8), problem.block.keys.contiguous().view(torch.uint8))


def _has(feature: str) -> bool:
    try:
        return feature in Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return False


def test_the_answer_is_asked_for_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(library, "_loaded", [])
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("EXEUNT_NATIVE", "1")
    with caplog.at_level(logging.WARNING):
        assert native_library() is None
        assert native_library() is None
    assert len(caplog.records) == 1


@needs_compiler
def test_whether_anything_will_be_compiled_is_known_beforehand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "_loaded", [])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("EXEUNT_NATIVE", "1")
    monkeypatch.delenv("CXX", raising=False)
    assert not library.is_compiled()
    monkeypatch.setenv("EXEUNT_NATIVE", "0")
    assert library.is_compiled(), "nothing is to be compiled"
    monkeypatch.setenv("EXEUNT_NATIVE", "1")
    build.cache_folder().mkdir(parents=True)
    (build.cache_folder() / f"{build._fingerprint(str(COMPILER), build.FLAG_CHOICES[1])}.so").touch()
    assert library.is_compiled()
