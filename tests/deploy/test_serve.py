"""The server as users meet it: a real process, a real bundle with random weights, real HTTP."""

import json
import math
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from scripts.check_readme.check import check
from scripts.check_readme.pages import ROOT
from scripts.check_readme.requests import requests
from tests.deploy.conftest import free_port
from tests.deploy.dockerfile import health_check
from tests.deploy.server_process import (
    BLOCKS,
    CONTEXT,
    ServerProcess,
    byte_bundle,
    environment,
    eventually,
    serving,
)

APPROXIMATE = {"early_exit": {"mode": "approximate", "threshold": 0.3}}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_bundle(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def server(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    log = tmp_path_factory.mktemp("log") / "serve.log"
    with serving(str(bundle), "--served-model-name", "bytes", log=log) as running:
        yield running
        assert running.stop() == 0
    assert "Traceback" not in log.read_text()


def test_an_answer_adds_up(server: ServerProcess) -> None:
    answer = server.generate(
        prompt="It was a dark night", max_new_tokens=16, ignore_eos=True, compression=APPROXIMATE
    )
    tokens, depth = answer["tokens"], answer["depth"]
    assert answer["usage"] == {"prompt_tokens": 19, "completion_tokens": 16, "total_tokens": 35}
    assert len(tokens) == 16
    assert depth["blocks"] == BLOCKS
    assert depth["blocks_executed"] == sum(token["depth"] for token in tokens)
    assert depth["blocks_executed"] + depth["blocks_skipped"] == 16 * BLOCKS
    assert depth["mean"] == depth["blocks_executed"] / 16
    assert depth["by_exit"] == {name: sum(t["exit"] == name for t in tokens) for name in depth["by_exit"]}
    assert answer["perplexity"] == pytest.approx(math.exp(-sum(t["logprob"] for t in tokens) / 16))
    assert answer["compression"] == {
        "weights": "int4",
        "kv_cache": "int4",
        "linear_block": False,
        "early_exit": {"mode": "approximate", "threshold": 0.3, "skipped_kv": "propagate"},
    }


def test_tokens_leave_early_only_where_asked(server: ServerProcess) -> None:
    asked = {"prompt": "abc", "max_new_tokens": 24, "ignore_eos": True}
    assert server.generate(**asked)["depth"]["by_exit"] == {"final": 24}
    loose = {"early_exit": {"mode": "approximate", "threshold": 0.0}}
    by_exit = server.generate(**asked, compression=loose)["depth"]["by_exit"]
    assert by_exit == {"final": 1, "block_1": 23}  # the prompt, and with it the first token, goes all the way


def test_a_certified_target_names_its_threshold(server: ServerProcess) -> None:
    exits = {"early_exit": {"mode": "approximate", "max_disagreement": 0.1}}
    answer = server.generate(prompt="abc", max_new_tokens=2, compression=exits)
    assert answer["compression"]["early_exit"] == {
        "mode": "approximate",
        "max_disagreement": 0.1,
        "threshold": 0.81,
        "skipped_kv": "propagate",
    }


def test_every_variant_answers_and_says_so(server: ServerProcess) -> None:
    for weights in ("int4", "full"):
        for kv_cache in ("int4", "full"):
            for linear_block in (True, False):
                asked = {"weights": weights, "kv_cache": kv_cache, "linear_block": linear_block}
                answer = server.generate(prompt="abc", max_new_tokens=3, compression=asked)
                assert answer["compression"] == {**asked, "early_exit": {"mode": "off"}}


def test_streams_say_what_whole_answers_say(server: ServerProcess) -> None:
    asked: dict[str, Any] = {
        "prompt": "Über den Fluß",
        "max_new_tokens": 40,
        "temperature": 1.0,
        "seed": 5,
        "n": 2,
        "ignore_eos": True,
        "compression": APPROXIMATE,
    }
    whole = server.generate(**asked)
    text = ["", ""]
    tokens: list[list[Any]] = [[], []]
    with server.client.stream("POST", "/generate", json={**asked, "stream": True}) as response:
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    *steps, summary = [json.loads(line) for line in lines[:-1]]
    assert lines[-1] == "[DONE]"
    for step in steps:
        text[step["index"]] += step["text"]
        tokens[step["index"]] += step["tokens"]
    for index, choice in enumerate(whole["choices"]):
        assert text[index] == choice["text"]
        assert tokens[index] == choice["tokens"]
        assert summary["choices"][index]["depth"] == choice["depth"]
    assert text[0] != text[1]


def test_a_seeded_answer_does_not_depend_on_the_crowd(server: ServerProcess) -> None:
    bodies = [
        {"prompt": f"Prompt {i}" * (i + 1), "max_new_tokens": 12, "temperature": 0.8, "seed": i, "ignore_eos": True,
         "compression": {"weights": ("int4", "full")[i % 2], **(APPROXIMATE if i % 3 else {})}}
        for i in range(8)
    ]  # fmt: skip
    alone = [server.generate(**body)["text"] for body in bodies]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda body: server.generate(**body)["text"], bodies))
    assert together == alone


def test_scores_are_those_of_generation(server: ServerProcess) -> None:
    answer = server.generate(prompt="abc", max_new_tokens=6, ignore_eos=True)
    prompt = server.client.post("/tokenize", json={"prompt": "abc"}).json()["tokens"]
    ids = [*prompt, *(token["id"] for token in answer["tokens"])]
    scored = server.client.post("/score", json={"token_ids": ids}).json()
    for token, score in zip(answer["tokens"], scored["tokens"][3:], strict=True):
        assert score["id"] == token["id"]
        assert score["logprob"] == pytest.approx(token["logprob"], abs=1e-3)
    assert scored["tokens"][0]["logprob"] is None


