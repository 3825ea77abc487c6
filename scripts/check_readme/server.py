"""A server of the packaged model to send requests to."""

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

START_TIMEOUT_S = 30 * 60  # the first start calibrates


@contextmanager
def running_server(*given: str) -> Iterator[str]:
    """`exeunt serve` on a free port, of the packaged model unless told otherwise; its URL, once it is ready."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    program = Path(sys.executable).with_name("exeunt")
    process = subprocess.Popen([str(program), "serve", *given, "--port", str(port), "--log-level", "warning"])
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not _is_ready(url):
            if process.poll() is not None:
                raise SystemExit(f"exeunt serve ended with status {process.returncode} before it was ready")
            if time.monotonic() > deadline:
                raise SystemExit(f"exeunt serve was not ready within {START_TIMEOUT_S} s")
            time.sleep(0.05)
        yield url
    finally:
        process.terminate()
        process.wait(timeout=60)


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready", timeout=5).is_success
    except httpx.TransportError:
        return False
