"""Turning a stream of token ids into text that is safe to send: no half characters, nothing of a stop string.

Each token costs O(its own bytes), however long the answer is: the tokenizers of the supported families spell
a token as bytes (byte-level BPE) or as text with bytes as the fallback (sentencepiece), so an answer's text
is its tokens' pieces in a row, put through an incremental UTF-8 decoder. A tokenizer with a decoder of
another kind is asked to decode a short window around each new token.

The text equals that of the tokenizer's own `decode` with special tokens left out and no cleaning-up of
spaces. One thing differs, because a stream cannot take text back: where a run of byte-fallback tokens turns
out not to be UTF-8, `decode` spoils all of the run, and the stream only the bytes that are wrong.
"""

import codecs
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol
from weakref import WeakKeyDictionary

from transformers import PreTrainedTokenizerBase

_REPLACEMENT = "\ufffd"
_UTF8_LENGTH = 4  # bytes of the longest character: what a window holds back, and how much context it keeps
_EACH_BYTE = "exeunt.replace-each-byte"


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    """One replacement character per byte, as byte fallback does (Python's own: one per sequence)."""
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return _REPLACEMENT * (error.end - error.start), error.end


codecs.register_error(_EACH_BYTE, _replace_each_byte)


class StreamDetokenizer:
    """The text of one answer, token by token.

    Text is held back while it may still be the start of a character or of one of the `stop` strings.
    `stopped` turns true when a stop string is complete; the text ends before it, and later tokens add
    nothing. Of several stop strings the one completed first counts, and of those completed by the same
    character the longest: what a client sees does not depend on how the text was cut into tokens.

    `prompt_token_ids` says what the answer continues. Tokenizers that mark words by a leading space drop that
    of the first word of a text; after a prompt it is not the first, and the space stays.
    """

    __slots__ = ("_matchers", "_pending", "_pieces", "stopped")

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop: Sequence[str] = (),
        prompt_token_ids: Sequence[int] = (),
    ) -> None:
        """Raises ValueError for an empty stop string."""
        if not all(stop):
            raise ValueError("a stop string is empty; it would stop every answer before its first token")
        spelling = spelling_of(tokenizer)
        self._pieces: _TextStream = (
            _WindowStream(tokenizer, prompt_token_ids)
            if spelling is None
            else _PieceStream(spelling, prompt_token_ids)
        )
        self._matchers = [_StopMatcher(text) for text in stop]
        self._pending = ""
        self.stopped = False

    @property
    def may_stop(self) -> bool:
        """Whether text may end the answer."""
        return bool(self._matchers)

    def push(self, token_id: int) -> str:
        """The text that has become safe to send with this token; often empty."""
        return "" if self.stopped else self._release(self._pieces.push(token_id))

    def finish(self) -> str:
        """The text still held back: nothing more will come. Half a character becomes U+FFFD."""
        if self.stopped:
            return ""
        text = self._release(self._pieces.finish()) + self._pending
        self._pending = ""
        return text

    def _release(self, text: str) -> str:
        """Takes new text; returns what can no longer be part of a stop string."""
        if not self._matchers:
            return text
        for offset, char in enumerate(text):
            complete = [matcher.length for matcher in self._matchers if matcher.advance(char)]
            if complete:
                self.stopped = True
                seen = self._pending + text[: offset + 1]
                self._pending = ""
                return seen[: len(seen) - max(complete)]
        seen = self._pending + text
        safe = len(seen) - max(matcher.matched for matcher in self._matchers)
        self._pending = seen[safe:]
        return seen[:safe]


class _StopMatcher:
    """Knuth-Morris-Pratt over a stream: how much of one stop string the text so far ends with."""

    __slots__ = ("_fallback", "_text", "length", "matched")

    def __init__(self, text: str) -> None:
        self._text = text
        self.length = len(text)
        self.matched = 0
        self._fallback = [0] * len(text)
        for index in range(1, len(text)):
            self.advance(text[index])
            self._fallback[index] = self.matched
        self.matched = 0

    def advance(self, char: str) -> bool:
        """Takes one character; true when the stop string is complete."""
        while self.matched and self._text[self.matched] != char:
            self.matched = self._fallback[self.matched - 1]
        if self._text[self.matched] == char:
            self.matched += 1
        return self.matched == self.length


