"""The first start: the server answers probes while it calibrates, and what is stopped leaves nothing half-made."""

import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from exeunt.deploy.packaged_model import CALIBRATION_TEXT
from tests.calibration.conftest import some_text, tiny_checkpoint
from tests.deploy.conftest import free_port, wait_for
from tests.deploy.server_process import environment, eventually

ROOT = Path(__file__).parents[2]
WRITING = "Writing the bundle"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_checkpoint(tmp_path_factory.mktemp("packaged"))
    (folder / CALIBRATION_TEXT).write_text(some_text())
    return folder


@dataclass(frozen=True)
class Held:
    """`exeunt` in a folder of its own, waiting in a phase of calibration until `go` is made."""

    process: subprocess.Popen[bytes]
    folder: Path

    @property
    def told(self) -> str:
        return (self.folder / "log").read_text()

    @property
    def go(self) -> Path:
        return self.folder / "go"

    def wait_until_held(self) -> None:
        eventually(lambda: "held in" in self.told or self.process.poll() is not None, "being held", 120)
        assert self.process.poll() is None, self.told

    def half_made(self) -> list[Path]:
        """What lies in the cache, the temporary folder and at the target, but for kernels, costs, locks and folders."""
        found = [path for part in ("cache/exeunt", "tmp", "out") for path in (self.folder / part).rglob("*")]
        return [
            path
            for path in found
            if not {"native", "costs"} & set(path.parts)
            and path.suffix != ".lock"
            and (path.is_file() or ".partial" in path.name or path.name.startswith("exeunt-"))
        ]


@contextmanager
def held(model: Path, phase: str, folder: Path, *arguments: str) -> Iterator[Held]:
    """`exeunt ARGUMENTS` with its cache and temporary files under `folder`."""
    for part in ("cache", "tmp", "out"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    env = environment(XDG_CACHE_HOME=str(folder / "cache"), TMPDIR=str(folder / "tmp"), EXEUNT_NATIVE="0")
    words = [str(model), phase, str(folder / "go"), *arguments]
    with (folder / "log").open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.deploy.held_exeunt", *words],
            stdout=output,
            stderr=output,
            env=env,
            cwd=ROOT,
        )
    try:
        yield Held(process, folder)
    finally:
        process.kill()
        process.wait(timeout=20)


@contextmanager
def held_server(model: Path, phase: str, folder: Path) -> Iterator[tuple[Held, httpx.Client]]:
    """`exeunt serve` without a model named, and a client for it."""
    port = free_port()
    with (
        held(model, phase, folder, "serve", "--port", str(port), "--max-model-len", "64") as waiting,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client,
    ):
        yield waiting, client


def test_probes_are_answered_while_one_server_calibrates_and_another_waits_for_its_bundle(
    model: Path, tmp_path: Path
) -> None:
    phase = "collecting activations"
    with held_server(model, phase, tmp_path / "first") as (first, client):
        wait_for(lambda: client.get("/health").is_success, "/health", tmp_path / "first" / "log", 120)
        first.wait_until_held()
        assert client.get("/health").status_code == 200
        _refuses(client, "calibrating", "is being calibrated")
        (tmp_path / "second").mkdir()
        (tmp_path / "second" / "cache").symlink_to(tmp_path / "first" / "cache")
        with held_server(model, phase, tmp_path / "second") as (second, other):
            eventually(lambda: "Another process is calibrating" in second.told, "waiting", 120)
            _refuses(other, "waiting_for_calibration", "Another process is calibrating")
            assert other.get("/health").status_code == 200
            gone_on, ready = time.monotonic(), []
            first.go.touch()
            for server, each, log in ((first, client, "first"), (second, other, "second")):
                wait_for(
                    lambda: server.process.poll() is not None or each.get("/ready").is_success,  # noqa: B023
                    "/ready",
                    tmp_path / log / "log",
                    120,
                )
                ready.append(time.monotonic() - gone_on)
                assert server.process.poll() is None, server.told
                asked = {"prompt": "a", "max_new_tokens": 3, "ignore_eos": True}
                assert each.post("/generate", json=asked).json()["usage"]["completion_tokens"] == 3
            assert f"{phase}: done" in first.told
            assert phase not in second.told
            for server in (first, second):
                server.process.send_signal(signal.SIGTERM)
            for server in (first, second):
                assert server.process.wait(timeout=60) == 0
            for server, since in zip((first, second), ready, strict=True):
                told = re.search(r"loaded in ([\d.]+) s", server.told)
                assert told is not None, server.told
                assert (
                    float(told[1]) <= since + 0.1
                )  # no time before the calibration went on is called loading


def _refuses(client: httpx.Client, code: str, says: str) -> None:
    """What is not served yet is answered with a reason and when to come back."""
    for response in (client.get("/ready"), client.post("/generate", json={"prompt": "a"})):
        assert response.status_code == 503
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert says in error["message"]
        assert (error["type"], error["code"]) == ("unavailable_error", code)
        assert int(response.headers["retry-after"]) > 0


@pytest.mark.parametrize(
    ("number", "phase"), [(signal.SIGTERM, "collecting activations"), (signal.SIGINT, WRITING)]
)
def test_stopped_while_calibrating_it_leaves_nothing_half_made(
    model: Path, tmp_path: Path, number: signal.Signals, phase: str
) -> None:
    with held_server(model, phase, tmp_path) as (server, _):
        server.wait_until_held()
        assert server.half_made(), "there is something to clean up"
        server.process.send_signal(number)
        server.process.send_signal(number)  # impatience does not interrupt the cleaning up
        assert server.process.wait(timeout=20) == 0
        assert server.half_made() == []
        assert "Traceback" not in server.told
        assert (
            "Stopped before the model was ready. The packaged model's calibration begins anew" in server.told
        )


def test_a_calibration_that_fails_ends_the_server_with_its_line(model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "model"
    shutil.copytree(model, broken)
    (broken / CALIBRATION_TEXT).write_text("too short")
    with held_server(broken, "none", tmp_path) as (server, _):
        assert server.process.wait(timeout=120) == 1
        last = server.told.splitlines()[-1]
        assert last.startswith("exeunt: ")
        assert "Calibration needs at least 3,000" in last
        assert "Traceback" not in server.told
        assert server.half_made() == []


def test_a_port_in_use_is_found_before_anything_is_calibrated(model: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with held(model, "none", tmp_path, "serve", "--port", port) as server:
            assert server.process.wait(timeout=120) == 1
            assert server.told.count("\n") == 1
            assert "in use" in server.told


@pytest.mark.parametrize(
    ("number", "phase", "word"),
    [(signal.SIGTERM, WRITING, "terminated"), (signal.SIGINT, "Training exit heads", "interrupted")],
)
def test_a_stopped_calibrate_leaves_nothing(
    model: Path, tmp_path: Path, number: signal.Signals, phase: str, word: str
) -> None:
    data = str(model / CALIBRATION_TEXT)
    words = ("calibrate", str(model), "--out", str(tmp_path / "out" / "new" / "bundle"), "--data", data)
    with held(model, phase, tmp_path, *words) as calibration:
        calibration.wait_until_held()
        assert calibration.half_made(), "there is something to clean up"
        calibration.process.send_signal(number)
        assert calibration.process.wait(timeout=20) == 128 + number
        assert calibration.half_made() == []
        assert list((tmp_path / "out").iterdir()) == []
        assert calibration.told.splitlines()[-1] == f"exeunt: {word} before it was done; nothing was written"
        assert "Traceback" not in calibration.told