def test_what_answers_say_and_what_metrics_count_is_the_same(server: ServerProcess) -> None:
    before = server.metrics()
    answers = [
        server.generate(prompt="x" * n, max_new_tokens=10 + n, ignore_eos=True, compression=APPROXIMATE)
        for n in (1, 5)
    ]
    after = server.metrics()

    def grown(name: str) -> float:
        return after[name] - before[name]

    def total(field: str) -> float:
        return float(sum(answer["depth"][field] for answer in answers))

    tokens = sum(answer["usage"]["completion_tokens"] for answer in answers)
    assert grown("generation_tokens_total{mode=approximate}") == tokens
    assert grown("prompt_tokens_total") == 6
    for name in ("blocks_executed", "blocks_skipped", "blocks_wasted", "block_passes"):
        assert grown(f"{name}_total") == total(name), name
    for name in ("block_1", "final"):
        counted = sum(answer["depth"]["by_exit"].get(name, 0) for answer in answers)
        assert grown(f"exit_tokens_total{{exit={name},mode=approximate}}") == counted
    nll = -sum(token["logprob"] for answer in answers for token in answer["tokens"])
    assert grown("token_nll_total{mode=approximate}") == pytest.approx(nll)
    assert grown("token_depth_ratio_count") == tokens
    assert grown("request_success_total{finish_reason=length}") == 2
    assert grown("compression_requests_total{enabled=true,method=early_exit}") == 2
    assert grown("time_to_first_token_seconds_count") == 2
    assert grown("inter_token_latency_seconds_count") == tokens - 2


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_what_its_request_held(server: ServerProcess, stream: bool) -> None:
    before = server.metrics()
    body = {"prompt": "x", "max_new_tokens": CONTEXT - 10, "ignore_eos": True, "stream": stream}
    leaving = httpx.Client(base_url=server.client.base_url, timeout=10)
    if stream:
        with leaving, leaving.stream("POST", "/generate", json=body) as response:
            next(response.iter_lines())
    else:
        leaving.timeout = httpx.Timeout(10, read=0.3)
        with leaving, pytest.raises(httpx.ReadTimeout):
            leaving.post("/generate", json=body)

    def freed() -> bool:
        now = server.metrics()
        cancelled = "request_success_total{finish_reason=cancelled}"
        return (
            now["client_disconnects_total"] == before["client_disconnects_total"] + 1
            and now[cancelled] == before[cancelled] + 1
            and now["num_requests_running"] == 0
            and now["kv_cache_usage_ratio{format=int4}"] == 0
        )

    eventually(freed, "freeing the cancelled request")


def test_bad_requests_harm_no_other(server: ServerProcess) -> None:
    good = {"prompt": "abc", "max_new_tokens": 200, "ignore_eos": True}
    alone = server.generate(**good)["text"]
    answer: list[str] = []
    thread = threading.Thread(target=lambda: answer.append(server.generate(**good)["text"]))
    thread.start()
    bad: list[Any] = [{}, {"prompt": ""}, {"prompt": "x", "n": 99}, {"prompt_token_ids": [10**6]}, []]
    for body in bad:
        assert server.client.post("/generate", json=body).status_code == 400
    assert server.client.post("/generate", content=b"{" * 5000).status_code == 400
    thread.join()
    assert answer == [alone]


def test_text_that_is_no_token_alone_arrives_whole(server: ServerProcess) -> None:
    body = server.client.post("/tokenize", json={"prompt": "naïve 😀"}).json()
    assert body["count"] == len("naïve 😀".encode())
    assert server.client.post("/detokenize", json={"tokens": body["tokens"]}).json() == {"prompt": "naïve 😀"}


def test_info_says_what_the_bundle_holds(server: ServerProcess) -> None:
    info = server.client.get("/info").json()
    assert info["model"]["name"] == "bytes"
    assert info["bundle"]["base_model"]["name"] == "small"
    assert info["bundle"]["linear_block"]["index"] == 2
    assert info["bundle"]["weights"] == ["int4", "full"]
    assert info["modes"]["weights"] == ["full", "int4"]
    assert info["modes"]["linear_block"] == [False, True]
    assert info["modes"]["early_exit"] == ["off", "approximate"]
    assert info["exits"] == ["block_1"]
    assert info["limits"]["max_model_len"] == CONTEXT
    lines = [line for line in info["risk_table"] if not line["linear_block"]]
    assert [(line["target"], line["certified"], line["threshold"]) for line in lines] == [
        (0.01, False, None),
        (0.05, True, 0.93),
        (0.1, True, 0.81),
    ]
    assert server.metrics()["exit_threshold{target=0.1}"] == 0.81


def test_the_requests_that_the_pages_show_are_answered_as_shown(server: ServerProcess) -> None:
    """By any bundle that has what they ask for; scripts/check sends them to the packaged model."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    assert sum(len(requests(page.read_text())) for page in pages) > 0
    problems = check(pages, with_server=True, url=str(server.client.base_url))
    assert [str(problem) for problem in problems] == []


def test_the_images_health_check_tells_a_server_from_none(server: ServerProcess) -> None:
    """The Dockerfile's own command, run as the container would, but for the interpreter's name."""
    port = server.client.base_url.port

    def status(port: object) -> int:
        command = [sys.executable, *health_check()[1:]]
        result = subprocess.run(
            command, env=environment(EXEUNT_PORT=str(port)), capture_output=True, check=False, timeout=30
        )
        return result.returncode

    assert status(port) == 0
    assert status(free_port()) != 0
