"""Measures what HTTP takes: the server's tokens/s with 32 clients beside its engine's alone, in turn.

Whole answers and streamed ones, exits off, greedy. The server is `exeunt serve` on the same bundle, a process of its
own. The clients are coroutines of this process that read and do not parse: on few cores they take time that the server
would have, and that counts against it.
"""

import asyncio
import json
import re
import time
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from typing import Any
from urllib.parse import urlsplit

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
_COMPLETION_TOKENS = re.compile(rb'"completion_tokens": ?(\d+)')

console = Console()


def main(out: Out = None, prompt_tokens: Count = 64, new_tokens: Count = 128, repeats: Count = 5) -> None:
    """Measure, print, write JSON."""
    sizes = Sizes(prompt_tokens, new_tokens, repeats, CLIENTS // MANY)
    results: dict[str, Any] = {}
    with packaged_runs(sizes) as alone, running_server(str(alone.bundle), "--weights", "both") as url:
        prompts = alone.prompts(CLIENTS)
        for label, variant in VARIANTS.items():
            for streamed in (False, True):
                asked = {
                    "max_new_tokens": new_tokens,
                    "ignore_eos": True,
                    "stream": streamed,
                    "compression": {**asdict(variant), "early_exit": False},
                }
                row, _ = in_turn(
                    partial(over_http, url, prompts, asked), partial(alone.at_once, prompts, variant), repeats
                )
                name = f"{CLIENTS} clients, {label}, {'streamed' if streamed else 'whole answers'}"
                results[name] = row
                shown = f"{row['ratio']:.2f} ({row['ratio_min']:.2f} to {row['ratio_max']:.2f})"
                console.print(f"{name}: {shown}")
        path = out or RESULTS / "packaged-server.json"
        write_result(path, alone.model, sizes, results=results)
    console.print(f"written to {path}")


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
