"""Measures what HTTP takes: the server's tokens/s with 32 clients beside its engine's alone, in turn.

Whole answers and streamed ones, exits off, greedy. The server is `exeunt serve` on the same bundle, a process of its
own. The clients are coroutines of this process that read and do not parse: on few cores they take time that the server
would have, and that counts against it. So each side's CPU stands beside its speed: all threads of a process together,
those too that wait in a loop for one another.
"""

import asyncio
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import typer
from rich.console import Console

from scripts.bench_runs import (
    MANY,
    RESULTS,
    VARIANTS,
    Count,
    Out,
    Prompts,
    Run,
    Sizes,
    in_turn,
    packaged_runs,
    write_result,
)
from scripts.check_readme.server import running_server

CLIENTS = 32
_CPU_SECONDS = re.compile(r"^process_cpu_seconds_total ([0-9.e+-]+)$", re.MULTILINE)
_COMPLETION_TOKENS = re.compile(rb'"completion_tokens": ?(\d+)')

console = Console()


def main(out: Out = None, prompt_tokens: Count = 64, new_tokens: Count = 128, repeats: Count = 5) -> None:
    """Measure, print, write JSON."""
    sizes = Sizes(prompt_tokens, new_tokens, repeats, CLIENTS // MANY)
    results: dict[str, Any] = {}
    with packaged_runs(sizes) as alone, ready(alone.bundle) as (url, seconds):
        console.print(f"ready after {seconds:.1f} s")
        prompts = alone.prompts(CLIENTS)
        for label, variant in VARIANTS.items():
            for streamed in (False, True):
                asked = {
                    "max_new_tokens": new_tokens,
                    "ignore_eos": True,
                    "stream": streamed,
                    "compression": {**asdict(variant), "early_exit": False},
                }
                served, clients, engine = CpuTime(server_cpu(url)), CpuTime(), CpuTime()
                over = partial(over_http, url, prompts, asked)
                row, _ = in_turn(
                    served.of(clients.of(over)), engine.of(partial(alone.at_once, prompts, variant)), repeats
                )
                row["cpu_us_per_token"] = {
                    "server": served.us_per_token,
                    "clients": clients.us_per_token,
                    "engine_alone": engine.us_per_token,
                }
                name = f"{CLIENTS} clients, {label}, {'streamed' if streamed else 'whole answers'}"
                results[name] = row
                shown = f"{row['ratio']:.2f} ({row['ratio_min']:.2f} to {row['ratio_max']:.2f})"
                console.print(f"{name}: {shown}")
        path = out or RESULTS / "packaged-server.json"
        write_result(path, alone.model, sizes, start={"seconds_to_ready": seconds}, results=results)
    console.print(f"written to {path}")


@contextmanager
def ready(bundle: Path) -> Iterator[tuple[str, float]]:
    """The server's URL, and the seconds from its command to `/ready`; the bundle's files were read before."""
    began = time.perf_counter()
    with running_server(str(bundle), "--weights", "both") as url:
        yield url, time.perf_counter() - began


class CpuTime:
    """CPU that runs take of one process, all of its threads together. The first run, a warm-up, is not counted.

    Args:
        clock: seconds of CPU so far; without one those of this process.
    """

    def __init__(self, clock: Callable[[], float] = time.process_time) -> None:
        self._clock, self._seconds, self._tokens, self._warm = clock, 0.0, 0, False

    def of(self, run: Callable[[], Run]) -> Callable[[], Run]:
        """The run, its CPU counted."""

        def counted() -> Run:
            before = self._clock()
            done = run()
            if self._warm:
                self._seconds += self._clock() - before
                self._tokens += done.tokens
            self._warm = True
            return done

        return counted

    @property
    def us_per_token(self) -> float:
        return 1e6 * self._seconds / self._tokens


def server_cpu(url: str) -> Callable[[], float]:
    """Reads the seconds of CPU that the server at `url` has taken, from its metrics."""

    def clock() -> float:
        found = _CPU_SECONDS.search(httpx.get(f"{url}/metrics").text)
        if found is None:
            raise RuntimeError(f"{url}/metrics has no process_cpu_seconds_total")
        return float(found[1])

    return clock


def over_http(url: str, prompts: Prompts, asked: Mapping[str, Any]) -> Run:
    """Send all prompts together, each on a connection of its own, and wait for the last answer's end.

    Raises RuntimeError where one is not answered in full.
    """
    began = time.perf_counter()
    tokens = asyncio.run(_all_answers(url, prompts, asked))
    return Run(tokens, time.perf_counter() - began)


async def _all_answers(url: str, prompts: Prompts, asked: Mapping[str, Any]) -> int:
    return sum(await asyncio.gather(*(_tokens_of(url, {"prompt_token_ids": p, **asked}) for p in prompts)))


async def _tokens_of(url: str, body: Mapping[str, Any]) -> int:
    """The number of tokens of one answer, by its own account."""
    place, sent = urlsplit(url), json.dumps(body).encode()
    reader, writer = await asyncio.open_connection(place.hostname, place.port)
    head = (
        f"POST /generate HTTP/1.1\r\nHost: {place.netloc}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(sent)}\r\nConnection: close\r\n\r\n"
    )
    writer.write(head.encode() + sent)
    try:
        answer = await reader.read()
    finally:
        writer.close()
    found = _COMPLETION_TOKENS.search(answer)
    if not answer.startswith(b"HTTP/1.1 200") or found is None:
        raise RuntimeError(f"the server answered: {answer[:300]!r}")
    return int(found[1])


if __name__ == "__main__":
    typer.run(main)
