"""Signals whose exception is lost on the way: they take effect all the same, at the next boundary."""

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from exeunt.calibration.progress import ProgressReport
from exeunt.deploy import serve as serving
from exeunt.deploy.cli import run
from exeunt.deploy.signals import (
    Interrupted,
    InterruptibleProgress,
    Interruption,
    end_at_once,
    handling,
    interruptible,
    leave_to,
)
from exeunt.server.api.service import Availability
from exeunt.server.settings import given_settings
from tests.calibration.silent_progress import SilentProgress
from tests.deploy.server_process import environment

IMPORTING = """
import os, signal, sys
class Wish:
    def __del__(self):
        os.kill(os.getpid(), signal.Signals({number}))
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "exeunt.deploy.serve":
            Wish()
sys.meta_path.insert(0, Finder())
from exeunt.deploy.cli import main
main(["serve", "/nowhere/at/all"])
"""
ENDING = """
import atexit, os, signal, sys
@atexit.register
def impatient():
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(os.getpid(), number)
from exeunt.deploy.cli import main
main(["--help"])
"""


class Wish:
    """Sends this process a signal when it is dropped: what the handler raises then, Python prints and forgets."""

    def __init__(self, number: int = signal.SIGTERM) -> None:
        self._number = number

    def __del__(self) -> None:
        os.kill(os.getpid(), self._number)


def lose_a_signal(number: int = signal.SIGTERM) -> None:
    Wish(number)


@pytest.fixture(autouse=True)
def handlers_as_before() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def called(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=environment(),
    )


class Start:
    """A start of the server with its parts replaced, and what became of it."""

    def __init__(self, patch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture) -> None:
        self.steps: list[str] = []
        self._patch, self._log = patch, log
        patch.setattr(serving, "_exit_later", lambda seconds, status: self.steps.append("exit later"))
        patch.setattr(Availability, "opens", lambda _, service: self.steps.append("opens"))
        self.replace("packaged_bundle", lambda **given: Path())
        self.replace("load_model", lambda source, settings: None)
        self.replace("start_service", lambda model, settings: None)

    def replace(self, part: str, by: Callable[..., Any]) -> None:
        """Have `by` do the work of `part`."""

        def step(*arguments: Any, **named: Any) -> Any:
            self.steps.append(part)
            return by(*arguments, **named)

        self._patch.setattr(serving, part, step)

    def status(self) -> int:
        """Serve until stopped."""
        with self._log.at_level(logging.INFO, "exeunt"), serving.bind("127.0.0.1", 0) as sock:
            return serving.serve(given_settings({}), sock)

    @property
    def stopped_before_ready(self) -> bool:
        return any(line.startswith("Stopped before the model was ready.") for line in self._log.messages)


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Start:
    return Start(monkeypatch, caplog)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lost_while_loading_stops_the_start(
    start: Start, number: int, capfd: pytest.CaptureFixture[str]
) -> None:
    start.replace("load_model", lambda source, settings: lose_a_signal(number))
    assert start.status() == 0
    assert start.steps == ["packaged_bundle", "load_model", "exit later"]
    assert start.stopped_before_ready
    assert "Traceback" not in capfd.readouterr().err


def test_a_signal_lost_at_the_end_of_calibrating_stops_the_start(start: Start) -> None:
    def calibrate(on_calibration: Callable[[], None], **given: Any) -> Path:
        on_calibration()
        lose_a_signal()
        return Path()

    start.replace("packaged_bundle", calibrate)
    assert start.status() == 0
    assert start.steps == ["packaged_bundle"]
    assert start.stopped_before_ready


def test_a_signal_lost_before_calibrating_stops_it_before_it_begins(start: Start) -> None:
    def calibrate(on_calibration: Callable[[], None], **given: Any) -> Path:
        lose_a_signal()
        on_calibration()
        start.steps.append("calibrating")
        return Path()

    start.replace("packaged_bundle", calibrate)
    assert start.status() == 0
    assert start.steps == ["packaged_bundle", "exit later"]


def test_a_signal_lost_while_waiting_for_another_process_stops_the_start(start: Start) -> None:
    def wait(while_waiting: Callable[[], None], **given: Any) -> Path:
        while_waiting()
        lose_a_signal()
        while_waiting()
        start.steps.append("still waiting")
        return Path()

    start.replace("packaged_bundle", wait)
    assert start.status() == 0
    assert start.steps == ["packaged_bundle", "exit later"]
    assert start.stopped_before_ready


def test_a_signal_lost_while_calibrating_stops_it_at_the_next_step(start: Start) -> None:
    def calibrate(on_calibration: Callable[[], None], progress: ProgressReport, **given: Any) -> Path:
        on_calibration()
        with progress.phase("Work", 2) as advance:
            advance(1)
            lose_a_signal()
            start.steps.append("half done")
            advance(1)
            start.steps.append("done")
        return Path()

    start.replace("packaged_bundle", calibrate)
    assert start.status() == 0
    assert start.steps == ["packaged_bundle", "half done"]
    assert start.stopped_before_ready


