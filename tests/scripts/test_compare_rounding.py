"""The comparison of settings: a line for each, and figures where they should be."""

from dataclasses import replace
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from exeunt.calibration.corpus import split_corpus
from exeunt.calibration.weights_int4 import Int4Plan
from scripts import compare_rounding
from tests.calibration.conftest import some_text, tiny_checkpoint


def test_every_setting_has_its_line(
    tmp_path: Path, one_thread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "words.txt"
    text.write_text(some_text())
    checkpoint = tmp_path / "tiny"
    checkpoint.mkdir()
    tiny_checkpoint(checkpoint)
    settings = {"nearest": Int4Plan(rounding="nearest"), "gptq": Int4Plan(hessian_tokens=2000)}
    monkeypatch.setattr(compare_rounding, "SETTINGS", settings)
    # what certificates are made of judges nothing here: it is not even there
    monkeypatch.setattr(
        compare_rounding, "split_corpus", lambda *a, **b: replace(split_corpus(*a, **b), certify=())
    )
    app = typer.Typer()
    app.command()(compare_rounding.main)
    result = CliRunner().invoke(app, [str(checkpoint), str(text), "--tokens", "8000"])
    assert result.exit_code == 0, result.output
    lines = [line.strip("|").split("|") for line in result.output.strip().splitlines()]
    names = [line[0].strip() for line in lines]
    assert names == ["setting", "---", "nearest", "gptq", "a block's layers one after another"]
    cells = {name: [cell.strip() for cell in line[1:]] for name, line in zip(names, lines, strict=True)}

    def divergence(name: str) -> float:
        return float(cells[name][1].split(",")[1])

    assert 0 < divergence("gptq") < divergence("nearest")
    assert divergence("a block's layers one after another") < divergence("nearest")
    assert all(cell.endswith("%") for cell in cells["gptq"][2:])
