"""The GPU check on a CPU at toy sizes, and what it makes of kernels, sections and devices that fail."""

import importlib
import importlib.metadata
import inspect
import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Final

import pytest
import torch
from packaging.requirements import Requirement
from torch import Tensor

from exeunt.compression.decoder import Decoder
from exeunt.kernels.exit_gate import exit_state
from exeunt.kernels.int4_linear import quantize
from exeunt.kernels.timing import L2_BYTES, copies, timed
from scripts.gpu_check import (
    compiled,
    correctness,
    end_to_end,
    engine_speeds,
    kernel_tests,
    machine,
    needs,
    source_tree,
    synthetic_exit,
    warming,
)
from scripts.gpu_check.models import TOY, RandomWeights, random_decoders
from scripts.gpu_check.paged_rows import PagedRows, greedy, logits_of
from scripts.gpu_check.parts import Part, run_parts
from scripts.gpu_check.report import CHECKING, Clock, Context, Report
from scripts.gpu_check.table import table

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
check: Any = importlib.import_module("scripts.gpu_check.__main__")


def _context(tmp_path: Path, seconds: float = 100.0) -> Context:
    return Context(CPU, True, Report(tmp_path / "out.json"), Clock(seconds))


def _quick(*said: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "scripts.gpu_check", "--device", "cpu", "--quick", *said]
    around = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=ROOT, env=around, capture_output=True, text=True, timeout=280, check=False
    )


@pytest.mark.slow
def test_every_section_runs_on_a_cpu(tmp_path: Path) -> None:
    out = tmp_path / "gpu-check.json"
    done = _quick("--out", str(out), "--seconds", "250", "--sections", ",".join(check.SECTIONS))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())
    assert {name: each["status"] for name, each in found["sections"].items()} == dict.fromkeys(
        check.SECTIONS, "done"
    )
    assert found["sections"]["machine"]["torch"] == importlib.metadata.version("torch")
    assert found["sections"]["machine"]["copy_bytes_per_s"] > 0
    assert len(found["sections"]["machine"]["kernels"]) == len(found["sections"]["machine"]["linear_kernels"])
    assert found["sections"]["machine"]["read_bytes_per_s"] > 0
    assert found["sections"]["tests"]["passed"] > 0
    cases = found["sections"]["kernels"]["cases"]
    assert {case["op"] for case in cases} == {"int4_linear", "paged_attention", "write_kv", "draw_tokens"}
    assert all(case["us"] > 0 for case in cases)
    assert all(step["ms"] > 0 for step in found["sections"]["decode"]["steps"])
    ends = found["sections"]["end_to_end"]
    assert 0 < ends["toy"]["engine int4/int4 exits at 0.5 (synthetic), 2 streams"]["exit_rate"] < 1
    assert ends["toy"]["wanted_exit_rate"] == 0.5
    modes = {name.split(", ")[0] for name in ends["toy again"] if ", " in name}
    assert modes == {f"engine {name}" for name in end_to_end.RANDOM_MODES}
    assert ends["packaged"]["engine full/full, 2 streams"]["captured_while_timed"] == 0
    assert ends["packaged"]["transformers generate, 1 streams"]["tokens_per_s"] > 0
    host = found["sections"]["host"]["off, 2 streams"]
    assert host["us"] > 0
    assert min(host["functions"].values()) >= 0
    assert "server.runner: Runner.run" in host["functions"]
    assert found["sections"]["compiled"]["skipped"]
    assert len(found["checks"]) > 20
    assert all(one["good"] for one in found["checks"])
    assert "checks: " in done.stdout


def test_what_no_longer_fits_is_left_out_and_said_so(tmp_path: Path) -> None:
    out = tmp_path / "gpu-check.json"
    done = _quick("--out", str(out), "--seconds", "4", "--sections", "machine,kernels,decode,compiled")
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())["sections"]
    assert found["machine"]["status"] == "done"
    assert {found[name]["status"] for name in ("kernels", "decode", "compiled")} == {"left out"}
    assert found["kernels"]["skipped"] == ["kernels: no time left"]


