"""The pictures of the GPU's figures are those of the record beside them."""

import json

from scripts.gpu_figures import IMAGES, RECORD, figures
from scripts.report_figures import standalone


def test_the_pictures_show_the_record() -> None:
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    for figure in figures(record):
        kept = (IMAGES / f"{figure.name}.svg").read_text(encoding="utf-8")
        assert kept == standalone(figure.svg), "draw them anew with python -m scripts.gpu_figures"


def test_another_record_gives_other_pictures() -> None:
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    before = [figure.svg for figure in figures(record)]
    record["sections"]["decode"]["steps"][0]["ms"] *= 2
    case = next(each for each in record["sections"]["kernels"]["cases"] if each["op"] == "int4_linear")
    case["us"] *= 2
    assert all(one != two.svg for one, two in zip(before, figures(record), strict=True))
