"""A server that ends while texts are cut: who waits for one gets it in time, and one for nobody holds nothing up."""

import signal
import sys
import threading
from pathlib import Path

import httpx
import pytest

from exeunt.server.api.tokenizer import LONG_CHARACTERS
from tests.deploy.server_process import byte_bundle, eventually, serving

TEXT = {"prompt": "x" * LONG_CHARACTERS}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(byte_bundle(tmp_path_factory.mktemp("served")))


def program(go: Path) -> tuple[str, ...]:
    """`exeunt` that cuts no long text before the file `go` is there."""
    return sys.executable, "-m", "tests.deploy.held_texts", str(go)


def test_a_text_that_nobody_waits_for_holds_up_no_end(bundle: str, tmp_path: Path) -> None:
    never, log = program(tmp_path / "never"), tmp_path / "log"
    with serving(bundle, "--request-timeout", "0.5", log=log, program=never) as server:
        refused = server.client.post("/tokenize", json=TEXT)
        assert (refused.status_code, refused.json()["error"]["code"]) == (504, "timeout")
        assert "a text is held" in log.read_text()
        assert server.stop() == 0
    assert log.read_text().rstrip().endswith("Stopped.")
    assert "Traceback" not in log.read_text()


def test_who_waits_for_a_text_gets_it_though_the_server_drains(bundle: str, tmp_path: Path) -> None:
    go, log, answers = tmp_path / "go", tmp_path / "log", list[httpx.Response]()
    with serving(bundle, "--shutdown-timeout", "60", log=log, program=program(go)) as server:
        asking = threading.Thread(target=lambda: answers.append(server.client.post("/tokenize", json=TEXT)))
        asking.start()
        eventually(lambda: "a text is held" in log.read_text(), "the cutting of a text")
        server.process.send_signal(signal.SIGTERM)
        eventually(lambda: httpx.get(server.client.base_url.join("/ready")).status_code == 503, "draining")
        go.touch()
        asking.join(60)
        assert answers[0].status_code == 200
        assert answers[0].json()["count"] == LONG_CHARACTERS
        assert server.process.wait(timeout=60) == 0
    assert "Cancel" not in log.read_text()


def test_the_end_of_its_time_ends_a_text_too(bundle: str, tmp_path: Path) -> None:
    never, log, answers = program(tmp_path / "never"), tmp_path / "log", list[httpx.Response]()
    with serving(bundle, "--shutdown-timeout", "0.5", log=log, program=never) as server:
        asking = threading.Thread(target=lambda: answers.append(server.client.post("/tokenize", json=TEXT)))
        asking.start()
        eventually(lambda: "a text is held" in log.read_text(), "the cutting of a text")
        assert server.stop() == 0
        asking.join(60)
    assert answers[0].status_code == 503
    assert "Traceback" not in log.read_text()