@pytest.mark.parametrize("name", ["correctness", "tests"])
def test_a_run_without_time_for_its_checks_fails(tmp_path: Path, name: str) -> None:
    out = tmp_path / "gpu-check.json"
    done = _quick("--out", str(out), "--seconds", "4", "--sections", f"memory,{name}")
    assert done.returncode == 1, done.stderr
    assert json.loads(out.read_text())["sections"][name]["status"] == "left out"
    assert f"FAILED section {name}: {{'error': 'left out'}}" in done.stdout


def test_the_sections_that_run_by_themselves_have_room_in_eight_minutes() -> None:
    kept = {name: section.seconds for name, section in check.SECTIONS.items() if not section.extra}
    assert tuple(kept) == check.DEFAULT
    assert check.SECONDS == check.COMPILING + sum(kept.values()) <= 8 * 60 - check._GRACE
    checking = [name for name in check.SECTIONS if name in CHECKING]
    assert list(check.SECTIONS)[:4] == ["machine", "memory", *checking]


def test_a_section_gets_what_those_before_it_left_and_keeps_what_those_behind_it_need(
    tmp_path: Path,
) -> None:
    behind = ["decode", "kernels"]
    kept = sum(check.SECTIONS[name].seconds for name in behind)
    tests = check.SECTIONS["tests"]
    for seconds, wanted in (
        (kept + 400, 400),
        (kept + tests.seconds / 2, tests.seconds),  # it comes first, and may take theirs
    ):
        run = check._Run(_context(tmp_path, seconds), behind, tmp_path, resumed=False)
        assert run._seconds(tests) == pytest.approx(wanted, abs=1)


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
    around = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
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
    return names | {"starlette", "xdist"}


_THEIRS: Final = {"httpx", "jinja2", "pyyaml", "setuptools", "packaging"}  # torch or transformers need them
_BLOCKED: Final = sorted(_requirements() - {*needs.BARE, *_THEIRS})


@pytest.mark.slow
def test_a_bare_machine_checks_and_measures_all_but_the_engine(tmp_path: Path) -> None:
    out = tmp_path / "gpu-check.json"
    sections = [name for name in check.SECTIONS if name != "float32"]
    said = ["", "--device", "cpu", "--quick", "--out", str(out), "--sections", ",".join(sections)]
    done = _bare(
        _BLOCKED,
        f"import runpy; sys.argv = {said}; runpy.run_module('scripts.gpu_check', run_name='__main__')",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())
    status = {name: each["status"] for name, each in found["sections"].items()}
    engine = ("end_to_end", "exits", "host", "compiled")
    assert status == dict.fromkeys(sections, "done") | dict.fromkeys((*engine, "tests"), "needs")
    assert all(found["sections"][name]["needs"] == [*needs.SERVER] for name in engine)
    assert "end_to_end needs starlette, pydantic_settings" in done.stdout
    assert "tests needs pytest" in done.stdout


def test_what_the_engine_needs_is_what_is_said() -> None:
    modules = ("end_to_end", "exits", "host_times", "engine_warming", "compiled")
    line = f"import {', '.join(f'scripts.gpu_check.{name}' for name in modules)}; "
    line += f"print(all(name in sys.modules for name in {needs.SERVER}))"
    done = _bare(sorted({*_BLOCKED} - {*needs.SERVER}), line)
    assert done.stdout.strip() == "True", done.stderr


def test_tests_that_lack_a_module_are_told_and_the_others_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tests = {**kernel_tests._QUICK, "tests/server/test_gate_timer.py": ("no_such_module",)}
    monkeypatch.setattr(kernel_tests, "_QUICK", tests)
    context = _context(tmp_path)
    found = context.report.section("tests")
    kernel_tests.run(context, found)
    assert found["without"] == {"tests/server/test_gate_timer.py": ["no_such_module"]}
    assert found["passed"] > 0
    assert context.report.failures == []
    found["status"] = "done"
    assert "without tests/server/test_gate_timer.py (needs no_such_module)" in table(context.report)


