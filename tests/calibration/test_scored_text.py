"""Windows along documents: every token counts once, with as much before it as was promised."""

from collections import Counter

import numpy as np
import pytest
import torch

from exeunt.calibration.corpus import Corpus, TextEncoding
from exeunt.calibration.errors import CorpusError
from exeunt.calibration.scored_text import ScoredText, sliding_windows

END = 999


def encoding(prefix: tuple[int, ...] = ()) -> TextEncoding:
    """Every character is a token, and every place of a text another one."""
    return TextEncoding(lambda text: [ord(sign) for sign in text], prefix, END)


def corpus(*lengths: int) -> Corpus:
    """Documents in which no token comes twice."""
    texts, begin = [], 1000
    for length in lengths:
        texts.append("".join(chr(begin + place) for place in range(length)))
        begin += length
    return Corpus("text", tuple(texts))


def predictions(text: ScoredText, tokens: int = 60) -> list[tuple[int, int, int]]:
    """(token, the token that follows, tokens before it in its row) of all that count."""
    found = []
    for each in text.batches(tokens):
        batch = each.batch
        for place in each.scored.nonzero().squeeze(1).tolist():
            found.append(
                (int(batch.token_ids[place]), int(batch.targets[place]), int(batch.positions[place]))
            )
        assert bool((batch.targets[~each.scored] == -1).all())
    return found


@pytest.mark.parametrize("stride", [1, 7, 13, 20])
@pytest.mark.parametrize("prefix", [(), (5, 6)])
def test_every_token_counts_once_with_the_context_that_was_promised(
    stride: int, prefix: tuple[int, ...]
) -> None:
    source = corpus(90, 20, 47, 9)
    text = sliding_windows(source, encoding(prefix), tokens=10_000, window=20, stride=stride, seed=3)
    found = [each for each in predictions(text) if each[0] not in prefix]
    documents = [[ord(sign) for sign in document] + [END] for document in source.documents]
    pairs = [pair for ids in documents for pair in zip(ids, [*ids[1:], -1], strict=True)]
    assert Counter(pair[:2] for pair in found) == Counter(pairs)
    assert text.tokens == len(pairs) + len(prefix) * len(documents)
    assert max(len(row) for row in text.rows) == 20
    begin = {token: place for ids in documents for place, token in enumerate(ids) if token != END}
    for token, _, before in found:
        if token != END and begin[token] >= 20 - len(prefix):
            assert before >= 20 - stride


def test_targets_beyond_a_row_are_the_documents_own() -> None:
    text = sliding_windows(corpus(30), encoding(), tokens=100, window=10, stride=10, seed=0)
    assert [target for _, target, _ in predictions(text)] == [*range(1001, 1030), END, -1]


def test_a_budget_is_shared_out_and_what_short_documents_leave_goes_to_long_ones() -> None:
    text = sliding_windows(corpus(500, 12, 500), encoding(), tokens=300, window=50, stride=25, seed=1)
    assert text.tokens == 300
    tokens = [token for token, _, _ in predictions(text) if token != END]
    counts = [
        sum(begin <= token < end for token in tokens)
        for begin, end in ((1000, 1500), (1500, 1512), (1512, 2012))
    ]
    assert counts[1] == 12
    assert sorted((counts[0], counts[2])) == [100, 187]


def test_blocks_of_text_follow_the_document_not_the_windows() -> None:
    text = sliding_windows(corpus(600), encoding(), tokens=600, window=100, stride=40, seed=0)
    assert text.blocks == 2
    where: dict[int, int] = {}
    for each in text.batches(1000):
        for token, block in zip(each.batch.token_ids.tolist(), each.where.tolist(), strict=True):
            assert where.setdefault(token, block) == block
    assert [where[token] for token in (1000, 1299, 1300, 1599)] == [0, 0, 1, 1]


def test_plain_rows_count_whole() -> None:
    rows = [torch.arange(30), torch.arange(40, 50)]
    text = ScoredText.of_rows(rows)
    assert (text.tokens, text.read, text.blocks) == (40, 40, 2)
    (batch,) = text.batches(100)
    assert bool(batch.scored.all())
    assert batch.batch.targets.tolist() == [*range(1, 30), -1, *range(41, 50), -1]
    assert np.array_equal(batch.where, [0] * 30 + [1] * 10)


def test_rows_of_one_document_are_one_draw_where_there_are_documents_enough() -> None:
    rows = [torch.arange(10)] * 60
    text = ScoredText.of_rows(rows, [place // 3 for place in range(60)])
    assert text.blocks == 20
    assert text.where.tolist() == [place // 30 for place in range(600)]


def test_too_little_text_is_refused() -> None:
    with pytest.raises(CorpusError, match="no document of 8 tokens"):
        sliding_windows(corpus(3, 2), encoding(), tokens=100, window=20, stride=5, seed=0)
