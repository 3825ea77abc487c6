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

APPROXIMATE = {"early_exit": {"mode": "approximate", "threshold": 0.3, "skipped_kv": "propagate"}}
BACKFILL = {"early_exit": {"mode": "approximate", "threshold": 0.3, "skipped_kv": "backfill"}}
VERIFIED = {"early_exit": {"mode": "verified"}}
OFF = {"early_exit": {"mode": "off"}}
SURE = (
    "blocks",
    "blocks_executed",
    "blocks_skipped",
)  # when to draft, and what to audit, may differ each time


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
    assert server.generate(**asked, compression=OFF)["depth"]["by_exit"] == {"final": 24}
    for skipped_kv in ("propagate", "backfill"):
        loose = {"early_exit": {"mode": "approximate", "threshold": 0.0, "skipped_kv": skipped_kv}}
        by_exit = server.generate(**asked, compression=loose)["depth"]["by_exit"]
        assert by_exit == {
            "final": 1,
            "block_1": 23,
        }  # the prompt, and with it the first token, goes all the way


def test_verified_answers_are_those_of_exits_off_and_add_up(server: ServerProcess) -> None:
    """Prompts that repeat themselves, so that what is looked up is right at times and wrong at others."""
    drafts = accepted = 0
    for number in range(6):
        sampling = {"temperature": 0.4, "seed": number} if number % 2 else {}
        asked = {
            "prompt": "ab abc ab abd " * (3 + number),
            "max_new_tokens": 60,
            "ignore_eos": True,
            **sampling,
        }
        off = server.generate(**asked, compression=OFF)
        verified = server.generate(**asked)
        assert verified["compression"]["early_exit"] == {"mode": "verified"}
        assert verified["text"] == off["text"]
        pairs = zip(verified["tokens"], off["tokens"], strict=True)
        assert all(a["id"] == b["id"] and a["logprob"] == pytest.approx(b["logprob"]) for a, b in pairs)
        tokens, depth = verified["tokens"], verified["depth"]
        assert depth["blocks_executed"] == 60 * BLOCKS
        assert depth["blocks_skipped"] == 0
        assert {(t["exit"], t["depth"]) for t in tokens} <= {("final", BLOCKS), ("block_1", 2), ("lookup", 0)}
        assert depth["mean"] == sum(token["depth"] for token in tokens) / 60
        assert depth["by_exit"] == {name: sum(t["exit"] == name for t in tokens) for name in depth["by_exit"]}
        assert depth["drafts_accepted"] == 60 - depth["by_exit"]["final"]
        assert depth["exit_rate"] == depth["drafts_accepted"] / 60
        if depth["drafts"] == depth["drafts_accepted"] and depth["by_exit"].keys() <= {"final", "lookup"}:
            assert depth["blocks_wasted"] == 0
        drafts, accepted = drafts + depth["drafts"], accepted + depth["drafts_accepted"]
    assert 0 < accepted < drafts


def test_backfill_computes_what_propagation_skips(server: ServerProcess) -> None:
    answers = {
        skipped_kv: server.generate(
            prompt="It was a dark night",
            max_new_tokens=40,
            ignore_eos=True,
            compression={"early_exit": {"mode": "approximate", "threshold": 0.3, "skipped_kv": skipped_kv}},
        )
        for skipped_kv in ("backfill", "propagate")
    }
    for skipped_kv, answer in answers.items():
        depth = answer["depth"]
        assert answer["compression"]["early_exit"]["skipped_kv"] == skipped_kv
        assert depth["exit_rate"] > 0.1
        assert depth["blocks_executed"] + depth["blocks_skipped"] == 40 * BLOCKS
        assert depth["block_passes"] < 40 * BLOCKS
        assert depth["drafts"] == 0
    owed = 8 * (BLOCKS - 2)  # what the answer's last tokens may still have owed when it ended
    assert answers["backfill"]["depth"]["blocks_skipped"] <= owed
    assert (
        answers["propagate"]["depth"]["blocks_skipped"]
        == 2 * answers["propagate"]["depth"]["by_exit"]["block_1"]
    )


def test_a_certified_target_names_its_threshold(server: ServerProcess) -> None:
    exits = {"early_exit": {"mode": "approximate", "max_disagreement": 0.1}}
    answer = server.generate(prompt="abc", max_new_tokens=2, compression=exits)
    assert answer["compression"]["early_exit"] == {
        "mode": "approximate",
        "max_disagreement": 0.1,
        "threshold": 0.79,
        "skipped_kv": "backfill",
    }
    exits["early_exit"]["max_disagreement"] = 0.05  # not certified for backfill
    answer = server.generate(prompt="abc", max_new_tokens=2, compression=exits)
    assert answer["compression"]["early_exit"]["threshold"] == 0.93
    assert answer["compression"]["early_exit"]["skipped_kv"] == "propagate"


def test_a_certified_increase_of_the_nll_names_its_threshold(server: ServerProcess) -> None:
    exits = {"early_exit": {"mode": "approximate", "max_nll_increase": 0.05}}
    answer = server.generate(prompt="abc", max_new_tokens=2, compression=exits)
    assert answer["compression"]["early_exit"] == {
        "mode": "approximate",
        "max_nll_increase": 0.05,
        "threshold": 0.71,
        "skipped_kv": "backfill",
    }
    exits["early_exit"]["max_nll_increase"] = 0.02
    refused = server.client.post("/generate", json={"prompt": "abc", "compression": exits})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "compression.early_exit.max_nll_increase"
    assert "certified are 0.05 with skipped_kv=backfill. Why: only 12 tokens left." in refused.text
    lines = server.client.get("/info").json()["nll_risk_table"]
    assert [(x["skipped_kv"], x["target"], x["threshold"]) for x in lines] == [
        ("backfill", 0.02, None),
        ("backfill", 0.05, 0.71),
        ("propagate", 0.02, None),
        ("propagate", 0.05, None),
    ]
    assert (lines[1]["increase"], lines[1]["upper_bound"], lines[1]["clip"]) == (0.03, 0.04, 3.0)