def test_the_probe_says_what_a_machine_lacks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert needs.main() == 0
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


def test_the_makefile_asks_the_probe() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "$(PYTHON) -m scripts.gpu_check.needs" in makefile


def test_a_section_that_nobody_knows_is_refused() -> None:
    done = _quick("--sections", "machine,speed")
    assert done.returncode == 2
    assert "there is no section speed" in done.stderr


def _run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, names: Sequence[str], **functions: Any) -> Report:
    """The report of sections that do what `functions` do."""
    for name, function in functions.items():
        module, attribute = check.SECTIONS[name].function.split(":")
        monkeypatch.setattr(importlib.import_module(f"scripts.gpu_check.{module}"), attribute, function)
    context = _context(tmp_path)
    check._Run(context, names, tmp_path, resumed=False).all()
    return context.report


def _breaks(context: Context, found: dict[str, Any]) -> None:
    found["half"] = 1
    raise RuntimeError("out of luck")


def test_a_section_that_breaks_ends_itself_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    report = _run(monkeypatch, tmp_path, ["machine", "memory"], machine=_breaks)
    saved = json.loads(report.path.read_text())["sections"]
    assert saved["machine"]["status"] == "failed"
    assert saved["machine"]["half"] == 1
    assert saved["memory"]["status"] == "done"
    assert [one["name"] for one in report.failures] == ["section machine"]
    assert "FAILED section machine: {'error': 'RuntimeError: out of luck'}" in table(report)


