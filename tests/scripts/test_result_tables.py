"""The pages' tables are those of the results."""

import pytest

from scripts.result_tables import PAGES, ROOT, tables_of, with_tables


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
