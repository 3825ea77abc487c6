"""How the server starts, refuses to start, drains and ends: real processes, real signals."""

import json
import select
import shutil
import signal
import socket
import threading
from contextlib import ExitStack, suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from exeunt.compression.model import load_bundle
from exeunt.deploy.cli import run
from exeunt.deploy.loading import SettingsError
from exeunt.deploy.serve import start_service
from exeunt.server.settings import given_settings
from tests.deploy.server_process import byte_bundle, eventually, run_to_end, serving

LONG = {"prompt": "x", "max_new_tokens": 1500, "ignore_eos": True, "details": False}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_bundle(tmp_path_factory.mktemp("served"))


def test_sigterm_drains(bundle: Path, tmp_path: Path) -> None:
    with serving(str(bundle), "--shutdown-timeout", "60", log=tmp_path / "log") as server:
        answers: list[httpx.Response] = []
        thread = threading.Thread(target=lambda: answers.append(server.client.post("/generate", json=LONG)))
        thread.start()
        eventually(lambda: server.metrics()["num_requests_running"] == 1, "running")
        server.process.send_signal(signal.SIGTERM)
        eventually(lambda: server.client.get("/ready").status_code == 503, "draining")
        refused = server.client.post("/generate", json={"prompt": "y"})
        assert refused.status_code == 503
        assert "shutting down" in refused.json()["error"]["message"]
        assert server.client.get("/health").status_code == 200
        assert server.metrics()["ready"] == 0
        thread.join(60)
        assert answers[0].status_code == 200
        assert answers[0].json()["usage"]["completion_tokens"] == 1500
        assert server.process.wait(timeout=30) == 0
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_sigterm_ends_what_has_not_come(bundle: Path, tmp_path: Path) -> None:
    """Half a body, half a head and another protocol are no trouble worth a traceback, or a wait."""
    head = b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
    with serving(str(bundle), log=tmp_path / "log") as server, ExitStack() as opened:
        server.client.get("/health", headers={"Connection": "Upgrade", "Upgrade": "websocket"})
        place = server.client.base_url
        bodies, heads = (
            [
                opened.enter_context(socket.create_connection((place.host, place.port or 80), timeout=30))
                for _ in range(5)
            ]
            for _ in range(2)
        )
        for body, half in zip(bodies, heads, strict=True):
            half.sendall(b"GET /hea")
            body.sendall(head)
        assert server.client.get("/ready").status_code == 200  # what came before it has been seen
        server.process.send_signal(signal.SIGTERM)
        for body in bodies:
            assert b'"code":"draining"' in b"".join(iter(lambda body=body: body.recv(65536), b""))  # type: ignore[misc]
        assert server.process.wait(timeout=30) == 0
    log = (tmp_path / "log").read_text()
    assert "503" in log
    assert "Traceback" not in log
    assert "ERROR" not in log
    assert "WARNING" not in log


def test_a_request_head_without_end_is_refused(bundle: Path, tmp_path: Path) -> None:
    """Before a key is asked for: else anybody could fill the memory."""
    with serving(str(bundle), "--api-key", "secret", log=tmp_path / "log") as server:
        place = server.client.base_url
        with socket.create_connection((place.host, place.port or 80), timeout=30) as connection:
            connection.sendall(b"GET /info HTTP/1.1\r\nHost: here\r\nX-Long: ")
            sent = 0
            with suppress(BrokenPipeError, ConnectionResetError):
                while sent < 1 << 23 and not select.select([connection], [], [], 0)[0]:
                    connection.sendall(b"a" * 4096)
                    sent += 4096
            assert sent < 1 << 23
            with suppress(ConnectionResetError):
                assert connection.recv(4096).startswith(b"HTTP/1.1 400")
        assert server.client.get("/health").status_code == 200


def test_what_does_not_finish_in_time_is_told_so(bundle: Path, tmp_path: Path) -> None:
    with serving(str(bundle), "--shutdown-timeout", "0.1", log=tmp_path / "log") as server:
        with server.client.stream(
            "POST", "/generate", json={**LONG, "max_new_tokens": 4000, "stream": True}
        ) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            events = [line.removeprefix("data: ") for line in lines if line]
        assert events[-1] == "[DONE]"
        error = json.loads(events[-2])["error"]
        assert (error["type"], error["code"]) == ("unavailable_error", "shutdown")
        assert "stopped before this answer was complete" in error["message"]
        assert server.process.wait(timeout=30) == 0