@dataclass(frozen=True, slots=True)
class Spelling:
    """How a tokenizer spells its tokens.

    A piece is bytes (possibly part of a character) or text. `leading_space` says what the first token of a
    text loses: nothing, one space, or every space that it starts a word with.
    """

    tokenizer: Any  # a tokenizers.Tokenizer
    kind: Literal["byte_level", "sentencepiece"]
    leading_space: Literal["keep", "strip_one", "strip_first_token"]
    space: str  # what stands for a space inside tokens; "" for byte-level
    byte_fallback: bool
    special: frozenset[int]
    pieces: dict[int, bytes | str]  # filled as tokens are met

    def piece(self, token_id: int) -> bytes | str:
        """A token's own bytes or text; empty for special and unknown ids."""
        piece = self.pieces.get(token_id)
        if piece is None:
            piece = self.pieces[token_id] = self._spell(token_id)
        return piece

    def _spell(self, token_id: int) -> bytes | str:
        token: str | None = None if token_id in self.special else self.tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        if self.kind == "byte_level":
            try:
                return bytes(_BYTE_OF_CHAR[char] for char in token)
            except KeyError:  # an added token is spelled as it is
                return token.encode()
        if self.byte_fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            try:
                return bytes([int(token[3:5], 16)])
            except ValueError:
                pass
        return token.replace(self.space, " ")


def spelling_of(tokenizer: PreTrainedTokenizerBase) -> Spelling | None:
    """How `tokenizer` spells tokens, worked out once per tokenizer; None for a decoder that is not known."""
    if tokenizer not in _SPELLINGS:
        _SPELLINGS[tokenizer] = _read_spelling(tokenizer)
    return _SPELLINGS[tokenizer]


def token_text(tokenizer: PreTrainedTokenizerBase, token_id: int) -> str:
    """A token's own text: leading space kept, half characters as U+FFFD, special tokens by their name."""
    spelling = spelling_of(tokenizer)
    if spelling is not None and token_id not in spelling.special:
        piece = spelling.piece(token_id)
        return piece if isinstance(piece, str) else piece.decode("utf-8", "replace")
    return _decode(tokenizer, [token_id], skip_special_tokens=False)


