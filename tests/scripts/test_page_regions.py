"""Parts of a page that a script writes."""

import pytest

from scripts.page_regions import region, region_keys, section_end, with_region, with_tables


def test_a_table_takes_the_place_of_its_like() -> None:
    page = "# A\n\n| a | b |\n| --- | --- |\n| 1 | 2 |\n\ntext\n\n| c | b |\n| --- | --- |\n"
    table = "| a | z |\n| --- | --- |\n| 3 | 4 |"
    assert with_tables(page, [table]) == page.replace("| a | b |\n| --- | --- |\n| 1 | 2 |", table)
    with pytest.raises(ValueError, match=r"no table that begins '\| x \|'"):
        with_tables(page, ["| x | y |"])


def test_a_region_is_written_anew_and_what_stands_around_it_stays() -> None:
    page = f"before\n\n{region('a b', 'old')}\n\nbetween\n\n{region('a c', 'kept')}\n\nbehind\n"
    assert region_keys(page) == ["a b", "a c"]
    again = with_region(page, "a b", "new\n\nlines\n")
    assert again == page.replace("old", "new\n\nlines")
    assert with_region(again, "a b", "old") == page


def test_a_region_that_is_not_there_or_not_ended_is_refused() -> None:
    page = region("a", "x")
    for text, said in (
        ("", "0 regions 'a'"),
        (f"{page}\n{page}", "2 regions 'a'"),
        (page.partition("x")[0], "no end"),
    ):
        with pytest.raises(ValueError, match=said):
            with_region(text, "a", "y")


def test_a_section_ends_at_the_next_heading() -> None:
    page = f"# A\n\n{region('a', 'x')}\n\ntext\n\n## B\n\n{region('b', 'x')}\n\nend\n"
    assert page[section_end(page, "a") :].startswith("## B")
    assert section_end(page, "b") == len(page)
