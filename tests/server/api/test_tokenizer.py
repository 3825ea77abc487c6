"""The API's tokenizer under many callers: one at a time, and the event loop goes on meanwhile."""

import asyncio
import threading
from collections.abc import Callable
from typing import Any, ClassVar

import pytest

from exeunt.compression.model import LoadedModel
from exeunt.server.api.tokenizer import INLINE_CHARACTERS, LONG_CHARACTERS, SharedTokenizer
from exeunt.server.engine import Engine
from exeunt.server.engine_config import EngineConfig
from exeunt.server.metrics import Metrics, new_registry

LONG = "x" * (INLINE_CHARACTERS + 1)
HUGE = "y" * LONG_CHARACTERS
PATIENCE_S = 30  # how long something is waited for that would otherwise never happen


class FrailTokenizer:
    """Notes on which thread each call ran, and fails when two run at once.

    Long work ends when `loop_went_on` is set, which somebody on the event loop must do meanwhile.
    """

    special_tokens_map: ClassVar = {"eos_token": "<eos>", "additional_special_tokens": ["<a>"]}

    def __init__(self) -> None:
        self.busy = threading.Lock()
        self.threads: list[str] = []
        self.at_work = threading.Event()
        self.loop_went_on = threading.Event()
        self.encoded: list[str] = []

    def __deepcopy__(self, _: Any) -> "FrailTokenizer":
        """Another of which one may run at the same time, with the same events and notes."""
        assert self.busy.acquire(blocking=False), "copied while it is used"
        self.busy.release()
        other = FrailTokenizer()
        other.threads, other.at_work, other.loop_went_on = self.threads, self.at_work, self.loop_went_on
        other.encoded = self.encoded
        return other

    def __len__(self) -> int:
        return 256

    def _use(self, long: bool) -> None:
        assert self.busy.acquire(blocking=False), "two callers at once"
        self.threads.append(threading.current_thread().name)
        if long:
            self.at_work.set()
            assert self.loop_went_on.wait(PATIENCE_S), "the event loop stood still meanwhile"
        self.busy.release()

    def encode(self, text: str, *, add_special_tokens: bool, verbose: bool) -> list[int]:
        self.encoded.append(text)
        self._use(len(text) > INLINE_CHARACTERS)
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        self._use(len(ids) > INLINE_CHARACTERS)
        return bytes(ids).decode()

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        self._use(len(ids) > INLINE_CHARACTERS)
        return [f"<{i}>" for i in ids]


def test_the_loop_goes_on_and_nobody_shares_the_tokenizer() -> None:
    frail = FrailTokenizer()

    async def watched() -> list[Any]:
        shared = SharedTokenizer(frail)
        uses: list[Callable[[], Any]] = [
            lambda: shared.encode(LONG),
            lambda: shared.decode([120] * len(LONG)),
            lambda: shared.names([120] * len(LONG)),
            *[lambda: shared.encode("ab"), lambda: shared.decode([97]), lambda: shared.names([1])] * 10,
        ]
        work = asyncio.gather(*(use() for use in uses))
        while not frail.at_work.is_set():
            await asyncio.sleep(0)
        frail.loop_went_on.set()
        return await work

    results = asyncio.run(watched())
    assert results[0] == [120] * len(LONG)
    assert results[1] == LONG
    assert results[3:6] == [[97, 98], "a", ["<1>"]]
    assert len(frail.threads) == 33
    assert len(set(frail.threads)) == 1, "short texts wait behind a long one, and not on the loop's thread"


def test_nothing_shorter_waits_for_a_text_of_seconds() -> None:
    frail = FrailTokenizer()

    class Patient(FrailTokenizer):
        """Ends at once what is not HUGE."""

        def __deepcopy__(self, _: Any) -> FrailTokenizer:
            return frail

    async def answers() -> list[Any]:
        shared = SharedTokenizer(patient)
        huge = asyncio.create_task(shared.encode(HUGE))
        while not frail.at_work.is_set():
            await asyncio.sleep(0)
        shorter = [await shared.encode("ab"), await shared.encode(LONG), await shared.decode([97])]
        assert not huge.done()
        frail.loop_went_on.set()
        return [*shorter, await huge]

    patient = Patient()
    patient.loop_went_on.set()
    assert asyncio.run(answers()) == [[97, 98], [120] * len(LONG), "a", [121] * len(HUGE)]
    assert frail.encoded == [HUGE]


@pytest.mark.parametrize("text", [LONG, HUGE])
def test_a_text_that_nobody_waits_for_any_more_is_not_cut(text: str) -> None:
    frail = FrailTokenizer()

    async def leave() -> None:
        shared = SharedTokenizer(frail)
        first = asyncio.create_task(shared.encode(text))
        while not frail.at_work.is_set():
            await asyncio.sleep(0)
        second = asyncio.create_task(shared.encode(text + "2"))
        await asyncio.sleep(0)
        second.cancel()
        third = asyncio.create_task(shared.encode(text + "3"))
        await asyncio.sleep(0)
        frail.loop_went_on.set()
        await asyncio.gather(first, third)

    asyncio.run(leave())
    assert frail.encoded == [text, text + "3"]


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
