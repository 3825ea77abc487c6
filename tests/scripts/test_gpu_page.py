"""The GPU part of a page: regions that are written anew, put in, or emptied, and prose that stays."""

from pathlib import Path
from typing import Any

import pytest

from scripts.gpu_page import NEXT, NOTHING, SECTIONS, contents, speeds_text, with_gpu_parts
from scripts.gpu_records import gpu_records
from scripts.page_regions import region, region_keys
from tests.scripts.gpu_record import gpu_record, load, toy_record
from tests.scripts.toy_gpu_check import check

_NAME = "gpu-check-nvidia-b1"
_SHOWN_IN = {
    "machine": "machine",
    "memory": "memory",
    "correctness": "checks",
    "exit_answers": "checks",
    "tests": "checks",
    "decode": "decode",
    "kernels": "linears",
    "end_to_end": "engine",
    "long_contexts": "long",
    "exits": "exits",
    "host": "host",
    "compiled": "engine",
    "float32": "checks",
    "tuning": "tuning",
    "grid": "grid",
}
"""What a section of the run is shown in, among others."""
_EMPTY = f"# Page\n\n## On a GPU\n\nIntroduction.\n\n{NEXT}\n\n## Behind\n\nEnd.\n"


def test_a_new_record_becomes_a_subsection_with_everything_it_has() -> None:
    page = with_gpu_parts(_EMPTY, {_NAME: gpu_record()})
    assert region_keys(page) == [f"{_NAME} {what}" for what in SECTIONS]
    assert page.index("Introduction.") < page.index("### NVIDIA B1\n") < page.index(NEXT)
    headings = [line for line in page.splitlines() if line.startswith("#")]
    assert headings[2:5] == ["### NVIDIA B1", "#### Targets, NVIDIA B1", "#### Decode steps, NVIDIA B1"]
    assert len(headings) == len(set(headings))
    assert page.endswith(f"{NEXT}\n\n## Behind\n\nEnd.\n")
    assert "![Microseconds of a linear layer by rows](images/gpu-nvidia-b1-linears.svg)" in page
    assert with_gpu_parts(page, {_NAME: gpu_record()}) == page


def test_two_gpus_stand_one_behind_the_other() -> None:
    other = gpu_record()
    other["sections"]["machine"]["gpu"] = "NVIDIA C2"
    records = {_NAME: gpu_record(), "gpu-check-nvidia-c2": other}
    page = with_gpu_parts(_EMPTY, records)
    assert (
        page.index("### NVIDIA B1\n") < page.index(f"end of {_NAME} checks") < page.index("### NVIDIA C2\n")
    )
    assert with_gpu_parts(page, records) == page
    assert with_gpu_parts(with_gpu_parts(_EMPTY, {_NAME: gpu_record()}), records) == page


def _by_hand(*regions: str) -> str:
    """A page on which somebody has written around some of a record's regions."""
    parts = (
        f"#### Own {what}\n\nFront of {what}.\n\n{region(f'{_NAME} {what}', 'old')}\n\nBehind {what}.\n"
        for what in regions
    )
    return _EMPTY.replace(NEXT, f"### B1\n\n{chr(10).join(parts)}\n{NEXT}")


def test_prose_stays_and_a_table_that_is_new_comes_behind_its_section() -> None:
    page = _by_hand("machine", "decode", "engine")
    record = gpu_record()
    again = with_gpu_parts(page, {_NAME: record})
    for line in page.splitlines():
        assert line in again or line == "old"
    assert "old" not in again.split()
    assert (
        again.index("Behind decode.")
        < again.index("#### One stream's step, NVIDIA B1")
        < again.index("#### Own engine")
    )
    assert again.index("Behind engine.") < again.index("#### Exits, NVIDIA B1") < again.index(NEXT)
    assert with_gpu_parts(again, {_NAME: record}) == again


def test_a_section_without_figures_leaves_its_region_empty_and_comes_back() -> None:
    record = gpu_record()
    page = with_gpu_parts(_EMPTY, {_NAME: record})
    without = gpu_record()
    del without["sections"]["exits"], without["sections"]["host"]
    without["sections"]["kernels"]["cases"].clear()
    fewer = with_gpu_parts(page, {_NAME: without})
    for what in ("host", "linears", "attention", "orders", "parts", "kernels"):
        assert region(f"{_NAME} {what}", NOTHING) in fewer
    assert "gpu-nvidia-b1-linears.svg" not in fewer
    assert with_gpu_parts(fewer, {_NAME: record}) == page


def test_a_record_that_is_gone_leaves_no_figures() -> None:
    page = with_gpu_parts(with_gpu_parts(_EMPTY, {_NAME: gpu_record()}), {})
    assert "| on a GPU |" not in page
    assert region(f"{_NAME} machine", "(There is no record of it.)") in page


def test_a_page_without_a_place_for_a_gpu_is_refused() -> None:
    with pytest.raises(ValueError, match="has no line"):
        with_gpu_parts("# Page\n", {_NAME: gpu_record()})


