"""The pages' tables are those of the results."""

import json
from copy import deepcopy
from typing import Any

import pytest

from scripts import gpu_tables
from scripts.result_tables import PAGES, RESULTS, ROOT, tables_of, with_tables

H200: Any = json.loads((RESULTS / "gpu-check-nvidia-h200.json").read_text())


@pytest.mark.parametrize("page", PAGES)
def test_a_page_shows_the_results(page: str) -> None:
    text = (ROOT / page).read_text()
    assert [table.split("\n")[0] for table in tables_of(page) if table not in text] == []


def test_a_table_takes_the_place_of_its_like() -> None:
    page = "# A\n\n| a | b |\n| --- | --- |\n| 1 | 2 |\n\ntext\n\n| c | b |\n| --- | --- |\n"
    table = "| a | z |\n| --- | --- |\n| 3 | 4 |"
    assert with_tables(page, [table]) == page.replace("| a | b |\n| --- | --- |\n| 1 | 2 |", table)
    with pytest.raises(ValueError, match=r"no table that begins '\| x \|'"):
        with_tables(page, ["| x | y |"])


def _rows(header: str, record: Any = H200) -> dict[str, list[str]]:
    """The GPU table under a header, by the first cell of its rows."""
    (found,) = [rows for headers, rows in gpu_tables.gpu_tables(record) if headers[0] == header]
    return {first: list(rest) for first, *rest in found}


def _cells(model: str, streams: int) -> str:
    """A line of README's table of a GPU's speeds."""
    found = H200["sections"]["end_to_end"][model]
    columns = ("engine full/full", "engine int4/int4", "engine int4/int4 exits at 0.5 (synthetic)")
    cells = []
    for what in (*columns, "transformers generate_batch", "transformers generate"):
        row = found.get(f"{what}, {streams} streams", {})
        left = f" ({row['exit_rate']:.0%} leave)".replace("%", " %") if row.get("exit_rate") else ""
        cells.append(f" {row['tokens_per_s']:.0f}{left} " if row else " ")
    return "|".join(cells).strip()


def test_what_the_pages_say_of_a_gpu_is_what_was_measured() -> None:
    rate = gpu_tables.memory_rate(H200)
    full, int4 = (gpu_tables.step_of(H200, each, each, 1, 512) for each in ("full", "int4"))
    share, floor = full["bytes_per_s"] / rate, full["bytes"] / rate * 1e3
    generate = gpu_tables.speed(H200, "transformers generate", 64)
    ours = gpu_tables.speed(H200, "engine int4/int4", 64)
    linears = {kind: gpu_tables.linears_ms(H200, kind) for kind in ("int4", "full_linear", "torch")}
    said = {
        "README.md": (
            f"of one stream takes {full['ms']:.2f} ms in bfloat16, {share:.0%} of".replace("%", " %"),
            f"INT4 weights and KV make it {full['ms'] / int4['ms']:.2f} times as fast",
            "Mistral-7B shape, 1 stream | " + _cells("mistral-7b", 1),
            "Mistral-7B shape, 64 streams | " + _cells("mistral-7b", 64),
            "packaged model, 64 streams | " + _cells("packaged", 64),
        ),
        "docs/performance.md": (
            f"take {full['ms'] - floor:.2f} ms more than the floor",
            f"{linears['full_linear']:.2f} ms, where PyTorch's own products",
            f"the number of rows, take {linears['torch']:.2f};",
            f"spends {linears['int4']:.2f} of its {int4['ms']:.2f} ms in the linears",
            f"against that, int4/int4 is {ours / generate:.1f} times as fast",
        ),
    }
    for page, sentences in said.items():
        text = " ".join((ROOT / page).read_text().split())
        assert [sentence for sentence in sentences if sentence not in text] == []


def test_no_share_of_the_memorys_rate_is_more_than_the_whole() -> None:
    steps = [int(cells[2].rstrip("%")) for cells in _rows("decode step").values()]
    linears = [
        int(share.strip(" %"))
        for cells in _rows("linear, µs: INT4 / full / PyTorch").values()
        for share in cells[0].split("/")
    ]
    assert max(steps) <= 100
    assert max(linears) <= 100
    quick = deepcopy(H200)
    quick["sections"]["machine"]["read_bytes_per_s"] = 1e13
    assert gpu_tables.memory_rate(quick) == 1e13


