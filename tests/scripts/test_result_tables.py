"""The committed pages are what the script makes of the committed results."""

import re

import pytest

from scripts.gpu_records import ROOT, Row, gpu_records, linears_ms, memory_rate, speed, step_of
from scripts.result_tables import PAGES, with_results

_H200 = "gpu-check-nvidia-h200"


@pytest.mark.parametrize("page", PAGES)
def test_a_page_is_what_the_results_make_of_it(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert text == with_results(text, page), "write it anew with python -m scripts.result_tables"


def _sentences(record: Row) -> tuple[str, ...]:
    """What the prose about the H200 quotes of its run, or would have to."""
    full, int4 = (step_of(record, each, each, 1, 512) for each in ("full", "int4"))
    rate = memory_rate(record)
    linears = {kind: linears_ms(record, kind) for kind in ("int4", "full_linear", "torch")}
    ours, theirs = speed(record, "engine int4/int4", 64), speed(record, "transformers generate", 64)
    assert full is not None
    assert int4 is not None
    assert rate is not None
    assert ours is not None
    assert theirs is not None
    copy = record["sections"]["machine"]["copy_bytes_per_s"]
    return (
        f"in bfloat16 {100 * full['bytes_per_s'] / copy:.0f} % of the rate of a copy "
        f"({100 * full['bytes_per_s'] / rate:.0f} % of that of the fastest read)",
        f"INT4 {full['ms'] / int4['ms']:.2f} times as fast",
        f"take {full['ms'] - full['bytes'] / rate * 1e3:.2f} ms more than the floor",
        f"{linears['full_linear']:.2f} ms, where PyTorch's own products",
        f"the number of rows, take {linears['torch']:.2f};",
        f"spends {linears['int4']:.2f} of its {int4['ms']:.2f} ms in the linears",
        f"against that, int4/int4 is {ours / theirs:.1f} times as fast",
    )


def test_prose_quotes_the_run_that_it_names() -> None:
    """Of another run the page itself says that its prose is older."""
    text = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    record = gpu_records().get(_H200, {})
    (named,) = re.findall(rf"<!-- {_H200}: text of the run of (.+) -->", text)
    if named == record.get("started"):
        said = " ".join(text.split())
        assert [sentence for sentence in _sentences(record) if sentence not in said] == []
    elif record:
        assert f"was written of the run of {named.replace('T', ' ')}" in text
