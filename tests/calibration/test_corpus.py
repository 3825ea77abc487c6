"""Texts become documents, documents are dealt to splits whole, and what is no text is refused in one sentence."""

import json
from itertools import pairwise
from pathlib import Path

import pytest

from exeunt.calibration.corpus import (
    BORDER_CHARACTERS,
    Corpus,
    SplitName,
    TextEncoding,
    read_corpus,
    rows_of,
    split_corpus,
)
from exeunt.calibration.errors import CorpusError

PREFIX, END = 1000, 1001


def encoding(prefix: tuple[int, ...] = (), end: int | None = None) -> TextEncoding:
    return TextEncoding(lambda text: [ord(sign) for sign in text], prefix, end)


def marked(documents: int, length: int = 200) -> Corpus:
    """Document i consists of the letter number i alone, so that a row tells where it came from."""
    return Corpus("marked", tuple(chr(0x100 + i) * length for i in range(documents)))


def origins(rows: tuple[object, ...]) -> set[int]:
    return {int(token) for row in rows for token in row}  # type: ignore[attr-defined]


def test_documents_never_straddle_splits() -> None:
    splits = split_corpus(marked(40), encoding(), tokens=8000, row_tokens=64, seed=1, least=1000)
    seen = [origins(splits.fit), origins(splits.select), origins(splits.certify)]
    assert all(seen)
    assert len(set.union(*seen)) == sum(map(len, seen))
    assert splits.tokens()["fit"] > splits.tokens()["certify"] > splits.tokens()["select"]


def test_no_more_tokens_than_allowed_and_from_many_documents() -> None:
    splits = split_corpus(marked(40, 1000), encoding(), tokens=6000, row_tokens=64, seed=1, least=1000)
    assert 5000 < sum(splits.tokens().values()) <= 6000
    assert len(origins(splits.fit)) > 10


def test_the_seed_decides_who_goes_where() -> None:
    def fitted(seed: int) -> set[int]:
        return origins(
            split_corpus(marked(40), encoding(), tokens=8000, row_tokens=64, seed=seed, least=99).fit
        )

    assert fitted(1) == fitted(1) != fitted(2)


def test_one_document_gives_its_beginning_middle_and_end() -> None:
    text = "\n".join(chr(0x1000 + line) * 50 for line in range(400))
    splits = split_corpus(Corpus("one", (text,)), encoding(), tokens=9000, row_tokens=64, seed=0, least=1000)
    lines = [{token for token in origins(rows) if token >= 0x1000} for rows in (splits.fit, splits.select)]
    assert max(lines[0]) < min(lines[1])
    assert max(lines[1]) < min(t for t in origins(splits.certify) if t >= 0x1000)


def test_a_text_cut_in_three_leaves_a_gap_at_both_borders() -> None:
    """What lies between two splits is in neither: at least so many characters, and not much more."""
    text = "\n".join(chr(0x1000 + line) * 99 for line in range(600))
    splits = split_corpus(
        Corpus("one", (text,)), encoding(), tokens=200_000, row_tokens=512, seed=0, least=1000
    )
    used = [{token for token in origins(rows) if token >= 0x1000} for rows in (splits.fit, splits.select)]
    used.append({token for token in origins(splits.certify) if token >= 0x1000})
    for before, after in pairwise(used):
        missing = (min(after) - max(before) - 1) * 100
        assert BORDER_CHARACTERS <= missing <= BORDER_CHARACTERS + 2500
    assert min(used[0]) == 0x1000  # nothing is lost at the two ends
    assert max(used[2]) == 0x1000 + 599
    assert splits.tokens()["select"] == pytest.approx(0.17 * len(text), rel=0.1)


@pytest.mark.parametrize("words", ["many words ", "words\u3000without\u3000spaces"])
def test_a_text_without_line_ends_is_cut_all_the_same(words: str) -> None:
    text = "".join(chr(0x1000 + place) + words for place in range(6000))
    splits = split_corpus(Corpus("one", (text,)), encoding(), tokens=70_000, row_tokens=512, seed=0)
    used = [
        [token - 0x1000 for token in sorted(origins(rows)) if 0x1000 <= token < 0x1000 + 6000]
        for rows in (splits.fit, splits.select, splits.certify)
    ]
    for before, after in pairwise(used):
        missing = (after[0] - before[-1] - 1) * (len(words) + 1)
        assert BORDER_CHARACTERS - 100 <= missing <= BORDER_CHARACTERS + 2500
    assert (used[0][0], used[2][-1]) == (0, 5999)
    assert min(splits.tokens().values()) > 0.14 * 70_000


