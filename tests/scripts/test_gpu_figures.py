"""The pictures of the GPUs' figures are those of the records beside them."""

from pathlib import Path

import pytest

from scripts import gpu_figures
from scripts.gpu_figures import IMAGES, figures, write_figures
from scripts.gpu_page import contents
from scripts.gpu_records import gpu_records
from scripts.report_figures import standalone
from tests.scripts.gpu_record import gpu_record, toy_record


def test_the_pictures_show_the_records() -> None:
    for name, record in gpu_records().items():
        for figure in figures(name, record):
            kept = (IMAGES / f"{figure.name}.svg").read_text(encoding="utf-8")
            assert kept == standalone(figure.svg), "draw them anew with python -m scripts.result_tables"


def test_every_gpu_has_pictures_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    records = {"gpu-check-nvidia-b1": gpu_record(), "gpu-check-cpu": toy_record()}
    monkeypatch.setattr(gpu_figures, "gpu_records", lambda: records)
    written = [path.name for path in write_figures(tmp_path)]
    assert written == ["gpu-nvidia-b1-steps.svg", "gpu-nvidia-b1-linears.svg"]
    shown = "\n".join(contents("gpu-check-nvidia-b1", records["gpu-check-nvidia-b1"]).values())
    assert all(f"(images/{name})" in shown for name in written)


def test_another_record_gives_other_pictures() -> None:
    record = gpu_record()
    before = [figure.svg for figure in figures("gpu-check-nvidia-b1", record)]
    record["sections"]["decode"]["steps"][0]["ms"] *= 2
    case = next(each for each in record["sections"]["kernels"]["cases"] if each["op"] == "int4_linear")
    case["us"] *= 2
    again = figures("gpu-check-nvidia-b1", record)
    assert all(one != two.svg for one, two in zip(before, again, strict=True))


def test_steps_are_drawn_where_no_rate_is_known() -> None:
    record = gpu_record()
    record["sections"] = {"decode": record["sections"]["decode"]}
    (steps,) = figures("gpu-check-nvidia-b1", record)
    assert "<svg" in steps.svg