def test_the_second_signal_stops_at_once(bundle: Path, tmp_path: Path) -> None:
    def cut_off(body: dict[str, Any]) -> None:
        with server.client.stream("POST", "/generate", json=body) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGINT)
            eventually(
                lambda: httpx.get(server.client.base_url.join("/ready")).status_code == 503, "draining"
            )
            server.process.send_signal(signal.SIGTERM)
            for _ in lines:
                pass

    with serving(str(bundle), "--shutdown-timeout", "60", log=tmp_path / "log") as server:
        with pytest.raises(httpx.TransportError):
            cut_off({**LONG, "max_new_tokens": 4000, "stream": True})
        assert server.process.wait(timeout=10) == 128 + signal.SIGTERM


def test_stopped_while_loading_it_just_stops(bundle: Path, tmp_path: Path) -> None:
    with serving(str(bundle), log=tmp_path / "log", ready=False) as server:
        assert server.stop() == 0
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_settings_come_from_the_environment_too(bundle: Path, tmp_path: Path) -> None:
    default = {
        "weights": "full",
        "kv_cache": "full",
        "early_exit": {"mode": "approximate", "threshold": 0.25},
    }
    env = {
        "EXEUNT_MODEL": str(bundle),
        "EXEUNT_API_KEY": "key",
        "EXEUNT_DEFAULT_COMPRESSION": json.dumps(default),
        "EXEUNT_MAX_MODEL_LEN": "32",
        "EXEUNT_REQUEST_TIMEOUT": "0.0001",
        "EXEUNT_LOG_JSON": "true",
    }
    with serving("--max-num-seqs", "4", log=tmp_path / "log", env=env) as server:
        assert server.client.get("/info").status_code == 401
        server.client.headers["Authorization"] = "Bearer key"
        info = server.client.get("/info").json()
        assert info["limits"]["max_model_len"] == 32
        assert info["limits"]["max_num_seqs"] == 4
        assert info["limits"]["request_timeout_s"] == 0.0001
        assert info["defaults"]["weights"] == "full"
        assert info["defaults"]["early_exit"]["threshold"] == 0.25
        late = server.client.post("/generate", json={"prompt": "x", "max_new_tokens": 30})
        # of the body, where it comes in a packet of its own, or of the first token: neither is there so soon
        assert (late.status_code, late.json()["error"]["code"]) in ((408, "body_timeout"), (504, "timeout"))
        assert server.stop() == 0
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert any("Serving" in line["message"] for line in lines)
    assert all(set(line) >= {"time", "level", "logger", "message"} for line in lines)


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["serve", "/nowhere/at/all"], 2, ["no folder /nowhere/at/all"]),
        (["eval", "./nowhere", "--data", "z"], 2, ["no folder ./nowhere"]),
        (["bench", "./nowhere"], 2, ["no folder ./nowhere"]),
        (["bench", "127.0.0.1:8000"], 2, ["its address begins with http://", "http://127.0.0.1:8000."]),
        (["bench", "[::1]:8000"], 2, ["http://[::1]:8000."]),
        (["calibrate", "./nowhere", "--out", "y", "--data", "z"], 2, ["no folder ./nowhere"]),
        (["serve", "--max-num-seqs", "600"], 2, ["--max-num-batched-tokens is 512", "--max-num-seqs, 600"]),
        (["serve", "--port", "eighty"], 2, ["--port", '"eighty"', "whole number"]),
        (["serve", "--port", "70000"], 2, ["--port", "70000", "65535"]),
        (["serve", "--colour", "red"], 2, ["no option --colour; `exeunt serve --help`"]),
        (["serve", "--max-model", "3"], 2, ["no option --max-model; did you mean --max-model-len? `exeunt"]),
        (["serve", "--port"], 2, ["--port", "requires an argument", "`exeunt serve --help`"]),
        (["serve", "--default-compression", '{"wieghts": "int4"}'], 2, ["--default-compression", "wieghts"]),
        (["serve", "--default-compression", "{"], 2, ["--default-compression"]),
        (["serve", "--kv-cache-memory", "much"], 2, ["--kv-cache-memory", "much"]),
        (["serve", "--device", "abacus"], 2, ["--device", "abacus"]),
        (["serve", "--device", "mps"], 2, ["--device", "mps", "auto, cpu, cuda or cuda:N."]),
        (["calibrate"], 2, ["MODEL"]),
        (
            ["calibrate", "x", "--out", "y", "--data", "z", "--device", "mps"],
            2,
            ["--device is mps", "cuda:N."],
        ),
        (["calibrate", "x", "--out", "y", "--data", "z", "--seed", "-1"], 2, ["--seed is -1", "at least 0"]),
        (
            ["calibrate", "x/x", "--out", "y", "--data", "z", "--risk", "1.0000000001"],
            2,
            ["1.0000000001 must be above 0 and below 1"],
        ),
        (["eval", "x", "--data", "z", "--tokens", "many"], 2, ["--tokens is 'many'", "at least 16"]),
        (["bench", "x", "--device", "abc"], 2, ["--device is abc", "cuda:N."]),
        (["bench", "x", "--concurrency", "0"], 2, ["--concurrency is 0", "at least 1"]),
        (["inspect"], 2, ["BUNDLE"]),
        (["calibrate", "x/x", "--out", "y", "--exits", "one"], 2, ["--exits", "one"]),
        (
            ["calibrate", "x/x", "--out", "y", "--drafting-exit", "one"],
            2,
            ["--drafting-exit is 'one'", "auto, none, or the number"],
        ),
        (["calibrate", "x/x", "--out", "y", "--weights", "int2"], 2, ["--weights", "int2"]),
        (["inspect", "/nowhere"], 2, ["/nowhere", "does not exist"]),
        (
            ["inspect", "/nowhere", "--log-level", "loud"],
            2,
            ["--log-level is 'loud'", "info, warning or error"],
        ),
        (["inspect", "/etc/passwd"], 2, ["/etc/passwd is a file"]),
        (["inspect", "/usr"], 2, ["/usr is neither a bundle"]),
        (["calibrate", "x/x", "--data", "z", "--out", "/usr"], 2, ["/usr exists and is not a bundle"]),
        (["calibrate", "x/x", "--data", "z", "--out", "/etc/passwd/x"], 2, ["--out is /etc/passwd/x"]),
        (["serve", "--longest-wait", "1"], 2, ["--longest-wait is 1 and --scheduling run-through"]),
        (
            ["bench", "http://127.0.0.1:9", "--device", "cpu"],
            2,
            ["--device is cpu", "http://127.0.0.1:9 is a server", "leave --device out"],
        ),
        (["bench", "x/x", "--json", "/nowhere/x.json"], 2, ["--json is /nowhere/x.json", "no such file"]),
        (["bench", "x/x", "--json", "/usr"], 2, ["--json is /usr, which cannot be written", "folder"]),
        (["dance"], 2, ["no command dance; `exeunt --help`"]),
        (["serv"], 2, ["no command serv; did you mean serve? `exeunt --help`"]),
    ],
)
def test_wrong_usage_is_one_line(
    capsys: pytest.CaptureFixture[str], quiet: None, arguments: list[str], status: int, words: list[str]
) -> None:
    assert run(arguments) == status
    told = capsys.readouterr().err
    assert len(told.strip().splitlines()) == 1, told
    for word in words:
        assert word in told, told