def test_no_letter_of_a_long_line_is_lost() -> None:
    text = "".join(chr(0x1000 + place) for place in range(20_000)) + "\nend " * 3
    splits = split_corpus(Corpus("one", (text,)), encoding(), tokens=10**6, row_tokens=512, seed=0)
    held = [
        int(token) for rows in (splits.fit, splits.select, splits.certify) for row in rows for token in row
    ]
    read = [token for token in held if token >= 0x1000]
    assert read == sorted(set(read))
    assert 14_000 < len(read) < 20_000 - 2 * BORDER_CHARACTERS + 1


def test_repeats_of_a_document_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one<END>two<END> one\n<END>three<END>two<END>one")
    corpus = read_corpus(str(path), "<END>")
    assert (corpus.documents, corpus.repeats) == (("one", "two", "three"), 3)
    assert corpus.sha256 == Corpus("b", ("one", "two", "three")).sha256


def test_a_repeat_is_in_no_other_split(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("<END>".join(chr(0x100 + number % 40) * 200 for number in range(120)))
    splits = split_corpus(
        read_corpus(str(path), "<END>"), encoding(), tokens=20_000, row_tokens=64, seed=1, least=1000
    )
    seen = [origins(splits.fit), origins(splits.select), origins(splits.certify)]
    assert len(set.union(*seen)) == sum(map(len, seen)) == 40
    assert sum(splits.tokens().values()) <= 40 * 200


def test_text_that_repeats_is_told_from_text_that_is_short(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("<END>".join(["x" * 3000, "y" * 900, "z" * 800] * 4))
    corpus = read_corpus(str(path), "<END>")
    with pytest.raises(
        CorpusError, match=r"gives 4,6[0-9]{2} tokens .* at least 6,000.*\. 9 more repeat one"
    ):
        split_corpus(corpus, encoding(), tokens=100_000, row_tokens=64, seed=0)


def test_documents_that_cannot_be_dealt_are_said_to_be_too_few() -> None:
    corpus = Corpus("c", ("x" * 20_000, "y" * 100, "z" * 100))
    with pytest.raises(
        CorpusError, match=r"enough in all, but documents are dealt whole.*give more documents"
    ):
        split_corpus(corpus, encoding(), tokens=100_000, row_tokens=64, seed=0)


def test_rows_know_their_documents() -> None:
    """Every letter of a row is its document's, whatever order the documents were dealt in."""
    splits = split_corpus(marked(40), encoding(), tokens=8000, row_tokens=64, seed=1, least=1000)
    names: tuple[SplitName, ...] = ("fit", "select", "certify")
    for name in names:
        rows = getattr(splits, name)
        assert [int(row[0]) - 0x100 for row in rows] == list(splits.documents[name])
    assert len(set(splits.documents["fit"])) < len(splits.fit)  # some have several rows
    two = split_corpus(
        Corpus("two", ("a\n" * 9000, "b\n" * 9000)), encoding(), tokens=36_000, row_tokens=512, seed=0
    )
    assert set(two.documents["fit"]) == {0}
    assert set(two.documents["certify"]) == {1}


def test_rows_begin_with_the_prefix_and_documents_end_with_the_end() -> None:
    rows = rows_of(Corpus("c", ("x" * 100,)), encoding((PREFIX,), END), tokens=1000, row_tokens=41, seed=0)
    assert [int(row[0]) for row in rows] == [PREFIX] * len(rows)
    assert all(len(row) <= 41 for row in rows)
    assert int(rows[-1][-1]) == END
    assert sum(int((row < PREFIX).sum()) for row in rows) == 100


def test_an_evaluation_reads_documents_from_all_over_the_text() -> None:
    """The beginning of a file need not be like the rest of it; the same seed reads the same again."""
    corpus = Corpus("c", tuple(chr(0x1000 + i) * 50 for i in range(200)))

    def read(seed: int) -> list[int]:
        rows = rows_of(corpus, encoding(), tokens=1000, row_tokens=50, seed=seed)
        return [int(row[0]) - 0x1000 for row in rows]

    places = read(0)
    assert len(places) == 20
    assert min(places) < 50
    assert max(places) > 150
    assert places == read(0) != read(1)


@pytest.mark.parametrize("foreign", ["<|endoftext|>", "</s>"])
def test_documents_that_another_tokenizer_separates_are_documents(tmp_path: Path, foreign: str) -> None:
    path = tmp_path / "a.txt"
    path.write_text(f"one\n{foreign}\ntwo{foreign}\r\nthree {foreign}")
    assert read_corpus(str(path), "<END>").documents == ("one", "two", "three")
    path.write_text(f"one\n{foreign}\ntwo<END>three{foreign}\n")
    assert read_corpus(str(path), "<END>").documents == (f"one\n{foreign}\ntwo", f"three{foreign}")
    path.write_text(
        f"a <s>x{foreign}\nb <s>y{foreign} mid <s>z{foreign}\nc <s>u{foreign} d <s>v{foreign} e{foreign}f"
    )
    assert len(read_corpus(str(path), "<END>").documents) == 1  # mostly inside lines: markup
    path.write_text(f"In HTML {foreign} strikes out.\nIt ends in {foreign}\n")
    assert len(read_corpus(str(path), "<END>").documents) == 1


def test_files_of_every_kind(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one<END>two<END>")
    (tmp_path / "b.txt").write_text("three")
    (tmp_path / "c.jsonl").write_text('{"text": "four"}\n\n{"text": "five"}\n')
    assert read_corpus(str(tmp_path / "a.txt"), "<END>").documents == ("one", "two")
    assert read_corpus(str(tmp_path / "a.txt"), None).documents == ("one<END>two<END>",)
    assert read_corpus(str(tmp_path), "<END>").documents == ("one", "two", "three")
    assert read_corpus(str(tmp_path / "c.jsonl"), None).documents == ("four\nfive",)


def test_the_hash_is_that_of_the_documents() -> None:
    assert (
        Corpus("x", ("ab", "c")).sha256 == Corpus("y", ("ab", "c")).sha256 != Corpus("x", ("a", "bc")).sha256
    )


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("empty.txt", b"", "holds no text"),
        ("blank.txt", b" \n\t\n", "holds no text"),
        ("binary.txt", b"abc\x00def", "byte 3 is zero"),
        ("latin.txt", "caf\xe9 noir".encode("latin-1"), "byte 3 cannot be decoded"),
        ("broken.jsonl", b'{"text": "a"}\n{"text"', "line 2, is not JSON"),
        ("fieldless.jsonl", json.dumps({"body": "a"}).encode(), 'string field "text"'),
    ],
)
def test_what_is_no_text_is_refused(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CorpusError, match=says):
        read_corpus(str(path), "<END>")


def test_missing_paths_and_empty_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="neither a file nor a folder"):
        read_corpus(str(tmp_path / "nothing"), None)
    with pytest.raises(CorpusError, match=r"holds no \.txt file"):
        read_corpus(str(tmp_path), None)


