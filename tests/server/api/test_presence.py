"""Work for a client goes on as long as the client is there."""

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import Request

from exeunt.server.api.errors import ApiError
from exeunt.server.api.outcome import OutcomeCount
from exeunt.server.api.presence import while_present

Counted = Callable[..., float]


def scope(availability: Any) -> dict[str, Any]:
    app = SimpleNamespace(state=SimpleNamespace(availability=availability))
    return {"type": "http", "method": "POST", "path": "/generate", "app": app, "headers": []}


def test_a_client_that_leaves_ends_the_work_and_is_counted(
    reopen: Callable[..., Any], counted: Counted
) -> None:
    ended = asyncio.Event()

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    async def receive() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    async def app(scope: Any, receive: Any, send: Any) -> None:
        with pytest.raises(ApiError) as refused:
            await while_present(Request(scope, receive), work())
        assert refused.value.status_code == 499
        await asyncio.wait_for(ended.wait(), 30)

    asyncio.run(OutcomeCount(app)(scope(reopen()), receive, None))  # type: ignore[arg-type]
    assert counted("client_disconnects_total") == 1
    assert counted("request_success_total", finish_reason="cancelled") == 1


def test_what_comes_of_the_work_comes_of_it_while_the_client_is_there(reopen: Callable[..., Any]) -> None:
    async def receive() -> dict[str, Any]:
        await asyncio.Event().wait()
        return {"type": "http.disconnect"}

    async def three() -> int:
        await asyncio.sleep(0)
        return 3

    async def broken() -> int:
        raise ValueError("no such text")

    async def app() -> None:
        http = Request(scope(reopen()), receive)
        assert await while_present(http, three()) == 3
        with pytest.raises(ValueError, match="no such text"):
            await while_present(http, broken())

    asyncio.run(app())


def test_what_is_done_when_the_client_leaves_has_been_done() -> None:
    async def gone() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    async def three() -> int:
        return 3

    assert asyncio.run(while_present(Request({"type": "http"}, gone), three())) == 3


def test_nothing_is_left_behind() -> None:
    async def silent() -> Any:
        await asyncio.Event().wait()

    async def three() -> int:
        return 3

    async def tasks_left() -> int:
        assert await while_present(Request({"type": "http"}, silent), three()) == 3
        await asyncio.sleep(0)
        return len(asyncio.all_tasks()) - 1

    assert asyncio.run(tasks_left()) == 0
