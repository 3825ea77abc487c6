"""Measures the packaged model beside llama.cpp in one process and writes JSON. Not part of `make bench`.

It needs the packages `llama-cpp-python` and `gguf`, which the project does not depend on. Both sides get the same token
ids and as many threads, and run in turn as in `scripts/bench.py`. That it is the same model is checked first: most of
the first tokens must be the same in full precision.

A llama.cpp that GCC 12 built for a processor with AMX ends in an illegal instruction (see ggml-org/llama.cpp#26954):
`CMAKE_ARGS=-DCMAKE_CXX_FLAGS=-fno-dse pip install --no-binary llama-cpp-python llama-cpp-python` builds one that runs.
"""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import typer
from rich.console import Console
from rich.table import Table

from exeunt.deploy.bench_load import BenchError
from exeunt.deploy.packaged_model import path as checkpoint
from scripts.bench_runs import (
    OFF,
    RESULTS,
    VARIANTS,
    Count,
    EngineRuns,
    Out,
    Sizes,
    in_turn,
    packaged_runs,
    write_result,
)

try:
    from scripts.llama_cpp_runs import LlamaCppFiles, LlamaCppMode, LlamaCppRuns, system_info
except ModuleNotFoundError as error:
    raise SystemExit(f"There is no {error.name}: pip install llama-cpp-python gguf") from error

PACKAGES: Final = ("llama-cpp-python", "gguf")
FULL, INT4 = VARIANTS
FIRST = 16  # tokens of each text in which the two models must agree
SAME_MODEL = 0.9  # the least share of them

Answers = Sequence[Sequence[int]]

console = Console()


def main(
    out: Out = None,
    prompt_tokens: Count = 128,
    new_tokens: Count = 256,
    repeats: Count = 5,
    streams: Count = 8,
) -> None:
    """Measure, print tables, write JSON."""
    sizes = Sizes(prompt_tokens, new_tokens, repeats, streams)
    with packaged_runs(sizes) as ours, TemporaryDirectory() as folder:
        measured = _Comparison(ours, Path(folder), sizes)
        measured.check_the_model()
        for count in dict.fromkeys((1, streams)):
            measured.measure(count)
    path = out or RESULTS / "packaged-llama-cpp.json"
    write_result(path, ours.model, sizes, **measured.record())
    _print(measured.rows, measured.texts())
    console.print(f"written to {path}")


class _Comparison:
    """Our engine and llama.cpp in turn, and what both wrote."""

    def __init__(self, ours: EngineRuns, folder: Path, sizes: Sizes) -> None:
        self.rows: dict[str, Any] = {}
        self._ours, self._sizes = ours, sizes
        self._files = LlamaCppFiles(checkpoint(), folder)
        self._answers: dict[str, Answers] = {}  # of the last number of streams
        self._modes: dict[str, Any] = {}

    def check_the_model(self) -> None:
        """Raise BenchError where fewer than SAME_MODEL of llama.cpp's first tokens in float32 are ours."""
        prompts = self._ours.prompts(self._sizes.streams)
        with closing(self._runs(LlamaCppMode("F32", "F32"), len(prompts))) as theirs:
            answers = theirs.at_once(prompts).answers
        wanted = self._ours.at_once(prompts, VARIANTS[FULL]).answers
        share = equal_share([a[:FIRST] for a in answers], [b[:FIRST] for b in wanted])
        if share < SAME_MODEL:
            raise BenchError(f"Only {share:.0%} of the first {FIRST} tokens are equal: not the same model.")

    def measure(self, streams: int) -> None:
        """Every pair of modes with as many streams."""
        prompts = self._ours.prompts(streams)
        called = "one stream" if streams == 1 else f"{streams} streams"
        for label, early_exit, mode in _pairs():
            name = label if early_exit == OFF else f"{label}, verified"
            with closing(self._runs(mode, streams)) as theirs:
                self._modes[mode.name] = theirs.about()
                row, pairs = in_turn(
                    partial(self._ours.at_once, prompts, VARIANTS[label], early_exit),
                    partial(theirs.at_once, prompts),
                    self._sizes.repeats,
                )
            self.rows[f"{called}, {name}, against {mode.name}"] = row
            self._answers[name], self._answers[f"llama.cpp {mode.name}"] = (run.answers for run in pairs[0])
            console.print(f"{called}, {name}, against {mode.name}: {row['ratio']:.2f}")

    def texts(self) -> dict[str, Any]:
        """How much of each text of the largest number of streams is our text in full precision."""
        wanted = self._answers[FULL]
        return {
            name: {
                "tokens_equal": equal_share(answers, wanted),
                "equal_before_first_other": statistics.median(map(equal_before, answers, wanted)),
            }
            for name, answers in self._answers.items()
            if name != FULL
        }

    def record(self) -> dict[str, Any]:
        """What the JSON says besides the model, the machine and the sizes."""
        versions = {package: version(package) for package in PACKAGES}
        about = {**versions, "system_info": system_info(), "modes": self._modes}
        return {"llama_cpp": about, "results": self.rows, "texts": self.texts()}

    def _runs(self, mode: LlamaCppMode, streams: int) -> LlamaCppRuns:
        return LlamaCppRuns(self._files, mode, streams, self._sizes.prompt_tokens, self._sizes.new_tokens)


def equal_share(answers: Answers, wanted: Answers) -> float:
    """The share of tokens that are those wanted in their places."""
    pairs = [pair for texts in zip(answers, wanted, strict=True) for pair in zip(*texts, strict=True)]
    return sum(a == b for a, b in pairs) / len(pairs)


def equal_before(answer: Sequence[int], wanted: Sequence[int]) -> int:
    """How many tokens come before the first that is not the one wanted."""
    differ = (place for place, (a, b) in enumerate(zip(answer, wanted, strict=True)) if a != b)
    return next(differ, len(wanted))


def _pairs() -> Iterator[tuple[str, Mapping[str, Any], LlamaCppMode]]:
    """Our variant, its exits, llama.cpp's modes beside it; verified exits against its fastest keys and values."""
    for weights in ("F32", "F16"):
        for flash_attention in (True, False):
            yield FULL, OFF, LlamaCppMode(weights, weights, flash_attention)
    for flash_attention in (True, False):
        yield INT4, OFF, LlamaCppMode("Q4_0", "F16", flash_attention)
    for keys_values in ("Q8_0", "Q4_0"):  # which need flash attention
        yield INT4, OFF, LlamaCppMode("Q4_0", keys_values)
    yield INT4, {"mode": "verified"}, LlamaCppMode("Q4_0", "Q8_0")


def _print(rows: Mapping[str, Any], texts: Mapping[str, Any]) -> None:
    table = Table("what", "tokens/s", "llama.cpp", "ratio", "min–max")
    for name, row in rows.items():
        speeds = (f"{row['tokens_per_s']:.0f}", f"{row['against_tokens_per_s']:.0f}")
        table.add_row(name, *speeds, f"{row['ratio']:.2f}", f"{row['ratio_min']:.2f}–{row['ratio_max']:.2f}")
    console.print(table)
    table = Table("text against full weights", "tokens equal", "before the first other, median")
    for name, row in texts.items():
        table.add_row(name, f"{row['tokens_equal']:.1%}", f"{row['equal_before_first_other']:g}")
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
