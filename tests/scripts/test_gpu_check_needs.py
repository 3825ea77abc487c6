"""What the GPU check takes of a machine: what a bare one runs, what is told of the rest, and who asks."""

import inspect
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import pytest
import torch
from packaging.requirements import Requirement

from scripts.gpu_check import (
    kernel_tests,
    needs,
    source_tree,
)
from scripts.gpu_check.table import table
from tests.scripts.toy_gpu_check import ROOT, check, toy_context


class _Without:
    """A finder that finds no module of some names, whatever is installed."""

    def __init__(self, finder: Any, names: Sequence[str]) -> None:
        self._finder, self._names = finder, names

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """What the finder finds."""
        if name.partition(".")[0] in self._names:
            return None
        return self._finder.find_spec(name, path, target)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._finder, name)


def _bare(names: Sequence[str], line: str) -> "subprocess.CompletedProcess[str]":
    """What a process says in which no module of these names can be found; "" in `sys.argv` is its first argument."""
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    around = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    hide = f"class {inspect.getsource(_Without).partition('class ')[2]}"
    code = "\n".join(
        (
            "from __future__ import annotations",
            "import sys",
            hide,
            f"sys.meta_path[:] = [_Without(each, {list(names)}) for each in sys.meta_path]",
            line,
        )
    )
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=around, capture_output=True, text=True, check=False
    )