@pytest.fixture
def replaced(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The command lines of processes that this one would have replaced itself by."""
    said: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda path, line: said.append(line))
    monkeypatch.setattr(os, "set_inheritable", lambda descriptor, inheritable: None)
    return said


def test_a_device_that_no_longer_answers_is_left_to_a_fresh_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, replaced: list[list[str]]
) -> None:
    monkeypatch.setattr(check, "_device_answers", lambda device: False)
    report = _run(monkeypatch, tmp_path, ["machine", "memory"], machine=_breaks)
    assert len(replaced) == 1
    assert replaced[0][replaced[0].index("--sections") + 1] == "memory"
    assert "--resume" in replaced[0]
    again = Report(report.path, resume=True)
    assert again.section("machine")["status"] == "failed"


def test_a_section_that_hangs_is_broken_off(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, replaced: list[list[str]]
) -> None:
    def hangs(context: Context, found: dict[str, Any]) -> None:
        for _ in range(100):
            if replaced:
                return
            check.time.sleep(0.05)

    monkeypatch.setattr(check, "_GRACE", -99.0)  # of the hundred seconds that there are one is left
    _run(monkeypatch, tmp_path, ["machine"], machine=hangs)
    assert len(replaced) == 1


def test_tests_are_recorded_one_by_one(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(
        "import pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 1 == 2, 'one is not two'\n"
        "@pytest.mark.skip(reason='no wind')\n"
        "def test_idle(): pass\n"
    )
    records = tmp_path / "records.jsonl"
    around = {**os.environ, kernel_tests.RECORD: str(records), "PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-m", "pytest", "-q", "-p", "scripts.gpu_check.recorded_tests", str(tmp_path)]
    subprocess.run(line, cwd=tmp_path, env=around, capture_output=True, timeout=120, check=False)
    found = kernel_tests.outcomes(records)
    assert (found["passed"], found["failed"], found["skipped"]) == (1, 1, 1)
    assert found["failures"][0][0].endswith("test_bad")
    assert "one is not two" in found["failures"][0][1]
    assert found["skips"] == ["Skipped: no wind"]


@pytest.mark.parametrize(("line", "good"), [("", False), ("passed", True), ("failed", False)])
def test_no_tests_are_no_success_and_a_failure_is_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, line: str, good: bool
) -> None:
    record = json.dumps({"test": "test_it", "outcome": line, "seconds": 1, "says": "why"}) if line else ""
    stands = f"import os, sys; print({record!r}, file=open(os.environ['{kernel_tests.RECORD}'], 'w')"
    stands += ") if sys.argv[1:] == ['x'] else 0"
    said = [sys.executable, "-c", stands, "x" if line else "y"]
    monkeypatch.setattr(kernel_tests, "_pytest", lambda context, tests: said)
    context, found = _context(tmp_path), dict[str, Any]()
    kernel_tests.run(context, found)
    (made,) = context.report.data["checks"]
    assert made["good"] == good
    assert found["exit_status"] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json"]


def test_kernels_are_compiled_in_processes_that_are_waited_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    quick = _context(tmp_path)
    warmers = warming.Warmers(quick, tmp_path, ["packaged int4 short", "linears"])
    warmers.wait(["packaged int4 short"], quick.report)
    said = quick.report.data["compiling"]["packaged int4 short"]
    assert said["status"] == 0
    assert said["says"].startswith("2 jobs, 0 failed []")
    assert said["seconds"] > 0
    warmers.wait(["packaged int4 short"], quick.report)
    warmers.stop()
    warmers.wait(None, quick.report)
    assert list(quick.report.data["compiling"]) == ["packaged int4 short"]


@pytest.mark.parametrize("group", warming.GROUPS)
def test_every_group_of_kernels_has_jobs_of_its_own(tmp_path: Path, group: str) -> None:
    jobs = list(warming._jobs(_context(tmp_path), group))
    assert len(jobs) >= (1 if group.startswith(("steps", "exits")) else 2)


class _Captures:
    """Stands for a decoder whose graphs grow with the first runs."""

    def __init__(self, grow: int) -> None:
        self.step_graphs, self.pool, self.count = self, self, 0
        self._grow, self.runs = grow, 0

    def run(self) -> None:
        """A run, which captures a graph or none."""
        self.runs += 1
        self.count += self.runs <= self._grow


@pytest.mark.parametrize(("grow", "runs"), [(0, 1), (2, 3), (99, engine_speeds._MOST_WARM_RUNS)])
def test_a_load_is_run_until_nothing_is_captured_any_more(tmp_path: Path, grow: int, runs: int) -> None:
    decoder = _Captures(grow)
    model: Any = SimpleNamespace(decoders={"a": decoder, "b": decoder})
    assert engine_speeds.warmed(_context(tmp_path), model, decoder.run) == decoder.runs == runs


@pytest.mark.parametrize("rate", [0.25, 0.5, 0.8])
def test_a_synthetic_exit_lets_the_wanted_share_of_the_models_own_tokens_leave(rate: float) -> None:
    spec = TOY.spec()
    decoder = random_decoders(spec, CPU, torch.bfloat16)["int4", False]
    texts = [[(7 * row + place) % 200 + 1 for place in range(12)] for row in range(16)]
    bare = synthetic_exit.synthetic_exit(spec, CPU)
    head = synthetic_exit.with_rate(bare, decoder, "int4", texts, rate)
    with torch.inference_mode():
        states = synthetic_exit._states(decoder, "int4", texts, head.block)
        assert {tuple(each.shape) for each in states} == {(16, spec.hidden_size)}
        logits = torch.cat([exit_state(each, head.weights)[1] for each in states])
    assert float((logits.sigmoid() >= 0.5).float().mean()) == pytest.approx(rate, abs=0.03)
    assert torch.equal(bare.probe.output_bias, torch.zeros(()))


def test_states_of_an_exit_are_those_of_the_greedy_answers() -> None:
    decoder = random_decoders(TOY.spec(), CPU, torch.float32)["full", False]
    with torch.inference_mode():
        rows = PagedRows(decoder, "full", 1, 100)
        answer = greedy(decoder, "full", [3, 5, 8], 4)
        text = torch.tensor([3, 5, 8, *answer])
        batch = rows.batch([0], [range(len(text))])
        wanted = decoder.run_blocks(decoder.embed(text, batch.positions), batch, rows.pages, 0, 1)
        found = synthetic_exit._states(decoder, "full", [[3, 5, 8], [1, 2]], 0)
    for place, states in enumerate(found[:4]):
        torch.testing.assert_close(states[0], wanted[2 + place], rtol=0, atol=1e-4)


def _part(name: str, run: Callable[[Context, dict[str, Any]], None], seconds: float = 1.0) -> Part:
    return Part(name, name, seconds, 5.0, run)


def test_a_part_that_breaks_or_does_not_fit_leaves_the_others(tmp_path: Path) -> None:
    left: list[float] = []

    def runs(context: Context, found: dict[str, Any]) -> None:
        left.append(context.clock.left())
        found["done"] = True

    context, found = _context(tmp_path), dict[str, Any]()
    with pytest.raises(RuntimeError, match="out of luck"):
        run_parts(context, found, [_part("a", _breaks), _part("b", runs), _part("c", runs, 30.0)])
    assert (found["b"], found["c"]) == ({"done": True}, {"done": True})
    assert found["broken"] == {"a": "RuntimeError: out of luck"}
    assert left == [pytest.approx(70, abs=5), pytest.approx(100, abs=5)]
    late: dict[str, Any] = {}
    run_parts(_context(tmp_path, 4.0), late, [_part("a", _breaks)])
    assert late == {"skipped": ["a: no time left"]}


def test_the_parts_of_the_engines_speeds_have_room_in_their_section(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    taken: list[Part] = []
    monkeypatch.setattr(end_to_end, "run_parts", lambda context, found, parts: taken.extend(parts))
    end_to_end.run(replace(_context(tmp_path), quick=False), {})
    assert sum(part.seconds for part in taken) <= check.SECTIONS["end_to_end"].seconds
    assert [part.key for part in taken if part.key == "llama-1.1b"]


@pytest.mark.parametrize("done", [True, False])
def test_what_is_compiled_has_a_process_and_a_limit_of_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, done: bool
) -> None:
    said: list[list[str]] = []

    def process(line: list[str], **rest: Any) -> SimpleNamespace:
        said.append(line)
        if done:
            Path(line[line.index("--device") - 1]).write_text(json.dumps({"tokens_per_s": 7.0}))
        return SimpleNamespace(returncode=0 if done else 124)

    monkeypatch.setattr(subprocess, "run", process)
    context = replace(_context(tmp_path, 60.0), device=torch.device("cuda"))
    found: dict[str, Any] = {}
    compiled.run(context, found)
    assert said[0][:4] == ["timeout", "-k", "3", "58"]
    (one,) = found["mistral-7b"].values()
    assert one == ({"tokens_per_s": 7.0} if done else {"error": "not done in 58 s (exit status 124)"})
    assert [*found["packaged"]] == [f"transformers generate compiled, {count} streams" for count in (1, 64)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json"]


@pytest.mark.slow
def test_a_compiled_generate_writes_what_it_found(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    line = [sys.executable, "-m", "scripts.gpu_check.compiled", "packaged", "1", str(out)]
    subprocess.run(
        [*line, "--device", "cpu", "--quick"], cwd=ROOT, check=True, capture_output=True, timeout=280
    )
    assert json.loads(out.read_text()).keys() >= {"warm_up_seconds"}


def test_what_a_compiled_generate_compiles_is_not_timed(tmp_path: Path) -> None:
    class Model:
        asked: ClassVar[list[int]] = []

        def generate(self, ids: Tensor, max_new_tokens: int, **rest: Any) -> None:
            self.asked.append(max_new_tokens)

    found = end_to_end.generate_speed(_context(tmp_path), Model(), [[1, 2]], 8, cache_implementation="static")
    assert Model.asked == [8, 8, 8]
    assert len(found["warm_up_seconds"]) == 2
    late = end_to_end.generate_speed(
        _context(tmp_path, -1.0), Model(), [[1, 2]], 8, cache_implementation="static"
    )
    assert "tokens_per_s" not in late
    assert late["error"] == "no time left behind the warm-up"


def test_the_machine_says_which_kernels_were_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    here = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    assert machine._git("rev-parse", "HEAD") == (here.stdout.strip() or None)
    assert machine._git("no-such-command") is None
    monkeypatch.setattr(machine, "_ROOT", tmp_path)
    assert machine._git("rev-parse", "HEAD") is None
    (tmp_path / "a.py").write_text("1")
    (tmp_path / "notes.md").write_text("1")
    first = machine.sources_digest(tmp_path)
    (tmp_path / "notes.md").write_text("2")
    assert machine.sources_digest(tmp_path) == first
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    assert machine.sources_digest(tmp_path) != first


def test_shares_are_of_the_faster_rate(tmp_path: Path) -> None:
    report = Report(tmp_path / "out.json")
    assert report.memory_rate is None
    report.section("machine").update(copy_bytes_per_s=2.0, read_bytes_per_s=3.0)
    assert report.memory_rate == 3.0


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return random_decoders(TOY.spec(), CPU, torch.float32)["full", False]


def test_texts_read_in_chunks_are_those_read_in_one_piece(decoder: Decoder) -> None:
    texts = [[3, 5, 8, 13, 21], [1, 2], [34, 55, 89, 144, 233, 377, 610]]
    with torch.inference_mode():
        whole = logits_of(decoder, "full", texts, [100])
        cut = logits_of(decoder, "full", texts, [2, 1])
        alone = [logits_of(decoder, "full", [text], [1])[0] for text in texts]
    for one, other, third, text in zip(whole, cut, alone, texts, strict=True):
        assert one.shape == (len(text), decoder.spec.vocab_size)
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)
        torch.testing.assert_close(one, third, rtol=0, atol=1e-4)
    assert not torch.allclose(whole[0][0], whole[0][1])


def test_a_greedy_answer_is_the_most_likely_token_each_time(decoder: Decoder) -> None:
    with torch.inference_mode():
        answer = greedy(decoder, "full", [3, 5, 8], 4)
        logits = logits_of(decoder, "full", [[3, 5, 8, *answer]], [100])[0]
    assert answer == logits[2:-1].argmax(-1).tolist()


def test_pages_are_dealt_out_once(decoder: Decoder) -> None:
    rows = PagedRows(decoder, "int4", 3, 100)
    batch = rows.batch([2, 0], [[0, 1, 50], [7]])
    size = rows.layout.page_tokens
    assert batch.positions.tolist() == [0, 1, 50, 7]
    assert batch.query_starts.tolist() == [0, 3, 4]
    assert batch.max_context == 51
    assert batch.slots.tolist() == [
        int(rows.tables[row, p // size]) * size + p % size for row, p in ((2, 0), (2, 1), (2, 50), (0, 7))
    ]
    assert sorted(rows.tables.flatten().tolist()) == list(range(rows.pages.num_pages))


@pytest.mark.parametrize("how", ["company", "nothing"])
def test_results_that_depend_on_company_fail_the_check(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, decoder: Decoder, how: str
) -> None:
    def logits(
        decoder: Decoder, kv: str, texts: Sequence[Sequence[int]], chunks: Sequence[int]
    ) -> list[Tensor]:
        found = [torch.tensor([[float(token), 1.0] for token in text]) for text in texts]
        if how == "company" and len(texts) > 1:
            found[0][3] += 1e-6
        return found

    monkeypatch.setattr(correctness, "logits_of", logits)
    context = _context(tmp_path)
    correctness._invariance(context, "toy", decoder, "full")
    (made,) = context.report.data["checks"]
    assert made["good"] == (how == "nothing")
    assert ("among 2" in made["differ"]) == (how == "company")


def test_a_token_that_is_not_the_others_choice_fails_the_check(tmp_path: Path) -> None:
    logits = torch.tensor([[0.0, 5.0], [0.0, 5.0], [3.0, 2.9], [0.0, 0.0]])
    for answer, tolerance, good in (([1, 0], 0.01, True), ([1, 1], 0.2, True), ([1, 1], 0.05, False)):
        context = _context(tmp_path)
        correctness._held(context, "toy", logits[1:], answer, tolerance)
        assert context.report.data["checks"][0]["good"] == good


def test_logits_that_are_not_numbers_fail_the_check(tmp_path: Path) -> None:
    context = _context(tmp_path)
    correctness._held(context, "toy", torch.full((3, 4), torch.nan), [1, 2], 0.1)
    assert not context.report.data["checks"][0]["good"]


def test_triton_is_off_inside_and_as_before_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXEUNT_TRITON", "1")
    with correctness.without_triton():
        assert os.environ["EXEUNT_TRITON"] == "0"
    assert os.environ["EXEUNT_TRITON"] == "1"


def test_random_int4_weights_have_the_spread_of_full_ones() -> None:
    spec = TOY.spec()
    full = RandomWeights(spec, CPU, torch.float32, None).block(0)["gate_up.weight"]
    block = RandomWeights(spec, CPU, torch.float32, 64).block(0)
    codes = torch.stack((block["gate_up.codes"] & 15, block["gate_up.codes"] >> 4), -1).flatten(1).float()
    int4 = codes * block["gate_up.scales"].float() + block["gate_up.offsets"].float()
    assert int4.std() == pytest.approx(float(full.std()), rel=0.2)
    assert quantize(full, 64).codes.shape == block["gate_up.codes"].shape


def test_buffers_that_take_turns_do_not_fit_the_cache() -> None:
    assert copies(2**20) == 48
    assert copies(2**25) * 2**25 >= 3 * L2_BYTES
    assert copies(2**40) == 1
    calls: list[Callable[[], object]] = [lambda: None, lambda: None]
    assert timed(calls, CPU).method == "clock"


class _Graph:
    """Stands for torch.cuda.CUDAGraph."""

    def replay(self) -> None:
        """Nothing: what was captured is not kept."""


class _Event:
    """Stands for torch.cuda.Event; two milliseconds lie between any two."""

    def __init__(self, enable_timing: bool) -> None:
        self.timed = enable_timing

    def record(self) -> None: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, other: "_Event") -> float:
        return 2.0


@pytest.mark.parametrize("captured", [True, False])
def test_calls_that_no_graph_takes_are_timed_all_the_same(
    monkeypatch: pytest.MonkeyPatch, captured: bool
) -> None:
    @contextmanager
    def graph(made: _Graph) -> Iterator[None]:
        if not captured:
            raise RuntimeError("not permitted when stream is capturing")
        yield

    for name, stands in {
        "CUDAGraph": _Graph,
        "Event": _Event,
        "graph": graph,
        "synchronize": lambda: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stands)
    made: list[int] = []
    took = timed([lambda: made.append(0), lambda: made.append(1)], torch.device("cuda"))
    assert took.seconds == pytest.approx(1e-3)
    assert took.method.startswith("graph" if captured else "events (RuntimeError: not permitted")
    assert made[:4] == [0, 1, 0, 1]


def test_the_table_is_short_whatever_there_is(tmp_path: Path) -> None:
    report = Report(tmp_path / "out.json")
    for number in range(300):
        report.check(f"check {number}", number % 2 == 0, why="x" * 500)
    lines = table(report).splitlines()
    assert len(lines) <= 60
    assert max(map(len, lines)) <= 150


def test_a_source_tree_is_importable_without_installing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(source_tree, "_installed", lambda: False)
    monkeypatch.setattr("tempfile.mkdtemp", lambda prefix: str(tmp_path))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
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