def test_a_target_is_missed_below_it_and_a_check_fails_by_name() -> None:
    targets = _rows("target on a GPU")
    name = "one stream, mistral-7b shape, INT4 against our own bfloat16"
    assert targets[name] == ["1.83×", "≥ 2.3×", "missed: 80% of it"]
    other = deepcopy(H200)
    gpu_tables.step_of(other, "int4", "int4", 1, 512)["ms"] = 2.0  # type: ignore[index] # the record is mutable
    assert _rows("target on a GPU", other)[name][2] == "reached"
    other["checks"][0]["good"] = False
    assert _rows("check on the GPU", other)[other["checks"][0]["name"]][1] == "**failed**"


def test_the_parts_of_a_step_add_up_to_it() -> None:
    parts = _rows("ms of one stream's step at 512 tokens")
    for column in (0, 1):
        whole = float(parts["**whole step**"][column])
        rest = sum(float(cells[column]) for name, cells in parts.items() if name != "**whole step**")
        assert rest == pytest.approx(whole, abs=0.03)
    assert float(parts["norms and all else"][0]) > 0


def test_sequences_are_those_that_their_pages_leave_room_for() -> None:
    name = "sequences of 4096 tokens in the same memory, {} shape, INT4 against full KV"
    targets = _rows("target on a GPU")
    assert targets[name.format("mistral-7b")] == ["3.71×", "≥ 3.5×", "reached"]
    assert targets[name.format("llama-1.1b")] == ["3.46×", "≥ 3.5×", "missed: 99% of it"]
    other = deepcopy(H200)
    del other["sections"]["memory"]
    by_bytes = "sequences in the same memory, INT4 against full KV, by the bytes of a token"
    assert _rows("target on a GPU", other)[by_bytes][0] == "3.76×"


def test_what_one_order_of_summation_costs_is_told_for_every_number_of_rows() -> None:
    costs = gpu_tables.order_costs(H200)
    assert {tuple(ratios) for others in costs.values() for ratios in others.values()} == {(1, 4, 16, 64, 512)}
    case = next(each for each in H200["sections"]["kernels"]["cases"] if each["op"] == "int4_linear")
    name, rows = case["layer"], case["rows"]
    assert costs[f"{name}, INT4"] == {"PyTorch in bfloat16": costs[f"{name}, INT4"]["PyTorch in bfloat16"]}
    full = costs[f"{name}, full weights"]["PyTorch in bfloat16"][rows]
    assert full == case["full_linear"]["us"] / case["torch"]["us"]
    other = deepcopy(H200)
    case = next(each for each in other["sections"]["kernels"]["cases"] if each["op"] == "int4_linear")
    case["int4_free"] = {"us": case["us"] / 2}
    assert gpu_tables.order_costs(other)[f"{name}, INT4"]["our kernel"] == {rows: 2.0}
    headers, cells = next(
        each for each in gpu_tables.gpu_tables(other) if each[0][0].startswith("a linear's time over")
    )
    (line,) = [row for row in cells if row[:2] == (f"{name}, INT4", "our kernel")]
    assert len(line) == len(headers)
    assert [cell for cell in line[2:] if cell] == ["2.00"]


def test_a_machine_says_its_kernels_and_groups_where_it_knows() -> None:
    assert not {"kernels", "INT4 weights"} & _rows("on a GPU").keys()
    other = deepcopy(H200)
    machine = other["sections"]["machine"]
    machine.update(commit="0123456789abcdef", changed=True, kernels="fedcba", int4_group_size=32)
    assert _rows("on a GPU", other)["kernels"] == ["fedcba, of the commit 0123456789ab with changes"]
    assert _rows("on a GPU", other)["INT4 weights"] == ["in groups of 32"]


def test_the_engines_table_says_how_many_tokens_were_to_leave_and_did() -> None:
    other = deepcopy(H200)
    ends = other["sections"]["end_to_end"]
    name = "int4/int4 exits at 0.5 (synthetic)"
    shown = "engine int4/int4 exits at the threshold 0.5, approximate (synthetic{})"
    assert _rows("mistral-7b shape, tokens/s")[shown.format("")][0] == "399 (80% leave)"
    ends["mistral-7b"]["wanted_exit_rate"] = 0.5
    ends["llama-1.1b"] = {f"engine {name}, 16 streams": {"tokens_per_s": 7.0, "exit_rate": 0.46}}
    other["sections"]["compiled"] = {
        "packaged": {
            "transformers generate compiled, 1 streams": {"tokens_per_s": 321.0},
            "transformers generate compiled, 64 streams": {"error": "not done in 30 s"},
        }
    }
    wanted = shown.format(", 50% are to leave")
    assert _rows("mistral-7b shape, tokens/s", other)[wanted][0] == "399 (80% leave)"
    assert _rows("llama-1.1b shape, tokens/s", other) == {shown.format(""): ["7 (46% leave)"]}
    assert _rows("packaged model, tokens/s", other)["`transformers` generate compiled"] == ["321", "", ""]
    assert gpu_tables.speed(other, "transformers generate compiled", 1) == 321.0


