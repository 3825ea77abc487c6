"""`exeunt bench` and `exeunt eval`: every mode measured, as a table and as JSON. No speed is asserted."""

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from exeunt.calibration.risk import percent
from exeunt.compression.bundle import file_sha256, open_bundle
from exeunt.compression.model import load_bundle
from exeunt.deploy.bench import (
    BenchMode,
    bench,
    modes_of,
)
from exeunt.deploy.bench_engine import engine_driver
from exeunt.deploy.bench_load import BenchError, Load, Trace
from exeunt.deploy.bench_table import speed_table
from exeunt.deploy.bench_text import cut_prompts
from exeunt.deploy.cli import run
from tests.deploy.server_process import BLOCKS, byte_bundle, serving

LOAD = Load(concurrency=2, prompt_tokens=8, max_new_tokens=6, requests=3)
SMALL = ["--concurrency", "2", "--prompt-tokens", "8", "--max-new-tokens", "4", "--requests", "2"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_bundle(tmp_path_factory.mktemp("bench"))


def test_every_mode_of_a_bundle_is_measured_on_the_same_work(bundle: Path) -> None:
    driver = engine_driver(load_bundle(bundle), LOAD)
    try:
        modes = modes_of(driver.offer())
        speeds = list(bench(driver, modes, LOAD))
    finally:
        driver.close()
    assert len(modes) == 8 * 2 + 3  # every variant, off and verified, and the certified targets of one
    assert [speed.name for speed in speeds] == [mode.name for mode in modes]
    assert {speed.name for speed in speeds} > {
        *("int4/int4", "int4/int4 verified", "int4/int4 exits 10% backfill"),
        *("int4/int4 exits 5% propagate", "int4/int4 exits 10% propagate"),
    }
    for speed in speeds:
        assert speed.tokens == 18
        assert speed.tokens_per_second == pytest.approx(18 / speed.seconds)
        assert set(speed.time_to_first_token_s) == set(speed.inter_token_latency_s) == {"p50", "p90", "p99"}
        assert 0 < speed.time_to_first_token_s["p50"] <= speed.time_to_first_token_s["p99"]
        assert speed.blocks == BLOCKS
        if speed.compression["early_exit"] is False:
            assert (speed.exit_rate, speed.mean_depth, speed.passes_saved) == (0, BLOCKS, 0)
            assert speed.ratio is None
        else:
            assert speed.against == speed.name.partition(" verified")[0].partition(" exits")[0]
        assert speed.mean_depth <= BLOCKS


class Scripted:
    """Answers at once: of ten tokens each, as many leave early and are drafted as its mode says."""

    def prompts(self, count: int, tokens: int) -> list[list[int]]:
        return [[1] * tokens] * count

    def run(self, prompts: Any, compression: Any, load: Load) -> list[Trace]:
        early, drafts = compression["early"], compression["drafts"]
        by_exit = {"final": 10 - early, "block_1": early}
        one = Trace(0.0, [0.1] * 10, by_exit, 10 * BLOCKS, BLOCKS, 8 * BLOCKS, drafts, early)
        return [one for _ in prompts]


def test_compared_modes_take_turns() -> None:
    asked: list[tuple[str, int]] = []

    class Noting(Scripted):
        def run(self, prompts: Any, compression: Any, load: Load) -> list[Trace]:
            asked.append((compression["name"], len(prompts)))
            return super().run(prompts, compression, load)

    modes = [
        BenchMode(name, {"name": name, "early": 0, "drafts": 0}, against)
        for name, against in (("a", None), ("a fast", "a"), ("b", None))
    ]
    load = Load(concurrency=2, requests=9)
    assert [speed.tokens for speed in bench(Noting(), modes, load)] == [90] * 3  # type: ignore[arg-type]
    turns = [("a", 3), ("a fast", 3)] * 3
    assert asked == [("a", 2), ("a fast", 2), *turns, ("b", 2), *[("b", 3)] * 3]


@pytest.mark.parametrize(
    ("early", "drafts", "informative"), [(0, 0, False), (1, 0, True), (0, 1, True), (3, 5, True)]
)
def test_a_ratio_needs_tokens_that_leave_or_are_drafted(early: int, drafts: int, informative: bool) -> None:
    modes = [
        BenchMode("off", {"early": 0, "drafts": 0}),
        BenchMode("mode", {"early": early, "drafts": drafts}, "off"),
        BenchMode("alone", {"early": early, "drafts": drafts}, "what was not measured"),
    ]
    off, mode, alone = bench(Scripted(), modes, LOAD)  # type: ignore[arg-type]
    assert off.ratio is alone.ratio is None
    assert mode.ratio == (mode.tokens_per_second / off.tokens_per_second if informative else "uninformative")
    assert mode.passes_saved == pytest.approx(0.2)
    assert (mode.drafts, mode.drafts_accepted) == (3 * drafts, 3 * early)
    console = Console(width=200)
    with console.capture() as shown:
        console.print(speed_table([off, mode]))
    assert ("uninformative" in shown.get()) != informative


def test_prompts_have_their_length_and_differ() -> None:
    prompts = cut_prompts(lambda text: list(text.encode()), 5, 40)
    assert [len(prompt) for prompt in prompts] == [40] * 5
    assert len({tuple(prompt) for prompt in prompts}) == 5
    assert [len(prompt) for prompt in cut_prompts(lambda text: list(text.encode()), 2, 200_000)] == [
        200_000
    ] * 2


def test_a_server_is_measured_over_http(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(str(bundle), "--weights", "int4", log=tmp_path / "log") as server:
        url = str(server.client.base_url)
        assert run(["bench", url, *SMALL, "--json", str(tmp_path / "speed.json")]) == 0
        assert server.stop() == 0
    record = json.loads((tmp_path / "speed.json").read_text())
    assert record["load"]["concurrency"] == 2
    assert record["machine"]["cores"] >= 1
    assert record["model"]["server_versions"]["torch"] == record["machine"]["torch"]
    assert_names_the_bundle(record, bundle)
    modes = {mode["name"]: mode for mode in record["modes"]}
    assert set(modes) >= {
        "int4/full",
        "int4/int4",
        "int4/int4 exits 10% backfill",
        "int4/int4 linear verified",
    }
    assert modes["int4/int4"]["ratio"] is None
    verified = modes["int4/int4 verified"]
    assert verified["against"] == "int4/int4"
    assert verified["ratio"] == "uninformative" or verified["ratio"] > 0
    assert 0 <= verified["drafts_accepted"] <= verified["drafts"]
    assert modes["int4/int4 exits 10% backfill"]["passes_saved"] >= 0
    assert all(mode["tokens"] == 8 for mode in modes.values())
    assert "int4/int4 exits 10% backfill" in capsys.readouterr().out


def assert_names_the_bundle(record: dict[str, Any], bundle: Path) -> None:
    """A result says whose figures it holds, down to the weights, and on what they were measured."""
    model, about = record["model"], open_bundle(bundle).manifest.base_model
    assert (model["name"], model["sha256"]) == (about.name, about.sha256)
    assert model["sha256"] == file_sha256(bundle.parent / "checkpoint" / "model.safetensors")
    assert (model["blocks"], model["exits"]) == (BLOCKS, ["block_1"])
    assert model["bundle_version"] == "0.1.0"
    assert all(record["machine"][fact] for fact in ("cpu", "exeunt", "torch"))


def test_a_result_names_its_bundle(bundle: Path, tmp_path: Path) -> None:
    assert run(["bench", str(bundle), *SMALL, "--json", str(tmp_path / "speed.json")]) == 0
    assert_names_the_bundle(json.loads((tmp_path / "speed.json").read_text()), bundle)


def test_a_result_names_a_plain_checkpoint(bundle: Path, tmp_path: Path) -> None:
    checkpoint = bundle.parent / "checkpoint"
    assert run(["bench", str(checkpoint), *SMALL, "--json", str(tmp_path / "speed.json")]) == 0
    model = json.loads((tmp_path / "speed.json").read_text())["model"]
    assert model["name"] == "checkpoint"
    assert model["sha256"] == file_sha256(checkpoint / "model.safetensors")
    assert (model["exits"], model["bundle_version"]) == ([], None)


def test_a_server_that_is_not_there_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "http://127.0.0.1:9", *SMALL]) == 1
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "127.0.0.1:9" in told