def test_every_variant_answers_and_says_so(server: ServerProcess) -> None:
    for weights in ("int4", "full"):
        for kv_cache in ("int4", "full"):
            for linear_block in (True, False):
                asked = {"weights": weights, "kv_cache": kv_cache, "linear_block": linear_block}
                answer = server.generate(prompt="abc", max_new_tokens=3, compression=asked)
                assert answer["compression"] == {**asked, "early_exit": {"mode": "verified"}}


@pytest.mark.parametrize("compression", [APPROXIMATE, BACKFILL, VERIFIED])
def test_streams_say_what_whole_answers_say(server: ServerProcess, compression: dict[str, Any]) -> None:
    asked: dict[str, Any] = {
        "prompt": "Über den Fluß",
        "max_new_tokens": 40,
        "temperature": 1.0,
        "seed": 5,
        "n": 2,
        "ignore_eos": True,
        "compression": compression,
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
        shown = ("id", "text", "logprob") if compression is VERIFIED else choice["tokens"][0]
        for told, same in zip(tokens[index], choice["tokens"], strict=True):
            assert [told[field] for field in shown] == [same[field] for field in shown]
        for field in SURE if compression is VERIFIED else (*SURE, "mean", "exit_rate", "by_exit"):
            assert summary["choices"][index]["depth"][field] == choice["depth"][field], field
    assert text[0] != text[1]


def test_a_seeded_answer_does_not_depend_on_the_crowd(server: ServerProcess) -> None:
    bodies = [
        {"prompt": f"Prompt {i}" * (i + 1), "max_new_tokens": 12, "temperature": 0.8, "seed": i, "ignore_eos": True,
         "compression": {"weights": ("int4", "full")[i % 2], **(APPROXIMATE, BACKFILL, VERIFIED)[i % 3]}}
        for i in range(12)
    ]  # fmt: skip
    alone = [server.generate(**body)["text"] for body in bodies]
    with ThreadPoolExecutor(12) as pool:
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


@pytest.mark.parametrize("compression", [APPROXIMATE, BACKFILL, VERIFIED])
def test_what_answers_say_and_what_metrics_count_is_the_same(
    server: ServerProcess, compression: dict[str, Any]
) -> None:
    mode = compression["early_exit"]["mode"]
    before = server.metrics()
    answers = [
        server.generate(prompt="x" * n, max_new_tokens=10 + n, ignore_eos=True, compression=compression)
        for n in (1, 5)
    ]
    after = server.metrics()

    def grown(name: str) -> float:
        return after[name] - before[name]

    def total(field: str) -> float:
        return float(sum(answer["depth"][field] for answer in answers))

    tokens = sum(answer["usage"]["completion_tokens"] for answer in answers)
    assert grown(f"generation_tokens_total{{mode={mode}}}") == tokens
    assert grown("prompt_tokens_total") == 6
    counters = (
        "blocks_executed",
        "blocks_skipped",
        "blocks_wasted",
        "block_passes",
        "drafts",
        "drafts_accepted",
    )
    for name in counters:
        assert grown(f"{name}_total") == total(name), name
    for name in ("block_1", "final", "lookup"):
        counted = sum(answer["depth"]["by_exit"].get(name, 0) for answer in answers)
        assert grown(f"exit_tokens_total{{exit={name},mode={mode}}}") == counted
    nll = -sum(token["logprob"] for answer in answers for token in answer["tokens"])
    assert grown(f"token_nll_total{{mode={mode}}}") == pytest.approx(nll)
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
    assert info["modes"]["early_exit"] == ["off", "verified", "approximate"]
    assert info["modes"]["skipped_kv"] == ["backfill", "propagate"]
    assert info["defaults"]["early_exit"] == {"mode": "verified"}
    assert info["exits"] == ["block_1"]
    assert info["limits"]["max_model_len"] == CONTEXT
    lines = [line for line in info["risk_table"] if not line["linear_block"]]
    found = {
        skipped_kv: [
            (x["target"], x["certified"], x["threshold"]) for x in lines if x["skipped_kv"] == skipped_kv
        ]
        for skipped_kv in ("backfill", "propagate")
    }
    assert found == {
        "backfill": [(0.01, False, None), (0.05, False, None), (0.1, True, 0.79)],
        "propagate": [(0.01, False, None), (0.05, True, 0.93), (0.1, True, 0.81)],
    }
    assert server.metrics()["exit_threshold{target=0.1}"] == 0.79


def test_the_requests_that_the_pages_show_are_answered_as_shown(server: ServerProcess) -> None:
    """By any bundle that has what they ask for; scripts/check sends them to the packaged model."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    assert sum(len(requests(page.read_text())) for page in pages) > 0
    problems = check(pages, with_server=True, url=str(server.client.base_url))
    assert [str(problem) for problem in problems] == []


def test_the_examples_of_the_documentation_are_answered(server: ServerProcess) -> None:
    paths = server.client.get("/openapi.json").json()["paths"]
    bodies = {path: each["post"]["requestBody"] for path, each in paths.items() if "post" in each}
    shown = {path: body["content"]["application/json"]["example"] for path, body in bodies.items()}
    assert shown["/generate"]["compression"] == {
        "early_exit": {"mode": "approximate", "max_disagreement": 0.1}
    }
    for path, example in shown.items():
        assert server.client.post(path, json=example).status_code == 200, path


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
