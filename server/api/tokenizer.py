"""The API's tokenizer: used by one caller at a time, and never waited for by the event loop.

A tokenizer is not safe to share between threads (it keeps settings that a call may change while another runs). The
engine has a copy of its own; this one belongs to the API.
"""

import asyncio
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final, TypeVar

T = TypeVar("T")

INLINE_CHARACTERS: Final = 1024  # what takes well below a millisecond is done at once, on the event loop
INLINE_TOKENS: Final = 512


@dataclass(frozen=True, slots=True)
class TokenizerFacts:
    """What a tokenizer is; read once, when nobody else uses it."""

    kind: str
    vocab_size: int
    special_tokens: dict[str, str]
    has_chat_template: bool


class SharedTokenizer:
    """A tokenizer that every coroutine of a server may use.

    What is short is done on the event loop if the tokenizer is free at this moment; everything else goes to one
    thread, in the order it came, while the loop goes on.

    Args:
        tokenizer: as `transformers` makes them; nobody else may use it from now on.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._in_use = threading.Lock()
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="exeunt-tokenizer")
        self.facts = TokenizerFacts(
            kind=type(tokenizer).__name__,
            vocab_size=len(tokenizer),
            special_tokens={
                name: token for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)
            },
            has_chat_template=bool(getattr(tokenizer, "chat_template", None)),
        )

    async def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The token ids of a text."""

        def ids() -> list[int]:
            found = self._tokenizer.encode(text, add_special_tokens=add_special_tokens, verbose=False)
            return [int(token_id) for token_id in found]

        return await self._run(ids, short=len(text) <= INLINE_CHARACTERS)

    async def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids."""
        return await self._run(
            lambda: str(self._tokenizer.decode(list(ids))), short=len(ids) <= INLINE_TOKENS
        )

    async def names(self, ids: Sequence[int]) -> list[str]:
        """How the vocabulary spells each token id."""
        return await self._run(
            lambda: list(self._tokenizer.convert_ids_to_tokens(list(ids))), short=len(ids) <= INLINE_TOKENS
        )

    async def _run(self, use: Callable[[], T], *, short: bool) -> T:
        if short and self._in_use.acquire(blocking=False):
            try:
                return use()
            finally:
                self._in_use.release()
        return await asyncio.get_running_loop().run_in_executor(self._worker, self._alone, use)

    def _alone(self, use: Callable[[], T]) -> T:
        with self._in_use:
            return use()