def test_no_command_is_a_wish_for_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([]) == 0
    bare = capsys.readouterr()
    assert run(["--help"]) == 0
    assert bare == capsys.readouterr()
    assert "calibrate" in bare.out
    assert bare.err == ""


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr() == (f"exeunt {version('exeunt')}\n", "")


def test_help_says_which_text_is_read(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["eval", "--help"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "whole documents in an order drawn from --seed, of a single document the beginning" in told
    assert run(["calibrate", "--help"]) == 0
    assert "Needed, but for the packaged model" in " ".join(capsys.readouterr().out.split())


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the command line from taking over the logging of the test process."""
    monkeypatch.setattr("exeunt.deploy.logs.configure_logging", lambda level, as_json: None)


def test_debug_adds_the_traceback(
    capsys: pytest.CaptureFixture[str], quiet: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EXEUNT_LOG_LEVEL", "debug")
    for command in (["serve", "/nowhere/at/all"], ["inspect", "/nowhere"]):
        assert run(command) == 2
        assert "Traceback" in capsys.readouterr().err
    monkeypatch.delenv("EXEUNT_LOG_LEVEL")
    for command in (
        ["serve", "--log-level", "debug", "--port", "eighty"],
        ["inspect", "/nowhere", "--log-level=debug"],
        ["calibrate", "./nowhere", "--out", "y", "--log-level", "debug"],
        ["eval", "./nowhere", "--data", "z", "--log-level", "debug"],
        ["bench", "./nowhere", "--log-level", "debug", "--concurrency", "0"],
    ):
        assert run(command) == 2, command
        assert "Traceback" in capsys.readouterr().err, command


def test_words_that_only_look_like_the_option_add_no_traceback(
    capsys: pytest.CaptureFixture[str], quiet: None
) -> None:
    assert run(["inspect", "/nowhere/--log-level debug"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_level_is_every_commands(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    levels: list[str] = []
    monkeypatch.setattr("exeunt.deploy.logs.configure_logging", lambda level, as_json: levels.append(level))
    run(["inspect", "/nowhere", "--log-level", "info"])
    run(["eval", "./nowhere", "--data", "z"])
    monkeypatch.setenv("EXEUNT_LOG_LEVEL", "error")
    run(["bench", "./nowhere"])
    assert levels == ["info", "warning", "error"]


@pytest.mark.parametrize("command", ["serve", "eval", "bench", "calibrate"])
def test_a_bare_name_that_is_no_folder_is_asked_of_the_hub(
    command: str, capsys: pytest.CaptureFixture[str], quiet: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def offline(name: str, **_: object) -> str:
        asked.append(name)
        raise LocalEntryNotFoundError("Outgoing traffic has been disabled.\nMore lines follow.")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    more = {"serve": ["--port", "0"], "eval": ["--data", "z"], "calibrate": ["--out", "y", "--data", "z"]}
    assert run([command, "nowhere", *more.get(command, [])]) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert "There is no folder nowhere, and the Hugging Face Hub gives no model of that id either" in told
    assert "(Outgoing traffic has been disabled); give the folder" in told
    assert asked == ["nowhere"]
    assert run([command, "owner/name", *more.get(command, [])]) == 1, (
        "the name may be right, the network is not"
    )


def test_a_port_in_use_is_one_line(bundle: Path, capsys: pytest.CaptureFixture[str], quiet: None) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert run(["serve", str(bundle), "--port", port]) == 1
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert f"127.0.0.1:{port}" in told
    assert "in use" in told


def test_a_truncated_bundle_is_refused(bundle: Path, tmp_path: Path) -> None:
    spoilt = tmp_path / "spoilt"
    shutil.copytree(bundle, spoilt)
    weights = spoilt / "weights.int4.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    ended = run_to_end("serve", str(spoilt), "--port", "0")
    assert ended.returncode == 1
    assert ended.stderr.count("\n") == 1, ended.stderr
    assert "weights.int4.safetensors" in ended.stderr


def test_a_guard_without_a_certified_target_is_refused(bundle: Path) -> None:
    words = "--exit-guard raises the thresholds of certified targets, and this model has none"
    plain = str(bundle.parent / "checkpoint")
    ended = run_to_end("serve", plain, "--port", "0", env={"EXEUNT_EXIT_GUARD": "true"})
    assert ended.returncode == 2, ended.stderr
    assert words in ended.stderr
    model = load_bundle(bundle)
    assert model.manifest is not None
    uncertified = replace(model, manifest=model.manifest.model_copy(update={"risk_table": ()}))
    with pytest.raises(SettingsError, match=words):
        start_service(uncertified, given_settings({"exit_guard": True}))


def test_settings_that_do_not_fit_the_model_are_refused_before_serving(bundle: Path) -> None:
    uncertified = '{"early_exit": {"mode": "approximate", "max_disagreement": 0.001}}'
    ended = run_to_end("serve", str(bundle), "--port", "0", "--default-compression", uncertified)
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.count("\n") == 1, ended.stderr
    assert "--default-compression" in ended.stderr
    assert "0.001" in ended.stderr
