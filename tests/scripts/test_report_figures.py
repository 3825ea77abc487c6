"""Pictures taken out of a report stand alone."""

import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from exeunt.calibration.report.drawing import DARK, LIGHT
from exeunt.calibration.report.page import report_html
from scripts.report_figures import FigureError, figures_of, main, standalone, write_figures
from tests.calibration.report_content import content

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    (folder / "report.html").write_text(report_html(content()), encoding="utf-8")
    return folder


def test_every_picture_is_a_file_of_its_own(bundle: Path, tmp_path: Path) -> None:
    written = write_figures(bundle, tmp_path, [])
    names = list(figures_of((bundle / "report.html").read_text()))
    assert [path.name for path in written] == [f"report-{name}.svg" for name in names]
    for path in written:
        root = ET.fromstring(path.read_text())
        assert root.tag == f"{SVG}svg"
        assert root.find(f".//{SVG}text") is not None
        ids = {each.get("id") for each in root.iter()}
        wanted = re.findall(r'(?:href="#|url\(#)([^")]+)', path.read_text())
        assert set(wanted) <= ids


def test_it_has_a_background_and_all_its_colours(bundle: Path, tmp_path: Path) -> None:
    text = write_figures(bundle, tmp_path, ["modes"])[0].read_text()
    root = ET.fromstring(text)
    paper = root.find(f"{SVG}rect")
    assert paper is not None
    width, height = (root.get("viewBox") or "").split()[2:]
    assert (paper.get("width"), paper.get("height")) == (width, height)
    assert "currentColor" not in text
    light, dark = text.split("@media (prefers-color-scheme: dark)")
    for variable in set(re.findall(r"var\(--([a-z0-9-]+)\)", text)) - {"sans"}:
        assert f"--{variable}: {LIGHT[variable]};" in light
        assert f"--{variable}: {DARK[variable]};" in dark


def test_the_same_report_gives_the_same_files(bundle: Path, tmp_path: Path) -> None:
    first, second = (write_figures(bundle, tmp_path / name, ["modes"])[0] for name in ("a", "b"))
    assert first.read_bytes() == second.read_bytes()


def test_what_there_is_not_is_said(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(bundle), "--out", str(tmp_path / "out"), "--figure", "unicorn"]) == 2
    assert "no figure 'unicorn'; it has trade-off, modes, " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([str(tmp_path), "--out", str(tmp_path)]) == 2
    assert "has no report.html" in capsys.readouterr().err
    assert main([str(bundle), "--out", str(tmp_path / "out"), "--figure", "modes"]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "out" / "report-modes.svg")]


def test_only_pictures_of_a_report_can_stand_alone() -> None:
    with pytest.raises(FigureError, match="viewBox"):
        standalone('<svg id="x"></svg>')
