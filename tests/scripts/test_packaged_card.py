"""What is committed beside the packaged model against what it is made from and what it is about."""

import json
import shutil
from pathlib import Path

import pytest

from exeunt.compression.bundle import file_sha256
from scripts.packaged_model.__main__ import EVALUATIONS, PACKAGED, build_parser, run_card

ROOT = Path(__file__).resolve().parents[2]


def test_the_committed_card_is_made_of_the_committed_numbers(tmp_path: Path) -> None:
    shutil.copy(ROOT / PACKAGED / "measured.json", tmp_path)
    places = ("--folder", str(tmp_path), "--evaluations", str(ROOT / EVALUATIONS))
    assert run_card(build_parser().parse_args(["card", "RUN", *places])) == 0
    made, committed = (folder / "MODEL_CARD.md" for folder in (tmp_path, ROOT / PACKAGED))
    assert made.read_text(encoding="utf-8") == committed.read_text(encoding="utf-8")


@pytest.mark.parametrize("file", sorted((ROOT / EVALUATIONS).glob("packaged-*.json")), ids=lambda f: f.stem)
def test_the_committed_results_are_about_the_packaged_weights(file: Path) -> None:
    record = json.loads(file.read_text(encoding="utf-8"))
    assert record["model"]["sha256"] == file_sha256(ROOT / PACKAGED / "model.safetensors")