def test_lengths_beyond_the_model_are_refused(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", str(bundle), "--prompt-tokens", "5000"]) == 2
    told = capsys.readouterr().err
    assert "--prompt-tokens is 5000 and --max-new-tokens 64, together 5064" in told
    assert "limit is 4096" in told
    assert run(["bench", str(bundle), "--concurrency", "999999999999"]) == 2
    assert "--concurrency is 999999999999" in (told := capsys.readouterr().err)
    assert "bytes free" in told


def test_a_servers_variables_have_no_part_in_measuring(
    bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (
        ("PORT", "eighty"),
        ("KV_CACHE_MEMORY", "1"),
        ("DTYPE", "bfloat16"),
        ("WEIGHTS", "full"),
    ):
        monkeypatch.setenv(f"EXEUNT_{name}", value)
    assert run(["bench", str(bundle), *SMALL]) == 0
    assert "int4/int4" in capsys.readouterr().out


def test_modes_are_named_by_every_digit_of_their_targets() -> None:
    assert [percent(target) for target in (0.01, 0.015, 0.1, 0.07, 0.1000000001)] == [
        "1%",
        "1.5%",
        "10%",
        "7%",
        "10.00000001%",
    ]


def test_no_token_is_an_error_not_a_division() -> None:
    class Silent:
        def offer(self) -> None: ...

        def prompts(self, count: int, tokens: int) -> list[list[int]]:
            return [[1]] * count

        def run(self, *_: object) -> list[object]:
            return []

    with pytest.raises(BenchError, match="No token"):
        list(bench(Silent(), [BenchMode("mode", {})], LOAD))  # type: ignore[arg-type]


def test_eval_prints_every_mode_with_its_speed(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("exeunt.deploy.evaluation.LOAD", LOAD)
    text = tmp_path / "text.txt"
    text.write_text("It was a dark and stormy night. " * 40)
    told = tmp_path / "eval.json"
    asked = ["--tokens", "400", "--seed", "3", "--json", str(told)]
    assert run(["eval", str(bundle), "--data", str(text), *asked]) == 0
    shown = capsys.readouterr()
    printed = shown.out
    assert "Evaluating every mode: done in" in shown.err, "lines, not bars, where no terminal looks on"
    record = json.loads(told.read_text())
    assert record["tokens"] > 0
    assert_names_the_bundle(record, bundle)
    for mode in record["modes"]:
        assert mode["name"] in printed
        assert mode["perplexity"]["value"] > 0
        assert mode["tokens_per_second"] > 0
    assert "tokens/s" in printed


def test_eval_of_a_missing_text_is_one_line(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["eval", str(bundle), "--data", "/nowhere.txt"]) == 2
    assert capsys.readouterr().err.count("exeunt: /nowhere.txt is neither a file nor a folder") == 1


def test_loading_and_compiling_are_phases_of_their_own(
    bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[str] = []
    monkeypatch.setattr("exeunt.calibration.kernel_compilation.is_compiled", lambda: bool(compiled))
    monkeypatch.setattr(
        "exeunt.calibration.kernel_compilation.native_library", lambda: compiled.append("once")
    )
    for _ in range(2):
        assert run(["bench", str(bundle), "--device", "cpu", "--prompt-tokens", "5000"]) == 2
    told = capsys.readouterr().err
    assert told.index("Compiling the CPU kernels, once") < told.index("Loading the model")
    assert told.count("Compiling the CPU kernels") == len(compiled) == 1
    assert told.count("Loading the model") == 2


@pytest.mark.parametrize("command", ["eval", "bench", "inspect"])
def test_a_result_that_has_no_place_is_refused_before_the_work(
    command: str, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--data", "z"] if command == "eval" else []
    assert run([command, str(bundle), *more, "--json", str(tmp_path)]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.count("\n") == 1
    assert f"--json is {tmp_path}" in told.err


@pytest.mark.parametrize("command", ["eval", "bench", "inspect"])
def test_a_result_does_not_overwrite_what_is_read(
    command: str, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, manifest = tmp_path / "text.txt", bundle / "manifest.json"
    text.write_text("kept")
    before = manifest.read_bytes()
    more = ["--data", str(text)] if command == "eval" else []
    for path in (manifest, bundle / "new.json", *([text] if more else [])):
        assert run([command, str(bundle), *more, "--json", str(path)]) == 2
        told = capsys.readouterr()
        assert (told.out, told.err.count("\n")) == ("", 1)
        assert f"--json is {path}, which is " in told.err
    assert (text.read_text(), manifest.read_bytes()) == ("kept", before)
    assert not (bundle / "new.json").exists()


def test_inspect_prints_and_writes(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", str(bundle), "--json", str(tmp_path / "bundle.json")]) == 0
    assert "block_1" in capsys.readouterr().out
    assert json.loads((tmp_path / "bundle.json").read_text())
