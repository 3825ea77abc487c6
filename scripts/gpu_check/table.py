"""The results as a short table of plain text, what matters most in it."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from scripts.gpu_check.report import Found, Report

_MOST_LINES = 60
_FAILURES = 12
_LONGEST = 8
_MOST_OTHERS = 16


def table(report: Report) -> str:
    """At most 60 lines: failures first, then the figures, at the end what was not tested."""
    last = [f"NOT TESTED: {each}" for each in report.not_tested]
    lines = [
        *_machine(report),
        *_checks(report),
        *_tests(report),
        *_kernels(report),
        *_tuning(report),
        *_decode(report),
        *_ends(report),
        *_hosts(report),
    ]
    most = _MOST_LINES - len(last)
    if len(lines) > most:
        left = len(lines) - most + 1
        lines = [*lines[: most - 1], f"... {left} more lines; all is in the JSON"]
    return "\n".join(line[:150] for line in [*lines, *last])


def _machine(report: Report) -> Iterator[str]:
    found = report.section("machine")
    keys = ("copy_bytes_per_s", "read_bytes_per_s", "matmul_bf16_flop_per_s")
    copy, read, flops = (found.get(key) or 0.0 for key in keys)
    versions = "  " + ", ".join(f"{name} {found.get(name)}" for name in ("torch", "triton", "transformers"))
    name = found.get("gpu", found.get("device"))
    yield f"{name}: copy {copy / 1e9:.0f} GB/s, read {read / 1e9:.0f} GB/s, bf16 {flops / 1e12:.0f} TFLOP/s"
    yield versions
    if (metrics := report.data.get("metrics", "counted")) != "counted":
        yield f"  engines' metrics {metrics}"
    sections = [(name, each) for name, each in report.data["sections"].items() if "status" in each]
    yield "sections: " + ", ".join(
        f"{name} {each.get('status')} {each.get('seconds', 0):.0f} s" for name, each in sections
    )
    for name, each in sections:
        if each["status"] == "needs":
            yield f"  {name} needs {', '.join(each['needs'])}"
        if "without" in each:
            yield f"  {name} without {'; '.join(_lacking(*item) for item in each['without'].items())}"
        if left_out := list(_left_out(each)):
            yield f"  {name} left out {len(left_out)}: {left_out[0]}"


def _left_out(found: Found) -> Iterator[str]:
    """What a section or a part of it left out."""
    for name, each in found.items():
        if name == "skipped" and isinstance(each, list):  # of tests it is their number
            yield from each
        elif isinstance(each, dict):
            yield from _left_out(each)


def _lacking(what: str, names: Sequence[str]) -> str:
    return f"{what} (needs {', '.join(names)})"


def _checks(report: Report) -> Iterator[str]:
    checks, failures = report.data["checks"], report.failures
    yield f"checks: {sum(check['good'] for check in checks)} of {len(checks)} good"
    for failure in failures[:_FAILURES]:
        rest = {key: value for key, value in failure.items() if key not in ("name", "good")}
        yield f"  FAILED {failure['name']}: {rest}"
    if len(failures) > _FAILURES:
        yield f"  and {len(failures) - _FAILURES} more"


def _tests(report: Report) -> Iterator[str]:
    found = report.section("tests")
    if "passed" in found:
        cut = ", cut short" if found.get("cut_short") else ""
        yield f"tests: {found['passed']} passed, {found['failed']} failed, {found['skipped']} skipped{cut}"
        for test, says in found["failures"][:6]:
            yield f"  {test.rsplit('/', 1)[-1]}: {says}"


def _kernels(report: Report) -> Iterator[str]:
    cases = [case for case in report.section("kernels").get("cases", []) if "us" in case]
    linears = [case for case in cases if case["op"] == "int4_linear"]
    if linears:
        yield "linear, us (share of memory rate)    rows   int4            full            torch"
    for case in linears[:16]:
        both = [_time(case), _time(case["full_linear"]), _time(case["torch"])]
        yield f"  {case['layer']:<34}{case['rows']:>5}   " + " ".join(f"{each:<15}" for each in both)
    attention = [case for case in cases if case["op"] == "paged_attention"]
    if attention:
        yield "attention, us (share of memory rate) full            int4            sdpa            full/int4"
    for full in (case for case in attention if case["kv"] == "full"):
        same = (full["sequences"], full["context"])
        int4 = next(
            (c for c in attention if c["kv"] == "int4" and (c["sequences"], c["context"]) == same), None
        )
        times = [_time(full), _time(int4), _time(full.get("sdpa"))]
        ratio = f"{full['us'] / int4['us']:.2f}" if int4 else ""
        yield f"  {same[0]:>3} x {same[1]:<27}" + " ".join(f"{each:<15}" for each in times) + f" {ratio}"
    free = [(case, kind) for case in linears for kind in ("full_free", "int4_free") if kind in case]
    if free:
        yield "chosen freely for its rows, us:"
        yield from _wrapped(
            f"{case['layer']} {case['rows']} {kind} {case[kind]['us']:.1f}" for case, kind in free
        )
    rest = [case for case in cases if case["op"] not in ("int4_linear", "paged_attention")]
    yield from _wrapped(f"{_sizes(case)} {case['us']:.1f} us" for case in rest[:_MOST_OTHERS])


def _tuning(report: Report) -> Iterator[str]:
    found = report.section("tuning")
    if "launches" in found:
        gains = sorted((each["speed_up"] for each in found["launches"]), reverse=True)
        best = f", at most {gains[0]:.2f} times as fast" if gains else ""
        yield (
            f"measured launches: {found['tried']} of {found['calls']} calls, {found['faster']} faster than by "
            f"the rule{best}; {len(found['failed'])} did not run, {len(found['unequal'])} with other bits"
        )


def _decode(report: Report) -> Iterator[str]:
    steps = report.section("decode").get("steps", [])
    if steps:
        yield "decode step            weights/kv    ms (share of floor)   eager ms"
    for step in steps[:18]:
        share = f"({step['share_of_floor']:.0%})" if "share_of_floor" in step else ""
        size = f"{step['model']} {step['sequences']} x {step['context']}"
        how = "" if step["method"] in ("graph", "clock") else step["method"][:50]
        eager = f"{step['eager_ms']:.2f}" if "eager_ms" in step else ""
        yield f"  {size:<24} {step['weights']}/{step['kv']:<8} {step['ms']:.3f} {share:<8} {eager:>12} {how}"


def _ends(report: Report) -> Iterator[str]:
    for section in ("end_to_end", "long_contexts", "exits", "compiled", "grid"):
        found = report.section(section)
        models = {"": found} | {name: each for name, each in found.items() if isinstance(each, dict)}
        for name, each in models.items():
            rows = [f"{what} {row['tokens_per_s']:.0f}" for what, row in each.items() if _is_speed(row)]
            if rows:
                yield f"tokens/s {name}:"
                yield from _wrapped(rows)


def _hosts(report: Report) -> Iterator[str]:
    for name, each in report.section("host").items():
        if isinstance(each, dict) and "functions" in each:
            longest = list(each["functions"].items())[:_LONGEST]
            yield f"host, {name}: {each['us']:.0f} us a tick"
            yield from _wrapped(f"{function.rpartition(': ')[2]} {us:.0f}" for function, us in longest)


def _wrapped(parts: Iterable[str]) -> Iterator[str]:
    line = " "
    for part in parts:
        if len(line) + len(part) > 140:
            yield line
            line = " "
        line += f" {part};"
    if line.strip():
        yield line


def _is_speed(row: Any) -> bool:
    return isinstance(row, dict) and "tokens_per_s" in row


def _time(figures: Found | None) -> str:
    if figures is None or "us" not in figures:
        return "-"
    share = figures.get("share_of_memory")
    mark = "" if figures["method"] in ("graph", "clock") else "*"
    return f"{figures['us']:.1f}{mark}" + ("" if share is None else f" ({share:.0%})")


def _sizes(case: Found) -> str:
    return " ".join(str(case[key]) for key in ("op", "kv", "rows", "tokens", "vocab") if key in case)
