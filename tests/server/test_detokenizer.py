"""Streamed text against the tokenizer's own decode, for random token streams, and stop strings across borders."""

from pathlib import Path

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from exeunt.server import detokenizer
from exeunt.server.detokenizer import StreamDetokenizer, spelling_of, token_text

PACKAGED = Path(__file__).parents[2] / "deploy" / "packaged_model"


def _byte_level() -> PreTrainedTokenizerBase:
    """Every byte a token, some merged ones that begin or end inside a character, special and added tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: index for index, char in enumerate(alphabet)}
    merges = [("Ġ", "a"), ("Ã", "©"), ("ð", "Ł"), ("ĺ", "Ģ"), ("a", "n"), ("an", "d"), ("ä", "½"), ("ł", "ä")]
    for left, right in merges:
        vocab[left + right] = len(vocab)
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([AddedToken("<tool é>", normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")


def _sentencepiece(*, strip: bool) -> PreTrainedTokenizerBase:
    """Llama-style: ▁ for a space, bytes as the fallback; with and without the stripped first space."""
    words = ["<unk>", "<s>", "▁", "▁a", "a", "▁and", "▁▁", "é", "😀", "<0x>", "b"]
    vocab = {word: index for index, word in enumerate([*words, *(f"<0x{byte:02X}>" for byte in range(256))])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strip else steps)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>")


def _metaspace() -> PreTrainedTokenizerBase:
    vocab = [("<unk>", 0.0), ("▁", -1.0), ("▁a", -1.0), ("a", -1.0), ("▁▁and", -1.0), ("é", -1.0)]
    backend = Tokenizer(models.Unigram(vocab, unk_id=0))
    backend.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def _wordpiece() -> PreTrainedTokenizerBase:
    """A decoder of a kind that is not known: the window."""
    vocab = {word: index for index, word in enumerate(["[UNK]", "a", "##b", "cat", "##s", "é", "##�", "dog"])}
    backend = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece(cleanup=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")


TOKENIZERS = {
    "byte_level": _byte_level(),
    "sentencepiece": _sentencepiece(strip=True),
    "sentencepiece_unstripped": _sentencepiece(strip=False),
    "metaspace": _metaspace(),
    "wordpiece": _wordpiece(),
}


def _stream(tokenizer: PreTrainedTokenizerBase, ids: list[int], prompt: list[int] | None = None) -> list[str]:
    stream = StreamDetokenizer(tokenizer, prompt_token_ids=prompt or [])
    return [*(stream.push(token_id) for token_id in ids), stream.finish()]


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _without_spoilt_runs(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """Without runs of byte-fallback tokens that are not UTF-8: the one place where a stream may differ from decode."""
    spelling = spelling_of(tokenizer)
    if spelling is None or not spelling.byte_fallback:
        return ids
    kept: list[int] = []
    run: list[int] = []
    for token_id in [*ids, None]:  # special ones are bytes too, none
        if token_id is not None and isinstance(spelling.piece(token_id), bytes):
            run.append(token_id)
            continue
        try:
            b"".join(piece for i in run if isinstance(piece := spelling.piece(i), bytes)).decode()
            kept += run
        except UnicodeDecodeError:
            pass
        run = []
        if token_id is not None:
            kept.append(token_id)
    return kept


@pytest.mark.parametrize("name", TOKENIZERS)
class TestAgainstDecode:
    @settings(max_examples=200, deadline=None)
    @given(data=st.data())
    def test_a_random_stream(self, name: str, data: st.DataObject) -> None:
        tokenizer = TOKENIZERS[name]
        ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=24))
        ids = _without_spoilt_runs(tokenizer, ids)
        assert "".join(_stream(tokenizer, ids)) == _decode(tokenizer, ids)

    @settings(max_examples=100, deadline=None)
    @given(data=st.data())
    def test_a_stream_that_continues_a_prompt(self, name: str, data: st.DataObject) -> None:
        tokenizer = TOKENIZERS[name]
        drawn = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=16))
        both = _without_spoilt_runs(tokenizer, drawn)
        cut = data.draw(st.integers(0, len(both)))
        prompt, ids = both[:cut], both[cut:]
        before, whole = _decode(tokenizer, prompt), _decode(tokenizer, prompt + ids)
        assume(not before.endswith("\ufffd"))  # a prompt may end inside a character: see below
        assert before + "".join(_stream(tokenizer, ids, prompt)) == whole


TEXTS = st.text(st.sampled_from("aé你😀 \n\u200d▁bn"), max_size=20)


@pytest.mark.parametrize("name", ["byte_level", "sentencepiece", "sentencepiece_unstripped"])
@settings(max_examples=100, deadline=None)
@given(text=TEXTS)
@example(text="👨‍👩‍👧 é")
def test_no_character_is_sent_in_halves(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    ids = _bytewise(tokenizer, text)
    parts = _stream(tokenizer, ids)
    assert "".join(parts) == _decode(tokenizer, ids)
    assert all("\ufffd" not in part for part in parts)
    assert parts[-1] == ""


def _bytewise(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """`text` with a token for every byte."""
    names = {value: char for char, value in detokenizer._BYTE_OF_CHAR.items()}
    byte_level = tokenizer.convert_tokens_to_ids("<0x41>") in (None, tokenizer.unk_token_id)
    tokens = [names[byte] if byte_level else f"<0x{byte:02X}>" for byte in text.encode()]
    return [tokenizer.convert_tokens_to_ids(token) for token in tokens]


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_spoilt_run_of_bytes_costs_only_the_bytes_that_are_wrong(data: st.DataObject) -> None:
    tokenizer = TOKENIZERS["sentencepiece_unstripped"]
    spelling = spelling_of(tokenizer)
    assert spelling is not None
    ids = data.draw(st.lists(st.integers(2, len(tokenizer) - 1), max_size=24))
    expected, run = "", b""
    for piece in [*(spelling.piece(token_id) for token_id in ids), ""]:
        if isinstance(piece, bytes):
            run += piece
            continue
        while run:  # bytes that form characters are those characters; any other byte is one U+FFFD
            for length in range(4, -1, -1):
                try:
                    char = run[: max(length, 1)].decode()
                except UnicodeDecodeError:
                    continue
                if length and len(char) == 1:
                    expected, run = expected + char, run[length:]
                    break
            else:
                expected, run = expected + "\ufffd", run[1:]
        expected += piece
    assert "".join(_stream(tokenizer, ids)) == expected


def test_invalid_bytes_do_not_hold_the_text_back_for_ever() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    bad = _ids_of_bytes(tokenizer, b"\xff")[0]
    stream = StreamDetokenizer(tokenizer)
    assert [stream.push(bad) for _ in range(3)] == ["\ufffd"] * 3


def _ids_of_bytes(tokenizer: PreTrainedTokenizerBase, data: bytes) -> list[int]:
    names = {value: char for char, value in detokenizer._BYTE_OF_CHAR.items()}
    return [tokenizer.convert_tokens_to_ids(names[byte]) for byte in data]


def test_half_a_character_at_the_end_becomes_a_replacement_character() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    assert _stream(tokenizer, _ids_of_bytes(tokenizer, "é".encode()[:1])) == ["", "\ufffd"]


def test_a_prompt_that_ends_inside_a_character_is_completed() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    prompt, ids = _ids_of_bytes(tokenizer, "a😀".encode()[:3]), _ids_of_bytes(tokenizer, "😀b".encode()[2:])
    assert "".join(_stream(tokenizer, ids, prompt)) == "😀b"


def test_the_byte_alphabet_is_that_of_tokenizers() -> None:
    assert set(detokenizer._BYTE_OF_CHAR) == set(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(detokenizer._BYTE_OF_CHAR.values()) == list(range(256))


class TestStopStrings:
    @settings(max_examples=300, deadline=None)
    @given(
        text=st.text(st.sampled_from("ab"), max_size=30),
        stop=st.lists(st.text(st.sampled_from("ab"), min_size=1, max_size=4), min_size=1, max_size=3),
    )
    def test_the_text_ends_before_the_stop_string_completed_first(self, text: str, stop: list[str]) -> None:
        tokenizer = TOKENIZERS["byte_level"]
        stream = StreamDetokenizer(tokenizer, stop)
        sent = ""
        for token_id in _ids_of_bytes(tokenizer, text.encode()):
            sent += stream.push(token_id)
            assert text.startswith(sent)
        held = stream.finish()
        ends = [(text.find(s) + len(s), text.find(s)) for s in stop if s in text]
        assert stream.stopped == bool(ends)
        assert sent + held == (text[: min(ends)[1]] if ends else text)
        if ends:
            assert held == ""

    @settings(max_examples=100, deadline=None)
    @given(
        text=st.text(st.sampled_from("ab"), max_size=20),
        stop=st.text(st.sampled_from("ab"), min_size=1, max_size=4),
    )
    def test_nothing_is_held_back_that_cannot_be_the_start_of_a_stop_string(
        self, text: str, stop: str
    ) -> None:
        tokenizer = TOKENIZERS["byte_level"]
        stream = StreamDetokenizer(tokenizer, [stop])
        sent = "".join(stream.push(token_id) for token_id in _ids_of_bytes(tokenizer, text.encode()))
        if not stream.stopped:
            held = text[len(sent) :]
            assert stop.startswith(held)
            assert not any(stop.startswith(text[start:]) for start in range(len(sent)))

    def test_a_stop_string_across_tokens_and_inside_one(self) -> None:
        tokenizer = TOKENIZERS["byte_level"]
        and_, a, n = (tokenizer.convert_tokens_to_ids(token) for token in ("and", "a", "n"))
        stream = StreamDetokenizer(tokenizer, ["nda"])
        assert [stream.push(and_), stream.push(n), stream.push(and_), stream.push(a)] == ["a", "nd", "na", ""]
        assert stream.stopped
        assert stream.push(a) == stream.finish() == ""

    def test_the_cut_does_not_depend_on_the_tokens(self) -> None:
        tokenizer = TOKENIZERS["byte_level"]
        one = StreamDetokenizer(tokenizer, ["and", "n"])
        assert one.push(tokenizer.convert_tokens_to_ids("and")) == "a"
        assert one.stopped

    def test_a_long_stop_string_costs_no_more_per_token(self) -> None:
        tokenizer = TOKENIZERS["byte_level"]
        a, n = tokenizer.convert_tokens_to_ids("a"), tokenizer.convert_tokens_to_ids("n")
        stream = StreamDetokenizer(tokenizer, ["a" * 50_000 + "b"])
        assert "".join(stream.push(a) for _ in range(1000)) + stream.push(n) == "a" * 1000 + "n"

    def test_an_empty_stop_string_is_refused(self) -> None:
        with pytest.raises(ValueError, match="stop string is empty"):
            StreamDetokenizer(TOKENIZERS["byte_level"], ["x", ""])


def test_a_token_alone_keeps_its_space_and_its_name() -> None:
    llama, gpt = TOKENIZERS["sentencepiece"], TOKENIZERS["byte_level"]
    assert token_text(llama, llama.convert_tokens_to_ids("▁and")) == " and"
    assert token_text(llama, llama.convert_tokens_to_ids("<0xC3>")) == "\ufffd"
    assert token_text(llama, llama.convert_tokens_to_ids("<s>")) == "<s>"
    assert token_text(gpt, gpt.convert_tokens_to_ids("Ġa")) == " a"


def test_an_unknown_id_adds_nothing() -> None:
    assert _stream(TOKENIZERS["byte_level"], [10**6]) == ["", ""]


REAL = ["gpt2", "stories260K", "babyllama-char105", "novels-12x160", "packaged"]


@pytest.mark.parametrize("name", REAL)
def test_real_tokenizers_stream_what_they_decode(name: str, request: pytest.FixtureRequest) -> None:
    if name == "packaged":
        folder = PACKAGED
    elif name == "gpt2":
        folder = request.getfixturevalue("shared_data") / "tokenizers" / "gpt2"
    else:
        folder = request.getfixturevalue("shared_models") / name
    if not (folder / "tokenizer.json").is_file():
        pytest.skip(f"needs {folder.name}/tokenizer.json")
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    assert spelling_of(tokenizer) is not None

    @settings(max_examples=150, deadline=None)
    @given(ids=st.lists(st.integers(0, len(tokenizer) - 1), max_size=30))
    def random_streams(ids: list[int]) -> None:
        ids = _without_spoilt_runs(tokenizer, ids)
        assert "".join(_stream(tokenizer, ids)) == _decode(tokenizer, ids)

    @settings(max_examples=50, deadline=None)
    @given(text=st.text(max_size=40))
    def texts(text: str) -> None:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert "".join(_stream(tokenizer, ids)) == _decode(tokenizer, ids)

    random_streams()
    texts()