@pytest.mark.parametrize("calibrating", [True, False])
def test_a_second_signal_while_the_model_is_made_ready_ends_the_process_at_once(
    start: Start, monkeypatch: pytest.MonkeyPatch, calibrating: bool
) -> None:
    monkeypatch.setattr(serving, "_exit_now", lambda status: start.steps.append(f"exit {status}"))

    def prepare(on_calibration: Callable[[], None], **given: Any) -> Path:
        if calibrating:
            on_calibration()
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:  # cleaning up, which hangs
            os.kill(os.getpid(), signal.SIGTERM)
            start.steps.append("the same wish")
            monkeypatch.setattr("exeunt.deploy.signals.CLEANING_UP_S", 0)  # as if that were long ago
            os.kill(os.getpid(), signal.SIGINT)
        return Path()

    start.replace("packaged_bundle", prepare)
    assert start.status() == 0
    assert [step for step in start.steps if step != "exit later"] == [
        "packaged_bundle",
        "the same wish",
        "exit 130",
    ]


def test_an_error_after_a_signal_is_taken_for_its_doing(start: Start) -> None:
    def load(source: object, settings: object) -> None:
        lose_a_signal()
        raise ImportError("half a module")

    start.replace("load_model", load)
    assert start.status() == 0
    assert start.stopped_before_ready


def test_an_error_without_one_is_told(start: Start) -> None:
    def load(source: object, settings: object) -> None:
        raise ImportError("half a module")

    start.replace("load_model", load)
    with pytest.raises(ImportError, match="half a module"):
        start.status()
    assert not start.stopped_before_ready


def test_a_signal_while_the_engine_starts_opens_nothing(start: Start) -> None:
    class Engine:
        @staticmethod
        def stop() -> None:
            start.steps.append("engine stopped")

    class Service:
        engine = Engine()

        @staticmethod
        def close() -> None:
            start.steps.append("service closed")

    def start_service(model: object, settings: object) -> type[Service]:
        lose_a_signal()
        return Service

    start.replace("start_service", start_service)
    assert start.status() == 0
    assert start.steps == [
        "packaged_bundle",
        "load_model",
        "start_service",
        "engine stopped",
        "service closed",
    ]


@pytest.mark.parametrize(("number", "word"), [(signal.SIGTERM, "terminated"), (signal.SIGINT, "interrupted")])
def test_a_signal_among_the_imports_ends_the_process(number: signal.Signals, word: str) -> None:
    ended = called(IMPORTING.format(number=int(number)))
    assert (ended.returncode, ended.stderr) == (128 + number, f"exeunt: {word}\n")


def test_signals_while_the_interpreter_ends_are_ignored() -> None:
    ended = called(ENDING)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "calibrate" in ended.stdout


class TestHandling:
    def test_handlers_come_back(self) -> None:
        before = signal.getsignal(signal.SIGINT)
        with handling(Interruption()):
            assert signal.getsignal(signal.SIGINT) != before
        assert signal.getsignal(signal.SIGINT) == before

    def test_the_one_for_imports_does_not(self) -> None:
        leave_to(end_at_once)
        with handling(Interruption()):
            pass
        assert signal.getsignal(signal.SIGTERM) == signal.getsignal(signal.SIGINT) == signal.SIG_IGN

    def test_what_else_cannot_be_raised_is_told(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Broken:
            def __del__(self) -> None:
                raise ValueError("broken")

        told: list[Any] = []
        monkeypatch.setattr(sys, "unraisablehook", lambda lost: told.append(type(lost.exc_value)))
        with handling(Interruption()):
            Broken()
            lose_a_signal()
        Broken()
        assert told == [ValueError, ValueError]


class TestInterruptible:
    def test_an_error_after_a_lost_signal_is_the_signal(self) -> None:
        def work() -> None:
            lose_a_signal()
            raise ValueError("a consequence")

        with pytest.raises(Interrupted) as caught, interruptible():
            work()
        assert caught.value.number == signal.SIGTERM

    def test_an_error_without_one_is_itself(self) -> None:
        with pytest.raises(ValueError, match="own"), interruptible():
            raise ValueError("its own")

    @pytest.mark.parametrize("step", ["enter", "advance", "leave", "note"])
    def test_every_step_of_a_progress_asks(self, step: str) -> None:
        reached = []

        def reach(now: str) -> None:
            if now == step:
                lose_a_signal()
            reached.append(now)

        def work(interruption: Interruption) -> None:
            progress = InterruptibleProgress(SilentProgress(), interruption)
            reach("enter")
            with progress.phase("Work", 1) as advance:
                reach("advance")
                advance(1)
                reach("leave")
            reach("note")
            progress.note("done")

        with pytest.raises(Interrupted), interruptible() as interruption:
            work(interruption)
        assert reached[-1] == step

    def test_a_lost_signal_stops_the_command_calibrate(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def make_bundle(options: object, progress: ProgressReport) -> Path:
            lose_a_signal()
            progress.note("still at work")
            return tmp_path

        monkeypatch.setattr("exeunt.deploy.calibrate.calibrate", make_bundle)
        words = ["calibrate", "owner/model", "--out", str(tmp_path / "bundle"), "--data", "text"]
        assert run(words) == 128 + signal.SIGTERM
        assert capsys.readouterr().err == "exeunt: terminated before it was done; nothing was written\n"

    def test_a_stopped_eval_says_so_in_one_line(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(
            "exeunt.deploy.preparation.load_to_measure", lambda *_: lose_a_signal(signal.SIGINT)
        )
        monkeypatch.setattr("exeunt.deploy.evaluation.evaluate_and_time", os.kill)
        written = tmp_path / "eval.json"
        assert run(["eval", "owner/model", "--data", "text", "--json", str(written)]) == 130
        assert capsys.readouterr().err == "exeunt: interrupted before it was done; nothing was written\n"
        assert not written.exists()
