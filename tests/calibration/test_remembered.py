"""What was measured once is measured no more, on the same machine for the same shape."""

import logging
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from exeunt.calibration.remembered import MeasuredNow, RememberedCosts


@dataclass(frozen=True, slots=True)
class _Costs:
    gate: float
    deep: dict[int, tuple[float, ...]]


class _Clock:
    """Measures something else each time."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self) -> _Costs:
        self.asked += 1
        return _Costs(0.1 * self.asked + 0.2, {3: (1.0 / 3.0, float(self.asked))})


def test_the_second_answer_is_the_first_to_the_last_bit(tmp_path: Path) -> None:
    clock = _Clock()
    first = RememberedCosts(tmp_path).of("exits", ["llama"], _Costs, clock)
    assert RememberedCosts(tmp_path).of("exits", ["llama"], _Costs, clock) == first
    assert first == _Costs(0.1 + 0.2, {3: (1.0 / 3.0, 1.0)})
    assert clock.asked == 1


def test_another_shape_name_or_thread_count_is_measured_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, costs = _Clock(), RememberedCosts(tmp_path)
    costs.of("exits", ["llama"], _Costs, clock)
    costs.of("exits", ["gpt2"], _Costs, clock)
    costs.of("passes", ["llama"], _Costs, clock)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    costs.of("exits", ["llama"], _Costs, clock)
    assert clock.asked == 4


def test_anew_measures_and_keeps_that(tmp_path: Path) -> None:
    clock = _Clock()
    RememberedCosts(tmp_path).of("exits", [], _Costs, clock)
    second = RememberedCosts(tmp_path, anew=True).of("exits", [], _Costs, clock)
    assert second.gate == pytest.approx(0.4)
    assert RememberedCosts(tmp_path).of("exits", [], _Costs, clock) == second


def test_a_spoilt_file_is_measured_anew(tmp_path: Path) -> None:
    clock, costs = _Clock(), RememberedCosts(tmp_path)
    costs.of("exits", [], _Costs, clock)
    (file,) = tmp_path.iterdir()
    file.write_text('{"gate": "soon"}')
    assert costs.of("exits", [], _Costs, clock).gate == pytest.approx(0.4)


def test_a_folder_that_cannot_be_written_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        found = RememberedCosts(tmp_path / "file" / "costs").of("exits", [], _Costs, _Clock())
    assert found.gate == pytest.approx(0.3)
    assert "the next calibration measures anew" in caplog.text


def test_measured_now_remembers_nothing() -> None:
    clock = _Clock()
    MeasuredNow().of("exits", [], _Costs, clock)
    MeasuredNow().of("exits", [], _Costs, clock)
    assert clock.asked == 2