class TokenPieces:
    """Each token's own text (`token_text`), worked out once and kept."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._pieces: dict[int, str] = {}

    def of(self, token_id: int) -> str:
        """The token as it is printed alone."""
        piece = self._pieces.get(token_id)
        if piece is None:
            piece = self._pieces[token_id] = token_text(self._tokenizer, token_id)
        return piece


_SPELLINGS: WeakKeyDictionary[PreTrainedTokenizerBase, Spelling | None] = WeakKeyDictionary()


def _read_spelling(tokenizer: PreTrainedTokenizerBase) -> Spelling | None:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.decoder is None:
        return None
    shape = _read_decoder(json.loads(backend.decoder.__getstate__()))
    if shape is None:
        return None
    kind, leading_space, space, byte_fallback = shape
    special = frozenset(
        token_id for token_id, token in backend.get_added_tokens_decoder().items() if token.special
    )
    return Spelling(backend, kind, leading_space, space, byte_fallback, special, {})


_Shape = tuple[
    Literal["byte_level", "sentencepiece"], Literal["keep", "strip_one", "strip_first_token"], str, bool
]


def _read_decoder(decoder: dict[str, Any]) -> _Shape | None:
    """(kind, leading_space, space, byte_fallback) of a decoder in its JSON form; None if not known."""
    if decoder["type"] == "ByteLevel":
        return "byte_level", "keep", "", False
    if decoder["type"] == "Metaspace":
        never = decoder.get("prepend_scheme", "always") == "never"
        return "sentencepiece", "keep" if never else "strip_first_token", decoder["replacement"], False
    if decoder["type"] != "Sequence":
        return None
    steps = list(decoder["decoders"])
    if len(steps) == 1:
        return _read_decoder(steps[0])
    kinds = [step["type"] for step in steps]
    strips = kinds[-1:] == ["Strip"]
    if strips:
        last = steps[-1]
        if (last["content"], last["start"], last["stop"]) != (" ", 1, 0):
            return None
        kinds.pop()
    byte_fallback = "ByteFallback" in kinds
    if kinds != (["Replace", "ByteFallback", "Fuse"] if byte_fallback else ["Replace", "Fuse"]):
        return None
    space = steps[0]["pattern"].get("String")
    if not space or steps[0]["content"] != " ":
        return None
    return "sentencepiece", "strip_one" if strips else "keep", space, byte_fallback


class _TextStream(Protocol):
    """Ids in, text out; never half a character."""

    def push(self, token_id: int) -> str: ...
    def finish(self) -> str: ...


class _PieceStream:
    """Pieces in a row: text as it stands, bytes through an incremental UTF-8 decoder."""

    __slots__ = ("_at_start", "_decoder", "_spelling")

    def __init__(self, spelling: Spelling, prompt_token_ids: Sequence[int]) -> None:
        errors = "replace" if spelling.kind == "byte_level" else _EACH_BYTE
        self._spelling = spelling
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors)
        self._at_start = spelling.leading_space != "keep"
        # A prompt may end inside a character that the answer completes, so its last bytes go through the
        # decoder; and it ends the start of the text at its last token that is not special.
        tail = []
        for token_id in reversed(prompt_token_ids):
            if spelling.piece(token_id):
                tail.append(token_id)
                if len(tail) == _UTF8_LENGTH:
                    break
        for token_id in reversed(tail):
            self.push(token_id)

    def push(self, token_id: int) -> str:
        piece = self._spelling.piece(token_id)
        if isinstance(piece, bytes):
            text = self._decoder.decode(piece)
        else:  # a text piece ends a run of bytes, complete or not
            text = self._decoder.decode(b"", final=True) + piece
        if self._at_start and piece:
            text = self._without_leading_space(text)
        return text

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)

    def _without_leading_space(self, text: str) -> str:
        if self._spelling.leading_space == "strip_first_token":
            self._at_start = False
            return text.replace(" ", "")
        self._at_start = not text
        return text.removeprefix(" ")


class _WindowStream:
    """For decoders of unknown kind: decodes the last few tokens and takes what the new one added."""

    __slots__ = ("_context", "_new", "_tokenizer")

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt_token_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._context = list(prompt_token_ids[-_UTF8_LENGTH:])
        self._new: list[int] = []

    def push(self, token_id: int) -> str:
        self._new.append(token_id)
        text = self._added()
        # A character is at most four bytes: a text that ends in U+FFFD for longer than that really says
        # U+FFFD.
        if not text or (text.endswith(_REPLACEMENT) and len(self._new) < _UTF8_LENGTH):
            return ""
        self._context, self._new = (self._context + self._new)[-_UTF8_LENGTH:], []
        return text

    def finish(self) -> str:
        text, self._new = self._added(), []
        return text

    def _added(self) -> str:
        before = _decode(self._tokenizer, self._context)
        text = _decode(self._tokenizer, self._context + self._new)
        # Where the context ended inside a character, the new tokens may have completed it.
        return text[len(before if text.startswith(before) else before.rstrip(_REPLACEMENT)) :]


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int], *, skip_special_tokens: bool = True) -> str:
    return str(
        tokenizer.decode(ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)
    )


def _bytes_of_chars() -> dict[str, int]:
    """The byte that each character of byte-level BPE stands for (GPT-2's table, inverted)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHAR = _bytes_of_chars()