def test_too_little_text_says_how_much_there_is_and_how_much_is_needed() -> None:
    with pytest.raises(CorpusError, match=r"gives 2,000 tokens .* at least 6,000"):
        split_corpus(marked(10), encoding(), tokens=100_000, row_tokens=64, seed=0)


def test_a_text_that_its_borders_eat_up_says_how_much_of_it_was_left() -> None:
    text = "\n".join("x" * 99 for _ in range(72))
    with pytest.raises(CorpusError) as caught:
        split_corpus(Corpus("short.txt", (text,)), encoding(), tokens=48_000, row_tokens=512, seed=0)
    said = str(caught.value)
    assert said.startswith("short.txt has 7,199 tokens, but gives the splits ")
    assert "2,000 characters or more left out at both borders" in said
    assert "Calibration needs at least 6,000 in the splits; give more text" in said


def test_an_unreachable_hub_is_an_error_and_not_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def unreachable(*_args: object, **_kwargs: object) -> object:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(CorpusError, match=r"some/set cannot be read .*no route to host"):
        read_corpus("hf:some/set", None)


class Hub:
    """A hub with one data set of two splits; what was asked of it."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str | None, str]] = []

    def load(self, name: str, config: str | None, *, split: str, streaming: bool) -> list[dict[str, str]]:
        assert streaming
        self.asked.append((name, config, split))
        if name == "some/several" and config is None:
            raise ValueError(
                "Config name is missing.\nPlease pick one among the available configs: ['raw', 'clean']\nExample"
            )
        return [{"text": "one" * 200}, {"text": "two" * 200}] if split == "test" else [{"body": "x"}]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    import datasets

    found = Hub()
    monkeypatch.setattr(datasets, "load_dataset", found.load)
    return found


def test_a_hub_data_set_is_read_by_its_text_field(hub: Hub) -> None:
    assert read_corpus("hf:some/set:test", None).documents == ("one" * 200, "two" * 200)
    assert hub.asked == [("some/set", None, "test")]
    with pytest.raises(CorpusError, match='no field "text"'):
        read_corpus("hf:some/set", None)


def test_a_hub_data_set_may_have_configurations(hub: Hub) -> None:
    assert len(read_corpus("hf:some/several:raw:test", None).documents) == 2
    assert hub.asked == [("some/several", "raw", "test")]
    with pytest.raises(CorpusError, match=r"configs: \['raw', 'clean'\].*hf:some/several:CONFIG:train"):
        read_corpus("hf:some/several:test", None)


@pytest.mark.parametrize("name", ["hf:", "hf:a/b:", "hf:a/b::test", "hf:a/b:c:test:more"])
def test_what_is_no_name_of_a_data_set_is_refused(name: str, hub: Hub) -> None:
    with pytest.raises(CorpusError, match="is no name of a data set; give hf:NAME"):
        read_corpus(name, None)
    assert hub.asked == []


def test_lines_of_json_end_at_line_feeds_alone(tmp_path: Path) -> None:
    signs = "\u2028\u2029\x85"  # all of which str.splitlines cuts at, and JSON may hold unescaped
    path = tmp_path / "a.jsonl"
    texts = [sign.join(["words" * 60, "more" * 60]) for sign in signs]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    path.write_text("\r\n".join(lines), encoding="utf-8", newline="")
    assert read_corpus(str(path), None).documents == tuple(texts)


def test_a_file_that_is_longer_than_what_is_read_loses_its_last_line_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": sign * 500}, ensure_ascii=False) + "\n" for sign in "äöü"]
    path.write_text("".join(lines), encoding="utf-8")
    size = path.stat().st_size
    monkeypatch.setattr("exeunt.calibration.documents.MOST_BYTES", size)
    assert len(read_corpus(str(path), None).documents) == 3
    assert not caplog.records
    monkeypatch.setattr(
        "exeunt.calibration.documents.MOST_BYTES", size - 4
    )  # in the last text, inside a sign
    assert len(read_corpus(str(path), None).documents) == 2
    assert f"is longer than {size - 4:,} bytes, and only so many are read" in caplog.text


def test_a_text_that_is_not_read_to_its_end_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(name * 100)
    monkeypatch.setattr("exeunt.calibration.documents.MOST_BYTES", 99)
    assert read_corpus(str(tmp_path / "a.txt"), None).documents == ("a" * 99,)
    assert "a.txt is longer than 99 bytes" in caplog.text
    caplog.clear()
    monkeypatch.setattr("exeunt.calibration.documents.MOST_BYTES", 150)
    assert read_corpus(str(tmp_path), None).documents == ("a" * 100, "b" * 100)
    assert "the first 2 of 3 files are read" in caplog.text


def test_a_data_set_that_is_not_read_to_its_end_says_so(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("exeunt.calibration.documents.MOST_HUB_CHARACTERS", 1200)
    assert len(read_corpus("hf:some/set:test", None).documents) == 2
    assert not caplog.records
    monkeypatch.setattr("exeunt.calibration.documents.MOST_HUB_CHARACTERS", 600)
    assert len(read_corpus("hf:some/set:test", None).documents) == 1
    assert "Of hf:some/set:test the first 600 characters are read." in caplog.text


def test_rows_that_are_lines_are_joined_to_passages(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    lines = [f"Line {number} of an article, " + "words " * 30 for number in range(200)]
    path.write_text("".join(json.dumps({"text": line}) + "\n\n" for line in lines))
    corpus = read_corpus(str(path), None)
    assert corpus.rows == 200
    assert "\n".join(corpus.documents).split("\n") == [line.strip() for line in lines]
    assert all(2000 <= len(text) <= 2300 for text in corpus.documents[:-1])
    assert "200 rows, so short that neighbours were joined to 20 passages" in corpus.in_words()


def test_documents_are_not_joined_and_neither_is_a_text_file(tmp_path: Path) -> None:
    rows = tmp_path / "stories.jsonl"
    rows.write_text(
        "".join(json.dumps({"text": chr(65 + number) * (300 + 50 * number)}) + "\n" for number in range(20))
    )
    corpus = read_corpus(str(rows), None)
    assert (len(corpus.documents), corpus.rows) == (20, 0)  # some are short, most are not
    file = tmp_path / "short.txt"
    file.write_text("<END>".join(f"Document {number}." for number in range(20)))
    assert len(read_corpus(str(file), "<END>").documents) == 20
