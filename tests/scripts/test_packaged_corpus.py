"""The packaged model's texts: what is held out is never trained on, and the tokenizer loses nothing."""

from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from scripts.packaged_model.corpus import HELD_OUT_NOVELS, SEPARATOR, clean_text, read_novels, read_stories
from scripts.packaged_model.tokenizer import train_tokenizer
from scripts.packaged_model.tokens import WindowStream, encode_documents

STORY = "Once upon a time there was a cat named {}. It sat on a mat all day, and it was happy with its mat."


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder of novels and stories, with copies among the stories."""
    (tmp_path / "novels").mkdir()
    for name in [*HELD_OUT_NOVELS, "Author_Title_1900", "Other_Book_1901"]:
        lines = (f"{name} paragraph {index} says \u201cwell\u201d." for index in range(400))
        (tmp_path / "novels" / f"{name}.txt").write_text("\n\n".join(lines), encoding="utf-8")
    stories = [STORY.format(f"Tom{index}") for index in range(300)]
    (tmp_path / "stories.txt").write_text(f"\n{SEPARATOR}\n".join(stories * 2), encoding="utf-8")
    return tmp_path


def test_no_story_is_both_trained_on_and_held_out(data: Path) -> None:
    split = read_stories(data / "stories.txt")
    assert len(split.train) + len(split.held_out) == 600
    assert 2 < len(split.held_out) < 100
    assert not set(split.train) & set(split.held_out)


def test_novels_are_held_out_whole(data: Path) -> None:
    split = read_novels(data / "novels")
    assert {text.split()[0] for text in split.held_out} == HELD_OUT_NOVELS
    assert {text.split()[0] for text in split.train} == {"Author_Title_1900", "Other_Book_1901"}
    joined = "\n".join(split.train)
    assert joined.count("paragraph") == 800


def test_real_texts_keep_the_sides_apart(shared_data: Path) -> None:
    split = read_stories(shared_data / "tinystories" / "train_4M.txt")
    assert not set(split.train) & set(split.held_out)
    names = {path.stem for path in (shared_data / "novels").glob("*.txt")}
    assert names >= HELD_OUT_NOVELS


def test_clean_text_makes_quotes_plain_and_keeps_paragraphs() -> None:
    assert (
        clean_text(" \u201cSo\u201d,\u00a0 he  said \n\n\n It\u2019s late. ") == '"So", he said\nIt\'s late.'
    )


def test_tokenizer_round_trip(tmp_path: Path) -> None:
    train_tokenizer([STORY.format(index) for index in range(50)], 320, 64).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == 320
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == 0
    for text in ["A cat sat.", "Zwölf Boxkämpfer 猫 \n\n\ttabs", ""]:
        tokens = tokenizer(text).input_ids
        assert tokens[0] == 0
        assert tokenizer.decode(tokens[1:]) == text
    assert tokenizer(f"one{SEPARATOR}two").input_ids.count(0) == 2
    stream = encode_documents(tokenizer.backend_tokenizer, ["A cat.", "A mat."])
    assert (stream == 0).sum() == 2
    assert stream[0] == 0


def test_an_epoch_shows_every_window_once_in_an_order_of_its_own() -> None:
    stream = WindowStream(np.arange(1001, dtype=np.uint16), length=50, seed=7)
    count = (1001 - 51) // 50
    epochs = [[stream.window(epoch * count + place) for place in range(count)] for epoch in range(2)]
    for windows in epochs:
        starts = sorted(int(window[0]) for window in windows)
        assert starts == list(range(starts[0], starts[0] + 50 * count, 50))
        assert all(len(window) == 51 for window in windows)
    assert [int(window[0]) for window in epochs[0]] != [int(window[0]) for window in epochs[1]]
    again = WindowStream(np.arange(1001, dtype=np.uint16), length=50, seed=7)
    assert (again.window(count + 3) == epochs[1][3]).all()
