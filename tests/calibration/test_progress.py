"""How far the work is: bars on a terminal, lines in a file, phases that say which of how many they are."""

import io
import sys

import pytest
from rich.console import Console

from exeunt.calibration.progress import LineProgress, NumberedProgress, TerminalProgress, watched_progress

LONGEST = "Looking for a looser threshold"
SENTENCE = "drafting exit: block_4, " + "up to 3 in a row; " * 8


def test_lines_come_every_few_seconds_and_at_the_end() -> None:
    lines: list[str] = []
    with LineProgress(lines.append, every_s=0.0).phase("Work", 4) as advance:
        advance(0)
        assert lines == []
        advance(1)
        advance(3)
    assert [line.partition(",")[0] for line in lines[:2]] == ["Work: 25 %", "Work: 100 %"]
    assert lines[1].endswith("about 0 s left.")
    assert lines[2].startswith("Work: done in ")
    rare: list[str] = []
    with LineProgress(rare.append).phase("Work", 4) as advance:
        advance(4)
    assert len(rare) == 1, "what takes seconds is one line"


def test_work_that_fails_is_not_called_done() -> None:
    lines: list[str] = []
    with pytest.raises(ValueError, match="no"), LineProgress(lines.append).phase("Work", 1):
        raise ValueError("no")
    assert lines == []


def test_a_file_gets_whole_sentences_in_lines(capsys: pytest.CaptureFixture[str]) -> None:
    progress = watched_progress()
    progress.note(SENTENCE)
    with progress.phase("Work", 1) as advance:
        advance(1)
    told = capsys.readouterr().err.splitlines()
    assert told[0] == SENTENCE
    assert told[1].startswith("Work: done in ")
    assert len(told) == 2


def test_a_terminal_gets_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert isinstance(watched_progress(), TerminalProgress)


@pytest.mark.parametrize("width", [80, 100, 140])
def test_a_numbered_title_stands_whole_beside_its_bar(width: int) -> None:
    screen = io.StringIO()
    console = Console(file=screen, width=width, force_terminal=True, color_system=None)
    with NumberedProgress(TerminalProgress(console), 15).phase(LONGEST, 1) as advance:
        advance(1)
    shown = screen.getvalue()
    assert f"step 1 of 15: {LONGEST}" in shown
    assert "100%" in shown
    assert "…" not in shown


def test_phases_are_counted() -> None:
    lines: list[str] = []
    progress = NumberedProgress(LineProgress(lines.append), 2)
    for title in ("One", "Two"):
        with progress.phase(title, 1):
            pass
        progress.note("decided")
    assert [line.partition(": done")[0] for line in lines] == [
        *("step 1 of 2: One", "decided", "step 2 of 2: Two", "decided"),
    ]
