"""The API's tokenizer: used by one caller at a time, and never waited for by the event loop.

A tokenizer is not safe to share between threads (it keeps settings that a call may change while another runs). The
engine has a copy of its own; this one belongs to the API, which makes another for texts that take seconds to cut.
"""

import asyncio
import copy
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from exeunt.server.api.spelling_bound import longest_token_bytes

T = TypeVar("T")

INLINE_CHARACTERS: Final = 1024  # what takes well below a millisecond is done at once, on the event loop
INLINE_TOKENS: Final = 512
LONG_CHARACTERS: Final = 64 * 1024  # from here on a text has seconds, for which nothing shorter waits
LONG_TOKENS: Final = 32 * 1024


@dataclass(frozen=True, slots=True)
class TokenizerFacts:
    """What a tokenizer is; read once, when nobody else uses it.

    `longest_token_bytes` bounds what a token spells, where that is known.
    """

    kind: str
    vocab_size: int
    special_tokens: dict[str, str]
    has_chat_template: bool
    longest_token_bytes: int | None


class SharedTokenizer:
    """A tokenizer that every coroutine of a server may use.

    What is short is done on the event loop if the tokenizer is free at this moment; everything else goes to one
    thread, in the order it came, while the loop goes on. What is long goes to another, which has a copy. Work whose
    caller is cancelled before its turn is not done.

    Args:
        tokenizer: as `transformers` makes them; nobody else may use it from now on.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._copy: Any = None  # made when it is first needed: it takes time and memory
        self._in_use = threading.Lock()
        self._callers = 0
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="exeunt-tokenizer")
        self._long_worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="exeunt-long-texts")
        self.facts = TokenizerFacts(
            kind=type(tokenizer).__name__,
            vocab_size=len(tokenizer),
            special_tokens={
                name: token for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)
            },
            has_chat_template=bool(getattr(tokenizer, "chat_template", None)),
            longest_token_bytes=longest_token_bytes(tokenizer),
        )

    @property
    def callers(self) -> int:
        """Who waits for work on a thread."""
        return self._callers

    def close(self) -> None:
        """Begin no more work on threads; what is under way there is not waited for."""
        for worker in (self._worker, self._long_worker):
            worker.shutdown(wait=False, cancel_futures=True)

    async def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The token ids of a text."""

        def ids(tokenizer: Any) -> list[int]:
            found = tokenizer.encode(text, add_special_tokens=add_special_tokens, verbose=False)
            return [int(token_id) for token_id in found]

        return await self._run(ids, len(text), INLINE_CHARACTERS, LONG_CHARACTERS)

    async def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids."""
        return await self._run(
            lambda tokenizer: str(tokenizer.decode(list(ids))), len(ids), INLINE_TOKENS, LONG_TOKENS
        )

    async def names(self, ids: Sequence[int]) -> list[str]:
        """How the vocabulary spells each token id."""
        return await self._run(
            lambda tokenizer: list(tokenizer.convert_ids_to_tokens(list(ids))),
            len(ids),
            INLINE_TOKENS,
            LONG_TOKENS,
        )

    async def _run(self, use: Callable[[Any], T], size: int, inline: int, long: int) -> T:
        if size <= inline and self._in_use.acquire(blocking=False):
            try:
                return use(self._tokenizer)
            finally:
                self._in_use.release()
        worker, work = (self._worker, self._alone) if size < long else (self._long_worker, self._on_copy)
        self._callers += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(worker, work, use)
        finally:
            self._callers -= 1

    def _alone(self, use: Callable[[Any], T]) -> T:
        with self._in_use:
            return use(self._tokenizer)

    def _on_copy(self, use: Callable[[Any], T]) -> T:
        if self._copy is None:
            self._copy = self._alone(copy.deepcopy)
        return use(self._copy)
