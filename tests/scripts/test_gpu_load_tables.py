"""Tables of whole loads on a GPU, out of records of round figures."""

from scripts import gpu_load_tables
from scripts.gpu_exit_tables import exit_tables
from scripts.gpu_records import speed
from tests.scripts.gpu_record import gpu_record, load
from tests.scripts.test_gpu_tables import rows_of


def test_the_engines_table_says_how_many_tokens_were_to_leave_and_did() -> None:
    record = gpu_record()
    rows = rows_of(gpu_load_tables.engine_tables, record, "mistral-7b")
    name = "engine int4/int4 exits at the threshold 0.5, approximate (synthetic, 50% are to leave)"
    assert rows[name] == ["", "1100 (50% leave)"]
    assert rows["engine full/full"] == ["200", ""]
    packaged, random = gpu_load_tables.engine_tables(record)
    assert packaged.caption == "Exits: calibrated."
    assert random.caption == "Exits: synthetic, after block 15 of 32."
    del record["sections"]["end_to_end"]["mistral-7b"]["wanted_exit_rate"]
    assert name.replace(", 50% are to leave", "") in rows_of(
        gpu_load_tables.engine_tables, record, "mistral-7b"
    )


def test_compiled_generate_stands_with_the_engine_and_what_did_not_run_is_in_no_row() -> None:
    record = gpu_record()
    rows = rows_of(gpu_load_tables.engine_tables, record, "packaged")
    assert rows["`transformers` generate compiled"] == ["321", ""]
    assert speed(record, "transformers generate compiled", 1) == 321.0
    del record["sections"]["compiled"]["packaged"]["transformers generate compiled, 1 streams"]
    assert "`transformers` generate compiled" not in rows_of(
        gpu_load_tables.engine_tables, record, "packaged"
    )
    del record["sections"]["end_to_end"]["packaged"]
    shown = [table.headers[0] for table in gpu_load_tables.engine_tables(record) if table.rows]
    assert shown == ["mistral-7b shape, tokens/s"]


def test_long_contexts_have_a_column_each_with_the_speed_behind_the_prompts() -> None:
    (table,) = gpu_load_tables.long_tables(gpu_record())
    assert list(table.headers) == ["mistral-7b shape, prompts of", "4096, 4 streams", "16384, 2 streams"]
    assert list(table.rows) == [
        ("engine int4/int4", "80 / 300", ""),
        ("`transformers` generate", "9", "3"),
    ]
    assert table.caption == (
        "Tokens/s of the whole load, of 32 new tokens each; behind it those since the last prompt was read. "
        "Exits: synthetic, after block 15 of 32."
    )


def test_how_transformers_ran_is_told_where_a_run_knows() -> None:
    record = gpu_record()
    batches = rows_of(gpu_load_tables.transformers_tables, record, "`generate_batch`")
    assert batches["packaged model, its own choice (compared)"] == ["500", "paged\\|sdpa", "no / yes", "no"]
    assert batches["packaged model, graphs asked for"] == ["no", "not told", "not told", "not told"]
    loops = rows_of(gpu_load_tables.transformers_tables, record, "`transformers`")
    assert loops == {"packaged model, 64 streams": ["800", "900", "25%"]}


def test_memory_is_told_of_each_modes_largest_load() -> None:
    record = gpu_record()
    rows = rows_of(gpu_load_tables.memory_tables, record)
    assert rows["packaged model, engine int4/int4, 64 streams"] == ["2", "1.9", "3.00"]
    assert "packaged model, engine int4/int4, 1 stream" not in rows
    assert "mistral-7b shape, contexts of 256, queues, engine propagate, 16 streams" in rows


def test_the_hosts_part_of_a_tick_is_told_by_its_longest_functions() -> None:
    rows = rows_of(gpu_load_tables.host_tables, gpu_record())
    assert rows == {"off, 16 streams": ["1000", "`Runner.run` 400"]}


def test_exits_stand_beside_the_same_without_whole_and_while_decoding() -> None:
    rows = rows_of(exit_tables, gpu_record())
    assert list(rows) == [
        "packaged model, 1 stream, int4/int4, verified",
        "mistral-7b shape, 16 streams, int4/int4, propagate at 0.5 (synthetic)",
        "mistral-7b shape, 16 streams, int4/int4, backfill at 0.5 (synthetic)",
        "mistral-7b shape, contexts of 256, queues, 16 streams, int4/int4, propagate at 0.5 (synthetic)",
        "mistral-7b shape, contexts of 256, queues, 16 streams, int4/int4, backfill at 0.5 (synthetic)",
    ]
    verified, propagate, backfill, *_ = rows.values()
    assert verified == ["120", "100", "1.20", "1.20", "", "", "0.50", "60%"]
    assert propagate == ["1100", "1000", "1.10", "1.20", "50%", "1.33", "", ""]
    assert backfill == ["900", "1000", "0.90", "0.60", "50%", "", "", ""]


def test_a_load_without_its_like_is_in_no_table_of_exits() -> None:
    record = gpu_record()
    record["sections"]["exits"]["contexts of 4096, run-through"] = {"engine propagate, 16 streams": load(1)}
    del record["sections"]["end_to_end"]["packaged"]["engine int4/int4, 1 streams"]
    names = "\n".join(rows_of(exit_tables, record))
    assert "4096" not in names
    assert "packaged" not in names


def test_a_grid_has_a_table_for_each_context_with_its_streams_in_order() -> None:
    (table,) = gpu_load_tables.grid_tables(gpu_record())
    assert table.headers == ("mistral-7b shape, prompts of 512", "1 stream", "64 streams")
    name = "engine int4/int4 exits at the threshold 0.5, approximate (synthetic, 50% are to leave)"
    assert list(table.rows) == [(name, "100 / 120 (50% leave)", "100 / 120 (50% leave)")]
    assert table.caption == "Exits: synthetic, after block 15 of 32."
