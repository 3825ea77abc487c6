"""A text is never longer than its tokens spell, where that is said; and it is said only where it is known."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

from exeunt.server.api.errors import ApiError
from exeunt.server.api.spelling_bound import longest_token_bytes
from exeunt.server.api.token_limits import check_bytes
from tests.server.api.conftest import ScriptedEngine, make_service
from tests.server.conftest import byte_tokenizer

LONGEST = len("<|endoftext|>")
BYTES = {piece: place for place, piece in enumerate(pre_tokenizers.ByteLevel.alphabet())}


@given(st.text() | st.text(alphabet="<|endoftx>a é😀"))
def test_a_text_is_no_longer_than_its_tokens_spell(text: str) -> None:
    ids = byte_tokenizer().encode(text)
    assert len(text.encode()) <= len(ids) * LONGEST


def test_the_longest_token_is_looked_for_among_all() -> None:
    assert longest_token_bytes(byte_tokenizer()) == LONGEST
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["é" * 20])
    assert longest_token_bytes(tokenizer) == 40


def _changed(change: Callable[[Tokenizer], Any]) -> Any:
    tokenizer = byte_tokenizer()
    change(tokenizer.backend_tokenizer)
    return tokenizer


@pytest.mark.parametrize(
    "change",
    [
        lambda backend: setattr(backend, "normalizer", normalizers.Replace(Regex(" +"), " ")),
        lambda backend: setattr(backend, "pre_tokenizer", pre_tokenizers.Metaspace()),
        lambda backend: setattr(backend, "pre_tokenizer", pre_tokenizers.Digits()),
        lambda backend: setattr(
            backend,
            "pre_tokenizer",
            pre_tokenizers.Sequence([pre_tokenizers.Split(" ", "removed"), pre_tokenizers.ByteLevel()]),
        ),
        lambda backend: backend.add_tokens([AddedToken("<pad>", lstrip=True)]),
        lambda backend: backend.add_tokens([AddedToken("<pad>", rstrip=True)]),
        lambda backend: setattr(backend, "model", models.BPE({"a": 0}, [])),
        lambda backend: setattr(backend, "model", models.BPE(BYTES, [], continuing_subword_prefix="##")),
        lambda backend: setattr(backend, "model", models.BPE(BYTES, [], end_of_word_suffix="</w>")),
        lambda backend: setattr(backend, "model", models.WordLevel({"a": 0, "?": 1}, unk_token="?")),
    ],
)
def test_nothing_is_said_where_a_text_may_shrink(change: Callable[[Tokenizer], Any]) -> None:
    assert longest_token_bytes(_changed(change)) is None


def test_cuts_that_leave_every_byte_are_no_hindrance() -> None:
    def change(backend: Tokenizer) -> None:
        steps = [pre_tokenizers.Split(Regex(r"\s+"), "isolated"), pre_tokenizers.ByteLevel(use_regex=False)]
        backend.pre_tokenizer = pre_tokenizers.Sequence(steps)

    assert longest_token_bytes(_changed(change)) == LONGEST


@pytest.mark.parametrize(
    ("text", "fits"),
    [
        ("x" * 50, True),
        ("x" * 51, False),
        ("é" * 25, True),
        ("é" * 26, False),
        ("😀" * 12, True),
        ("😀" * 13, False),
    ],
)
def test_the_bound_is_in_bytes_and_is_still_allowed(text: str, fits: bool) -> None:
    if fits:
        check_bytes(text, 10, 5, "prompt")
        return
    with pytest.raises(ApiError, match=f"prompt has {len(text.encode())} bytes"):
        check_bytes(text, 10, 5, "prompt")


@pytest.mark.parametrize(("path", "field"), [("/generate", "prompt"), ("/score", "text")])
def test_a_text_that_cannot_fit_is_refused_uncut(
    client: httpx.Client, reopen: Callable[..., Any], engine: ScriptedEngine, path: str, field: str
) -> None:
    tokenizer = byte_tokenizer()
    model = SimpleNamespace(**vars(make_service(engine).model) | {"tokenizer": tokenizer})
    reopen(model=model)
    fits = {field: "x" * 90} | ({"max_new_tokens": 1} if field == "prompt" else {})
    assert client.post(path, json=fits).status_code == 200
    tokenizer.encode = None  # who cuts from here on fails
    response = client.post(path, json={field: "x" * (100 * LONGEST + 1)})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert (error["code"], error["param"]) == ("too_long", field)
    assert error["message"] == (
        f"{field} has 1301 bytes; the limit is 100 tokens, which spell at most 1300 bytes: shorten it."
    )