def _requirements() -> set[str]:
    """The modules of all packages that the project declares, for itself and for its developers."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    names = {Requirement(line).name.lower().replace("-", "_") for line in lines}
    return names | {"starlette", "pydantic_core", "xdist"}


_THEIRS: Final = {"httpx", "jinja2", "pyyaml", "setuptools", "packaging"}  # torch or transformers need them
_BLOCKED: Final = sorted(_requirements() - {*needs.BARE, *_THEIRS})


@pytest.mark.slow
def test_a_bare_machine_checks_and_measures_all_but_the_tests(tmp_path: Path) -> None:
    out = tmp_path / "gpu-check.json"
    sections = [name for name in check.SECTIONS if name not in ("float32", "grid")]
    said = ["", "--device", "cpu", "--quick", "--out", str(out), "--sections", ",".join(sections)]
    said += ["--bundle", str(tmp_path)]
    done = _bare(
        _BLOCKED,
        f"import runpy; sys.argv = {said}; runpy.run_module('scripts.gpu_check', run_name='__main__')",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())
    status = {name: each["status"] for name, each in found["sections"].items()}
    assert status == dict.fromkeys(sections, "done") | {"tests": "needs"}
    assert "tests needs pytest" in done.stdout
    last = done.stdout.splitlines()[-1]
    assert last == f"NOT TESTED: {found['not_tested'][0]}"
    assert last.startswith("NOT TESTED: the GPU tests need pytest (not installed in ")
    answers = [one for one in found["checks"] if one["name"].startswith("engine int4/int4 in graphs: ")]
    assert {one["name"].partition(": ")[2].partition(",")[0] for one in answers} >= {
        "verified answers",
        "propagated",
        "backfilled",
    }
    assert all(one["good"] for one in answers)
    assert found["metrics"] == "not counted: prometheus_client is not installed"
    assert f"engines' metrics {found['metrics']}" in done.stdout
    assert "No bundle is opened: pydantic is not installed." in done.stderr
    packaged = found["sections"]["end_to_end"]["packaged"]
    assert "engine int4/int4 verified: opening a bundle takes pydantic" in packaged["skipped"]
    assert packaged["engine int4/int4, 2 streams"]["tokens_per_s"] > 0


@pytest.mark.parametrize(
    ("modules", "without"),
    [
        (["exeunt.compression.model", "exeunt.server.engine", "exeunt.deploy.load_driver"], []),
        (["scripts.gpu_check.compiled"], ["exeunt.server.engine"]),
    ],
)
def test_what_runs_on_a_bare_machine_imports_nothing_more(modules: list[str], without: list[str]) -> None:
    line = f"import {', '.join(modules)}; print([name for name in {without} if name in sys.modules])"
    done = _bare(_BLOCKED, line)
    assert done.stdout.strip() == "[]", done.stderr


def test_opening_a_bundle_is_what_takes_pydantic() -> None:
    line = "from exeunt.compression.model import load_bundle; load_bundle('nowhere')"
    lacking = _bare(_BLOCKED, line).stderr.splitlines()[-1]
    assert lacking == f"ModuleNotFoundError: No module named {needs.BUNDLE[0]!r}"


def test_tests_that_lack_a_module_are_told_and_the_others_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tests = {**kernel_tests._QUICK, "tests/server/test_gate_timer.py": ("no_such_module",)}
    monkeypatch.setattr(kernel_tests, "_QUICK", tests)
    context = toy_context(tmp_path)
    found = context.report.section("tests")
    kernel_tests.run(context, found)
    assert found["without"] == {"tests/server/test_gate_timer.py": ["no_such_module"]}
    assert found["passed"] > 0
    assert context.report.failures == []
    found["status"] = "done"
    told = table(context.report)
    assert "without tests/server/test_gate_timer.py (needs no_such_module)" in told
    last = told.splitlines()[-1]
    assert last.startswith(
        "NOT TESTED: tests/server/test_gate_timer.py needs no_such_module (not installed in "
    )
    context.report.save()
    assert json.loads(context.report.path.read_text())["not_tested"] == context.report.not_tested != []


def test_the_probe_says_what_a_machine_lacks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(needs, "cuda_of_torch", lambda: True)
    monkeypatch.setattr(needs, "cuda_devices", lambda: 1)
    assert needs.main() == 0
    for probe, none in (("cuda_of_torch", False), ("cuda_devices", 0)):
        with monkeypatch.context() as patched:
            patched.setattr(needs, probe, lambda found=none: found)
            assert needs.main() == 1
        assert "lacks a CUDA device that torch can use" in capsys.readouterr().out
    monkeypatch.setattr(needs, "BARE", ("torch", "no_such_module"))
    monkeypatch.setattr(needs, "version", lambda name: "2.4.1")
    assert needs.main() == 1
    assert (
        "lacks no_such_module, torch 2.4.1 (needs 2.11), triton 2.4.1 (needs 3.6)" in capsys.readouterr().out
    )
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *project["optional-dependencies"]["gpu"]]
    told = {f"{name}>={first}.{second}" for name, (first, second) in needs.LEAST.items()}
    assert told <= {line.partition(";")[0] for line in lines}


def test_the_probe_imports_no_torch() -> None:
    line = "from scripts.gpu_check import needs; import sys; needs.main(); print('torch' in sys.modules)"
    assert _bare([], line).stdout.splitlines()[-1] == "False"


def test_the_probe_knows_a_torch_without_cuda_and_a_machine_without_a_driver() -> None:
    assert needs.cuda_of_torch() == (torch.version.cuda is not None)
    assert needs.cuda_devices("libno-such-driver.so") == 0
    if torch.cuda.is_available():
        assert needs.cuda_devices() > 0


@pytest.mark.parametrize(
    ("said", "built"),
    [
        ("cuda: Optional[str] = None\n", False),
        ("cuda: Optional[str] = '13.0'\n", True),
        ("cuda = '12.8'\n", True),
        ("debug = False\n", True),
    ],
)
def test_the_probe_reads_what_torch_was_built_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, said: str, built: bool
) -> None:
    (tmp_path / "version.py").write_text(said, encoding="utf-8")
    monkeypatch.setattr(
        needs, "find_spec", lambda name: SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    )
    assert needs.cuda_of_torch() is built


def test_the_makefile_asks_the_probe() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "$(PYTHON) -m scripts.gpu_check.needs" in makefile


def test_a_source_tree_is_importable_without_installing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(source_tree, "_installed", lambda: False)
    monkeypatch.setattr("tempfile.mkdtemp", lambda prefix: str(tmp_path))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    monkeypatch.setenv("EXEUNT_SOURCE_TREE", "")
    monkeypatch.setattr("atexit.register", lambda remove: None)
    source_tree.make_importable()
    assert os.environ["PYTHONPATH"] == f"{tmp_path}{os.pathsep}/elsewhere"
    line = (
        "from importlib.metadata import version; from importlib.util import find_spec; "
        "print(version('exeunt'), find_spec('exeunt.kernels.gpu').origin)"
    )
    bare = [sys.executable, "-S", "-c", line]  # without what is installed
    said = subprocess.run(
        bare, cwd="/", capture_output=True, text=True, timeout=120, check=True
    ).stdout.split()
    assert said[1] == str(tmp_path / "exeunt" / "kernels" / "gpu.py")


@pytest.mark.parametrize("replaced", [False, True])
def test_the_links_go_with_the_process_that_made_them(tmp_path: Path, replaced: bool) -> None:
    lines = [
        "import importlib, os, sys",
        f"sys.path.insert(0, {str(ROOT)!r})",
        "tree = importlib.import_module('scripts.gpu_check.source_tree')",
        f"again = {replaced} and 'again' not in sys.argv",
        "tree._installed = lambda: 'again' in sys.argv",
        "tree.make_importable()",
        "print(len(os.listdir(os.environ['TMPDIR'])))",
        "sys.stdout.flush()",
        "again and os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:], 'again'])",
    ]
    around = {**os.environ, "TMPDIR": str(tmp_path)}
    said = subprocess.run(
        [sys.executable, "-S", "-c", "\n".join(lines)],
        env=around,
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout.split() == ["1"] * (1 + replaced)
    assert list(tmp_path.iterdir()) == []


def _takes_a_gpu(path: Path) -> bool:
    """Whether tests of a file are marked for a GPU, or skipped where there is no CUDA device."""
    text = path.read_text(encoding="utf-8")
    return "pytest.mark.gpu" in text or bool(re.search(r"skipif\(\s*not torch\.cuda\.is_available\(\)", text))


def test_every_test_that_takes_a_gpu_is_run_by_the_gpu_check() -> None:
    own = {path for path in (ROOT / "tests").rglob("test_*.py") if _takes_a_gpu(path)}
    assert ROOT / "tests/kernels/test_gpu.py" in own
    listed = [ROOT / each for each in kernel_tests.TESTS]
    assert all(each.exists() for each in listed)
    lacking = {path for path in own if not any(path == each or each in path.parents for each in listed)}
    assert lacking - {Path(__file__)} == set()
