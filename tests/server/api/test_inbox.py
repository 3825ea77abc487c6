"""The inbox between the engine's thread and a request's coroutine, on the event loop that the server runs."""

import asyncio
import gc
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import uvloop

from exeunt.server.api.inbox import Attendance, ClientGoneError, Inbox, _alarms


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Callable[[Awaitable[Any]], Any]:
    def ran(work: Any) -> Any:
        with asyncio.Runner(loop_factory=request.param) as runner:
            return runner.run(asyncio.wait_for(work, 20))

    return ran


Run = Callable[[Any], Any]


async def _gone_at_once() -> Any:
    return {"type": "http.disconnect"}


async def _stays() -> Any:
    await asyncio.Event().wait()


async def _all(inbox: Inbox[int], count: int) -> list[int]:
    got: list[int] = []
    while len(got) < count:
        got += await inbox.next()
    return got


def test_items_of_a_thread_come_to_every_inbox_in_order(run: Run) -> None:
    inboxes_, each = 24, 400

    async def work() -> list[list[int]]:
        inboxes: list[Inbox[int]] = [Inbox() for _ in range(inboxes_)]

        def engine() -> None:
            for item in range(each):
                for inbox in inboxes:
                    inbox.put(item)
                if item % 16 == 0:
                    time.sleep(0.0005)  # now and then the loop is asleep when the next ones come

        thread = threading.Thread(target=engine)
        thread.start()
        found = await asyncio.gather(*(_all(inbox, each) for inbox in inboxes))
        thread.join()
        return found

    assert run(work()) == [list(range(each))] * inboxes_


def test_the_loop_is_woken_once_for_what_gathers_while_it_is_busy(run: Run) -> None:
    async def work() -> int:
        loop, calls = asyncio.get_running_loop(), []
        inboxes: list[Inbox[int]] = [Inbox() for _ in range(8)]
        waker = loop.call_soon_threadsafe

        class Counted:
            def call_soon_threadsafe(self, call: Callable[[], None]) -> None:
                calls.append(call)
                waker(call)

        assert len({id(inbox._alarm) for inbox in inboxes}) == 1
        counted = Counted()
        inboxes[0]._alarm._loop = lambda: counted  # type: ignore[assignment]

        def engine() -> None:
            for inbox in inboxes:
                inbox.put(1)

        thread = threading.Thread(target=engine)
        thread.start()
        thread.join()  # the loop, which runs this, looks only afterwards
        await asyncio.gather(*(inbox.next() for inbox in inboxes))
        return len(calls)

    assert run(work()) == 1


def test_items_not_worth_waking_for_wait_for_one_that_is(run: Run) -> None:
    async def work() -> tuple[bool, list[int]]:
        inbox: Inbox[int] = Inbox(wakes=lambda item: item > 1)
        inbox.put(0)
        inbox.put(1)
        waiting = asyncio.create_task(inbox.next())
        await asyncio.sleep(0.02)
        early = waiting.done()
        inbox.put(2)
        return early, await waiting

    assert run(work()) == (False, [0, 1, 2])


def test_who_waits_too_long_is_told_after_what_had_come(run: Run) -> None:
    async def work() -> list[int]:
        inbox: Inbox[int] = Inbox(wakes=lambda item: item > 1)
        inbox.put(1)
        with Attendance(_stays, inbox, 0.01):
            got = await inbox.next()  # no item woke it, but the clock
            for _ in range(2):
                with pytest.raises(TimeoutError):
                    await inbox.next()
            inbox.put(5)
            return got + await inbox.next()

    assert run(work()) == [1, 5]


def test_an_attendance_that_has_ended_tells_nothing(run: Run) -> None:
    async def work() -> bool:
        inbox: Inbox[int] = Inbox()
        with Attendance(_stays, inbox, 0.01):
            pass
        waiting = asyncio.create_task(inbox.next())
        await asyncio.sleep(0.05)
        done = waiting.done()
        waiting.cancel()
        return done

    assert not run(work())


def test_a_client_that_leaves_ends_the_wait_whatever_has_come(run: Run) -> None:
    async def work() -> None:
        inbox: Inbox[int] = Inbox()
        inbox.put(1)
        with Attendance(_gone_at_once, inbox, None):
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            with pytest.raises(ClientGoneError):
                await inbox.next()

    run(work())


def test_a_loop_that_is_closed_is_no_trouble_of_the_engine_and_not_kept() -> None:
    async def make() -> Inbox[int]:
        return Inbox()

    gc.collect()
    before = len(_alarms)
    inbox = uvloop.run(make())
    inbox.put(1)
    gc.collect()
    assert len(_alarms) <= before
