"""Tables of a GPU's machine, steps and kernels, out of records of round figures."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from scripts import gpu_tables
from scripts.gpu_records import Row, Table, linears_ms, memory_rate
from tests.scripts.gpu_record import gpu_record

Tables = Callable[[Row], Iterator[Table]]


def rows_of(make: Tables, record: Row, header: str = "") -> dict[str, list[str]]:
    """The table whose first header begins so, by the first cell of its rows."""
    found = [table for table in make(record) if table.headers[0].startswith(header)]
    assert all(len(row) == len(table.headers) for table in found for row in table.rows)
    return {first: list(rest) for table in found for first, *rest in table.rows}


def cases_of(record: Any, op: str) -> list[Any]:
    """The record's own cases of a kernel, to be changed."""
    return [case for case in record["sections"]["kernels"]["cases"] if case["op"] == op]


def test_a_run_is_named_by_machine_date_versions_and_kernels() -> None:
    record = gpu_record()
    rows = rows_of(gpu_tables.machine_tables, record, "on a GPU")
    assert rows["begun"] == ["2026-01-02 03:04:05"]
    assert rows["machine"] == ["NVIDIA B1, 100 multiprocessors, 80 GB"]
    assert rows["kernels"] == ["fedcba, of the commit 0123456789ab with changes"]
    assert rows["linears, as measured launches name them"] == ["abcdef"]
    assert rows["INT4 weights"] == ["in groups of 32"]
    assert rows["memory's rate"] == ["5.00 TB/s, the fastest read of the run; a copy moved 4.00"]
    assert "torch 2.11.0" in rows["versions"][0]
    for name in ("commit", "kernels", "linear_kernels", "int4_group_size", "driver"):
        del record["sections"]["machine"][name]
    assert not {"kernels", "INT4 weights"} & rows_of(gpu_tables.machine_tables, record, "on a GPU").keys()


def test_what_a_run_left_out_is_told_by_section() -> None:
    rows = rows_of(gpu_tables.machine_tables, gpu_record(), "part of the run")
    assert rows["tests"] == ["needs", "", "needs pytest"]
    assert rows["machine"] == ["done", "1", ""]
    left_out = rows["end_to_end"][2]
    assert "engine full/full, 64 streams: no room; transformers on mistral-7b: RuntimeError: no" in left_out
    assert "transformers generate compiled, 64 streams: not done in 30 s" in rows["compiled"][2]
    record = gpu_record()
    record["sections"]["exits"] = {"status": "failed", "error": "took\ntoo | long", "skipped": ["a"] * 9}
    said = rows_of(gpu_tables.machine_tables, record, "part of the run")["exits"][2]
    assert said == "took too \\| long; a; a; and 7 more"


def test_no_share_of_the_memorys_rate_is_more_than_the_whole() -> None:
    record = gpu_record()
    assert memory_rate(record) == 5e12
    assert rows_of(gpu_tables.step_tables, record)["mistral-7b 1 × 512"][2] == "40%"  # the last, INT4
    cases_of(record, "int4_linear")[0]["torch"]["bytes_per_s"] = 1e13
    assert memory_rate(record) == 1e13
    shares = [cells[0] for cells in rows_of(gpu_tables.linear_tables, record).values()]
    assert shares[:2] == ["25% / 40% / 100%", "25% / 40% / 45%"]


def test_a_rate_that_the_cache_may_have_given_is_no_share_of_the_memorys() -> None:
    record = gpu_record()
    cases_of(record, "int4_linear")[0] |= {"bytes_per_s": 1e15, "cached": True}
    assert memory_rate(record) == 5e12
    assert rows_of(gpu_tables.linear_tables, record)["mistral-7b gate_up"][0] == "in the cache / 80% / 90%"


def test_the_parts_of_a_step_add_up_to_it() -> None:
    rows = rows_of(gpu_tables.part_tables, gpu_record())
    columns = list(zip(*rows.values(), strict=True))
    assert [column[:-2] for column in columns] == [
        ("2.56", "0.02", "0.32", "0.03", "1.07"),
        ("1.28", "0.01", "0.13", "0.06", "0.52"),
    ]
    assert rows["**whole step**"] == ["4.00", "2.00"]
    assert rows["reading alone, at the memory's rate"] == ["2.56", "0.80"]
    record = gpu_record()
    for case in cases_of(record, "write_kv"):
        if case["kv"] == "full":
            del case["us"]
    (table,) = gpu_tables.part_tables(record)
    assert list(table.headers[1:]) == ["int4/int4"]
    assert linears_ms(record, "torch") == pytest.approx((32 * 4 + 1) * 0.016)


def test_what_one_order_of_summation_costs_is_told_for_every_number_of_rows() -> None:
    costs = gpu_tables.order_costs(gpu_record())
    assert costs["mistral-7b out, full weights"] == {"PyTorch in bfloat16": {1: 1.25, 64: 1.25}}
    assert costs["mistral-7b gate_up, INT4"]["our kernel"] == {1: 1.25}
    (table,) = gpu_tables.order_tables(gpu_record())
    assert ("mistral-7b gate_up, INT4", "our kernel", "1.25", "") in table.rows


def test_attention_stands_by_context_and_what_was_not_timed_is_empty() -> None:
    record = gpu_record()
    assert rows_of(gpu_tables.attention_tables, record)["1 × 512"] == [
        *("10.0 (20%)", "4.0 (20%)", "9.0 (40%)", "2.50")
    ]
    del cases_of(record, "paged_attention")[1]["us"]
    assert rows_of(gpu_tables.attention_tables, record)["1 × 512"] == ["10.0 (20%)", "", "9.0 (40%)", ""]


def test_other_kernels_stand_beside_what_pytorch_takes() -> None:
    assert rows_of(gpu_tables.other_tables, gpu_record()) == {
        "gate and up with their activation, INT4, 1 row / full": ["28.0 / 60.0", "59.0"],
        "RMS norm, 64 rows": ["3.2", "6.0"],
        "writing keys and values, 1 row, full pages": ["1.0", ""],
        "writing keys and values, 1 row, INT4 pages": ["2.0", ""],
        "RoPE, rotation and writing, 1 row, INT4 pages": ["4.0", ""],
        "drawing a token, 16 rows of 32,000 logits": ["8.0", "50.0"],
    }


def test_checks_say_what_they_compared_and_which_failed() -> None:
    assert rows_of(gpu_tables.check_tables, gpu_record()) == {
        "text against PyTorch": [
            "64 tokens, 63 the other's own choice, worst 0.1 below it (at most 0.25)",
            "good",
        ],
        "logits against PyTorch": ["error 1.00% of the norm (at most 5%)", "good"],
        "rows to the bit": ["6 ways, 0 differ, 1 left out", "good"],
        "a kernel runs": ["RuntimeError: a \\| b", "**failed**"],
        "tests on the device": ["4 passed, 0 failed, 1 skipped", "good"],
    }


def test_keys_and_values_and_a_search_for_launches_have_tables() -> None:
    kept = rows_of(gpu_tables.kv_tables, gpu_record())
    assert kept["mistral-7b shape, sequences of 4096 tokens"] == ["4,000", "1,000", "3.71 times"]
    found = rows_of(gpu_tables.tuning_tables, gpu_record())
    assert found["calls searched"] == ["2 of 4 in 40 s"]
    assert found["faster than by the rule"] == ["1, the best 1.25 times as fast"]