def test_prose_of_another_run_is_said_to_be_of_another() -> None:
    record = gpu_record()
    text = "<!-- gpu-check-nvidia-b1: text of the run of {} -->"
    own = contents(_NAME, record, text.format(record["started"]))
    assert own == contents(_NAME, record)
    other = contents(_NAME, record, text.format("2025-01-01T00:00:00"))
    assert "was written of the run of 2025-01-01 00:00:00; the tables are of another" in other["machine"]


@pytest.mark.parametrize("section", [*gpu_record()["sections"], ""])
def test_a_run_of_any_section_alone_or_of_all_but_one_has_its_tables(section: str) -> None:
    alone, without = gpu_record(), gpu_record()
    alone["sections"] = {name: each for name, each in alone["sections"].items() if name == section}
    without["sections"].pop(section, None)
    for record in (alone, without):
        page = with_gpu_parts(_EMPTY, {_NAME: record})
        assert "| on a GPU | measured on |" in page
        speeds_text({_NAME: record})


def test_every_section_of_the_run_is_shown_somewhere() -> None:
    assert set(_SHOWN_IN) == set(check.SECTIONS)
    assert set(_SHOWN_IN.values()) <= set(SECTIONS)


def test_what_the_script_leaves_is_shown_section_by_section() -> None:
    record = toy_record()
    found = contents("gpu-check-cpu", record)
    assert set(record["sections"]) == set(_SHOWN_IN)
    lacking = {what for what, text in found.items() if not text}
    assert lacking == {"parts", "tuning"}  # those of the large model, and what takes a GPU
    for line in (
        "| toy 1 × 20 | full/full |",
        "| toy up, INT4 | PyTorch in bfloat16 |",
        "| RMS norm, 1 row |",
        "| toy shape, contexts of 32, run-through, 2 streams, int4/int4, backfill at 0.5 (synthetic) |",
        "| toy shape, prompts of | 40, 2 streams | 90, 1 stream |",
        "| toy shape, prompts of 24 | 2 streams |",
        "| off, 2 streams | 7257 |",
        "| packaged model, 1 stream |",
        "| engine int4/int4 linear block (synthetic) |",
    ):
        assert line in "\n".join(found.values()), line


def test_records_are_those_of_whole_runs(tmp_path: Path) -> None:
    for name, text in (
        ("gpu-check-nvidia-b1", '{"quick": false}'),
        ("gpu-check-cpu", '{"quick": true}'),
        ("gpu-check-nvidia-b1.compiled", "{}"),
        ("gpu-host-nvidia-b1", "{}"),
    ):
        (tmp_path / f"{name}.json").write_text(text)
    assert gpu_records(tmp_path) == {_NAME: {"quick": False}}


def test_readmes_region_has_a_sentence_and_a_table_for_each_gpu() -> None:
    record = gpu_record()
    text = speeds_text({_NAME: record, "gpu-check-nvidia-c2": record})
    assert text.count("| one NVIDIA B1, tokens/s |") == 2
    said = " ".join(text.split())
    assert "One NVIDIA B1, 2026-01-02, a Mistral-7B shape" in said
    assert (
        "takes 4.00 ms in bfloat16. That reads weights, keys and values at 80 % of the rate of a copy, 4.00 TB/s "
        "(wanted: 80 %), or 64 % of that of the fastest read of the run, 5.00 TB/s." in said
    )
    assert "INT4 weights and KV make it 2.00 times as fast" in said
    assert "| Mistral-7B shape, 1 stream | 200 |  |  |  |  |  |" in text
    assert "| Mistral-7B shape, 16 streams |  | 1000 |  | 1100 (50 % leave) |  |  |" in text
    assert "| packaged model, 1 stream |  | 100 | 120 |  |  |  |" in text
    assert "| packaged model, 64 streams |  | 2000 |  |  | 500 | 800 |" in text
    assert "the default, verified exits, made 1.20 of the tokens/s without exits with 1 stream." in said
    assert "--default-compression" not in said
    record["sections"] = {"machine": record["sections"]["machine"]}
    assert speeds_text({_NAME: record}) == ""


def test_readmes_region_says_what_the_default_cost_and_how_to_go_without() -> None:
    record = gpu_record()
    packaged = record["sections"]["end_to_end"]["packaged"]
    packaged["engine int4/int4 verified, 64 streams"] = load(1500, exit_rate=0.2)
    packaged["engine int4/int4 exits at 0.5, 64 streams"] = load(1000, exit_rate=0.5)
    text = speeds_text({_NAME: record})
    assert "| packaged model, 64 streams |  | 2000 | 1500 | 1000 (50 % leave) | 500 | 800 |" in text
    said = " ".join(text.split())
    assert "made 1.20 and 0.75 of the tokens/s without exits with 1 and 64 streams." in said
    assert """`exeunt serve --default-compression '{"early_exit": false}'` goes without""" in said


def test_every_cell_stays_in_its_column() -> None:
    records: tuple[Any, ...] = (gpu_record(), toy_record())
    for record in records:
        for _, made_by in SECTIONS.values():
            for table in (table for make in made_by for table in make(record)):
                assert {len(row) for row in table.rows} <= {len(table.headers)}, table.headers
                cells = [cell for row in table.rows for cell in row]
                assert not [cell for cell in cells if "\n" in cell or "|" in cell.replace("\\|", "")]
