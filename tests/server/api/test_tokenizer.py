"""The API's tokenizer under many callers: one at a time, and the event loop goes on meanwhile."""

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any, ClassVar

import pytest

from exeunt.compression.model import LoadedModel
from exeunt.server.api.tokenizer import INLINE_CHARACTERS, SharedTokenizer
from exeunt.server.engine import Engine
from exeunt.server.engine_config import EngineConfig
from exeunt.server.metrics import Metrics, new_registry

LONG = "x" * (INLINE_CHARACTERS + 1)
WORK_S = 0.2


class FrailTokenizer:
    """Notes on which thread each call ran, and fails when two run at once."""

    special_tokens_map: ClassVar = {"eos_token": "<eos>", "additional_special_tokens": ["<a>"]}

    def __init__(self) -> None:
        self.busy = threading.Lock()
        self.threads: list[str] = []

    def __len__(self) -> int:
        return 256

    def _use(self, long: bool) -> None:
        assert self.busy.acquire(blocking=False), "two callers at once"
        self.threads.append(threading.current_thread().name)
        if long:
            time.sleep(WORK_S)
        self.busy.release()

    def encode(self, text: str, *, add_special_tokens: bool, verbose: bool) -> list[int]:
        self._use(len(text) > INLINE_CHARACTERS)
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        self._use(len(ids) > INLINE_CHARACTERS)
        return bytes(ids).decode()

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        self._use(len(ids) > INLINE_CHARACTERS)
        return [f"<{i}>" for i in ids]


async def longest_pause(until: asyncio.Future[Any]) -> float:
    """How long the event loop was held up at most, in seconds, until `until` was done."""
    worst, last = 0.0, time.monotonic()
    while not until.done():
        await asyncio.sleep(0.001)
        now = time.monotonic()
        worst, last = max(worst, now - last), now
    return worst


def test_the_loop_goes_on_and_nobody_shares_the_tokenizer() -> None:
    frail = FrailTokenizer()

    async def watched() -> tuple[list[Any], float]:
        shared = SharedTokenizer(frail)
        uses: list[Callable[[], Any]] = [
            lambda: shared.encode(LONG),
            lambda: shared.decode([120] * len(LONG)),
            lambda: shared.names([120] * len(LONG)),
            *[lambda: shared.encode("ab"), lambda: shared.decode([97]), lambda: shared.names([1])] * 10,
        ]
        work = asyncio.gather(*(use() for use in uses))
        pause = await longest_pause(work)
        return work.result(), pause

    results, pause = asyncio.run(watched())
    assert results[0] == [120] * len(LONG)
    assert results[1] == LONG
    assert results[3:6] == [[97, 98], "a", ["<1>"]]
    assert pause < WORK_S / 2
    assert len(frail.threads) == 33
    assert len(set(frail.threads)) == 1, "short texts wait behind a long one, and not on the loop's thread"


def test_a_short_text_needs_no_thread_while_the_tokenizer_is_free() -> None:
    frail = FrailTokenizer()
    asyncio.run(SharedTokenizer(frail).encode("ab"))
    assert frail.threads == [threading.current_thread().name]


def test_a_failure_leaves_the_tokenizer_free() -> None:
    class Broken(FrailTokenizer):
        def decode(self, ids: list[int]) -> str:
            raise ValueError("no such id")

    async def fail_then_encode() -> list[int]:
        shared = SharedTokenizer(Broken())
        for ids in ([1], [1] * 10_000):
            with pytest.raises(ValueError, match="no such id"):
                await shared.decode(ids)
        return await shared.encode("ab")

    assert asyncio.run(fail_then_encode()) == [97, 98]


def test_the_engine_spells_tokens_with_a_copy_of_its_own(tiny_model: LoadedModel) -> None:
    metrics = Metrics(new_registry(), "tiny", ["0", "1", "2"], ["block_1", "block_3"])
    engine = Engine(tiny_model, EngineConfig(max_model_len=64, kv_cache_bytes=1 << 20), metrics)
    own = engine._lives._tokenizer
    assert own is not tiny_model.tokenizer
    assert own.backend_tokenizer is not tiny_model.tokenizer.backend_tokenizer
    text = "They leave, é."
    assert own.encode(text) == tiny_model.tokenizer.encode(text)