def test_what_a_run_had_no_time_for_is_in_no_table() -> None:
    other = deepcopy(H200)
    for model in ("packaged", "mistral-7b"):
        for name in list(other["sections"]["end_to_end"][model]):
            if "generate_batch" in name:
                del other["sections"]["end_to_end"][model][name]
    del other["sections"]["end_to_end"]["mistral-7b"]
    headers = [headers[0] for headers, _ in gpu_tables.gpu_tables(other)]
    assert "packaged model, tokens/s" in headers
    assert "mistral-7b shape, tokens/s" not in headers
    assert not [name for name in _rows("target on a GPU", other) if "generate_batch" in name]


def test_other_kernels_have_a_table_where_they_were_timed() -> None:
    header = "other kernel of the mistral-7b shape"
    assert header not in [headers[0] for headers, _ in gpu_tables.gpu_tables(H200)]
    other = deepcopy(H200)
    other["sections"]["kernels"]["cases"] += [
        {"op": "rms_norm", "rows": 64, "size": 4096, "us": 3.21, "torch": {"us": 6.0}},
        {"op": "turn_and_write_kv", "kv": "int4", "tokens": 1, "us": 4.0},
        {"op": "gated_linear", "rows": 1, "us": 28.0, "full": {"us": 60.0}, "torch": {"us": 59.0}},
    ]
    assert _rows(header, other) == {
        "gate and up with their activation, INT4, 1 row / full": ["28.0 / 60.0", "59.0"],
        "RMS norm, 64 rows": ["3.2", "6.0"],
        "RoPE, rotation and writing, 1 row, INT4 pages": ["4.0", ""],
    }


def test_how_loads_ran_is_told_where_a_run_knows() -> None:
    new = ("`generate_batch`", "`transformers`, tokens/s", "memory of a load, measured")
    assert not {*new}.intersection(headers[0] for headers, _ in gpu_tables.gpu_tables(H200))
    other = deepcopy(H200)
    packaged = other["sections"]["end_to_end"]["packaged"]
    tried = {"attention": "paged|sdpa", "use_cuda_graph": [False, True], "use_async_batching": False}
    packaged["transformers generate_batch, 64 streams"] |= {
        "tries": {"its own choice": {"tokens_per_s": 996.0, **tried}, "graphs asked for": {"error": "no"}},
        "chosen": "its own choice",
    }
    packaged["transformers generate, 16 streams"] |= {
        "seconds": 4.0,
        "forward_loop": {"seconds": 3.0, "tokens_per_s": 341.0},
    }
    packaged["engine int4/int4, 16 streams"] |= {
        "kv_bytes_per_sequence": 2e6,
        "kv_bytes_by_layout": 1.9e6,
        "device_bytes_at_most": 3e9,
    }
    called = "packaged model"
    batches = _rows(new[0], other)
    assert batches[f"{called}, its own choice (compared)"] == ["996", "paged|sdpa", "no / yes", "no"]
    assert batches[f"{called}, graphs asked for"] == ["no", "not told", "not told", "not told"]
    (loop,) = _rows(new[1], other).values()
    assert loop[1:] == ["341", "25%"]
    assert _rows(new[2], other)[f"{called}, engine int4/int4, 16 streams"] == ["2.0", "1.9", "3.00"]


def test_long_contexts_are_tables_of_their_own() -> None:
    other = deepcopy(H200)
    other["sections"]["long_contexts"] = {
        "status": "done",
        "wanted_exit_rate": 0.5,
        "mistral-7b, contexts of 4096": {
            "prompt": 4096,
            "answer": 32,
            "gates": "synthetic",
            "engine int4/int4, 4 streams": {"tokens_per_s": 80.2},
        },
    }
    header = "mistral-7b shape, prompts of 4096 tokens, 32 new ones, tokens/s"
    assert _rows(header, other) == {"engine int4/int4": ["80"]}


def test_a_rate_that_the_cache_may_have_given_is_no_share_of_the_memorys() -> None:
    other = deepcopy(H200)
    case = next(each for each in other["sections"]["kernels"]["cases"] if each["op"] == "int4_linear")
    case |= {"bytes_per_s": 1e15, "cached": True}
    assert gpu_tables.memory_rate(other) == gpu_tables.memory_rate(H200)
    (line,) = [
        cells
        for layer, cells in _rows("linear, µs: INT4 / full / PyTorch", other).items()
        if layer == case["layer"]
    ]
    assert line[0].startswith("in the cache / ")
