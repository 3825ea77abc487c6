"""The benchmark's load on a running server: streams over HTTP, as a client sees them."""

import json
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from exeunt.compression.variant import Variant
from exeunt.deploy.bench_load import BenchError, Load, Trace
from exeunt.deploy.bench_text import cut_prompts
from exeunt.deploy.measured_model import MeasuredModel, served_model
from exeunt.server.api.offer import Certificate, Offer


class HTTPDriver:
    """Runs the load on the server at `url`; EXEUNT_API_KEY is sent where it is set. `close` ends the connections."""

    def __init__(self, url: str, *, concurrency: int) -> None:
        key = os.environ.get("EXEUNT_API_KEY")
        self._client = httpx.Client(
            base_url=url,
            timeout=httpx.Timeout(600, connect=10),
            headers={"Authorization": f"Bearer {key}"} if key else {},
            limits=httpx.Limits(max_connections=concurrency + 1),
        )

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def model(self) -> MeasuredModel:
        """Which model the server says it runs. Raises BenchError."""
        return served_model(self._json("GET", "/info"))

    def offer(self) -> Offer:
        """What the server's model offers, by its /info. Raises BenchError."""
        info = self._json("GET", "/info")
        variants = tuple(_variant(fields) for fields in info["modes"]["variants"])
        certificates: dict[Any, tuple[Certificate, ...]] = {}
        for line in info["risk_table"]:
            key = (_variant(line), line["skipped_kv"])
            certificate = Certificate(line["target"], line["threshold"] if line["certified"] else None)
            certificates[key] = (*certificates.get(key, ()), certificate)
        return Offer(
            variants,
            _variant(info["defaults"]),
            tuple(info["exits"]),
            tuple(info["modes"]["early_exit"]),
            certificates,
        )

    def prompts(self, count: int, tokens: int) -> list[list[int]]:
        """Passages of the packaged text, cut by the server's tokenizer."""
        return cut_prompts(self._tokenize, count, tokens)

    def _tokenize(self, text: str) -> list[int]:
        ids: list[int] = self._json("POST", "/tokenize", {"prompt": text})["tokens"]
        return ids

    def run(
        self, prompts: Sequence[Sequence[int]], compression: Mapping[str, Any], load: Load
    ) -> list[Trace]:
        """Answer every prompt, `load.concurrency` at a time. Raises BenchError where one fails."""
        with ThreadPoolExecutor(load.concurrency) as clients:
            bodies = [
                {
                    "prompt_token_ids": list(prompt),
                    "max_new_tokens": load.max_new_tokens,
                    "temperature": load.temperature,
                    "seed": seed,
                    "ignore_eos": True,
                    "stream": True,
                    "compression": compression,
                }
                for seed, prompt in enumerate(prompts)
            ]
            return list(clients.map(self._answer, bodies))

    def _answer(self, body: Mapping[str, Any]) -> Trace:
        trace = Trace(sent=time.perf_counter())
        try:
            with self._client.stream("POST", "/generate", json=body) as response:
                if response.status_code != 200:
                    response.read()
                    raise _refused(response)
                for line in response.iter_lines():
                    if line.startswith("data: {"):
                        _note(trace, json.loads(line.removeprefix("data: ")))
        except httpx.HTTPError as error:
            raise BenchError(f"{self._client.base_url} does not answer: {error}.") from error
        return trace

    def _json(self, method: str, path: str, body: object = None) -> dict[str, Any]:
        try:
            response = self._client.request(method, path, json=body)
        except httpx.HTTPError as error:
            raise BenchError(f"{self._client.base_url} does not answer: {error}.") from error
        if response.status_code != 200:
            raise _refused(response)
        answer: dict[str, Any] = response.json()
        return answer


def _note(trace: Trace, event: Mapping[str, Any]) -> None:
    if "error" in event:
        raise BenchError(f"A request failed: {event['error']['message']}")
    if "depth" in event:
        depth = event["depth"]
        trace.by_exit, trace.blocks = depth["by_exit"], depth["blocks"]
        trace.block_passes = depth["block_passes"]
        trace.drafts, trace.drafts_accepted = depth["drafts"], depth["drafts_accepted"]
        return
    trace.arrivals.extend([time.perf_counter()] * len(event["tokens"]))
    trace.depths += sum(token["depth"] for token in event["tokens"])


def _variant(fields: Mapping[str, Any]) -> Variant:
    return Variant(fields["weights"], fields["kv_cache"], fields["linear_block"])


def _refused(response: httpx.Response) -> BenchError:
    try:
        message = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = f"status {response.status_code}, which is no answer of Exeunt's"
    return BenchError(f"{response.request.url} answered: {message}")
