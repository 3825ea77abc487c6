"""A real Prometheus, configured as deploy/prometheus is but for its target and its pace."""

import logging
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

DEPLOY = Path(__file__).parents[2] / "deploy"


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    """Put back the process's logging, which every command that is run in it takes over."""
    named = (None, "exeunt", "uvicorn", "uvicorn.error", "uvicorn.access")
    loggers = [logging.getLogger(name) for name in named]
    before = [(each, each.level, each.handlers[:], each.filters[:]) for each in loggers]
    yield
    for each, level, handlers, filters in before:
        each.setLevel(level)
        each.handlers[:], each.filters[:] = handlers, filters


@dataclass(frozen=True)
class Prometheus:
    """A running Prometheus; `url` is its base address."""

    url: str

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The result of an instant query. Raises AssertionError with Prometheus' own words when it refuses."""
        found: list[dict[str, Any]] = self._get("query", query=expression)["result"]
        return found

    def rules(self) -> list[dict[str, Any]]:
        """All rules that are loaded, with their health and last error."""
        return [rule for group in self._get("rules")["groups"] for rule in group["rules"]]

    def _get(self, path: str, **params: str) -> dict[str, Any]:
        answer = httpx.get(f"{self.url}/api/v1/{path}", params=params, timeout=10).json()
        assert answer["status"] == "success", f"{params}: {answer.get('error')}"
        found: dict[str, Any] = answer["data"]
        return found


@contextmanager
def running_prometheus(target: str, folder: Path) -> Iterator[Prometheus]:
    """Prometheus scraping `target` ("host:port") every second, with the alert rules of deploy/ loaded."""
    binary = shutil.which("prometheus")
    if binary is None:
        pytest.skip("needs the prometheus binary (Debian: apt-get install prometheus)")
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    config["global"] |= {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
    config["scrape_configs"] = [job for job in config["scrape_configs"] if job["job_name"] == "exeunt"]
    config["scrape_configs"][0]["static_configs"][0]["targets"] = [target]
    shutil.copy(DEPLOY / "prometheus" / "alerts.yml", folder)
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    url = f"http://127.0.0.1:{free_port()}"
    command = [
        binary,
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address={url.removeprefix('http://')}",
    ]
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            wait_for(lambda: httpx.get(f"{url}/-/ready").is_success, "Prometheus", folder / "prometheus.log")
            yield Prometheus(url)
        finally:
            process.terminate()
            process.wait(timeout=20)


def free_port() -> int:
    """A TCP port that nobody listens on just now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def wait_for(ready: Any, what: str, log: Path, timeout_s: float = 60) -> None:
    """Waits until `ready()` is true, a refused connection counting as false; fails with the log's end."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            if ready():
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    pytest.fail(f"{what} was not ready within {timeout_s} s:\n{log.read_text(errors='replace')[-3000:]}")
