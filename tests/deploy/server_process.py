"""`exeunt serve` as its users run it: a process of its own, on a free port, asked over HTTP."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from tests.compression.small_bundles import small_bundle, small_checkpoint
from tests.deploy.conftest import free_port, wait_for
from tests.server.conftest import VOCAB, byte_tokenizer

EXEUNT = Path(sys.executable).with_name("exeunt")
CONTEXT = 4096
BLOCKS = 4


def byte_bundle(folder: Path) -> Path:
    """A random bundle over bytes: four blocks, an exit after block 1, a linear block 2, room for long answers."""
    checkpoint = small_checkpoint(folder / "checkpoint", vocab_size=VOCAB, max_position_embeddings=CONTEXT)
    byte_tokenizer().save_pretrained(checkpoint)
    return small_bundle(folder / "bundle", checkpoint).path


@dataclass(frozen=True)
class ServerProcess:
    """A running server, a client for it, and the file that its standard error goes to."""

    process: subprocess.Popen[bytes]
    client: httpx.Client
    log: Path

    def generate(self, **body: Any) -> dict[str, Any]:
        """The answer to a request that must succeed."""
        response = self.client.post("/generate", json=body)
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    def metrics(self) -> dict[str, float]:
        """Every series of ours, without the label that all have, as `name{label=value}`."""
        found = {}
        for family in text_string_to_metric_families(self.client.get("/metrics").text):
            for sample in family.samples:
                labels = {k: v for k, v in sample.labels.items() if k != "model_name"}
                inside = ",".join(f"{name}={value}" for name, value in sorted(labels.items()))
                found[
                    f"{sample.name.removeprefix('exeunt_')}{{{inside}}}"
                    if inside
                    else sample.name.removeprefix("exeunt_")
                ] = sample.value
        return found

    def stop(self) -> int:
        """Ask the server to stop; its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=120)


def environment(**more: str) -> dict[str, str]:
    """The environment of a child: ours, without settings of a server, on one thread."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("EXEUNT_")}
    return {**kept, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **more}


@contextmanager
def serving(
    *arguments: str,
    log: Path,
    env: Mapping[str, str] | None = None,
    ready: bool = True,
    program: Sequence[str] = (str(EXEUNT),),
) -> Iterator[ServerProcess]:
    """`exeunt serve ARGUMENTS` on a free port, ready to answer; `program` is what stands for `exeunt`."""
    port = free_port()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*program, "serve", *arguments, "--port", str(port)],
            stdout=output, stderr=output, env=environment(**(env or {})),
        )  # fmt: skip
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
                path = "/ready" if ready else "/health"
                wait_for(
                    lambda: client.get(path).is_success or process.poll() is not None,
                    "exeunt serve",
                    log,
                    120,
                )
                yield ServerProcess(process, client, log)
        finally:
            if process.poll() is None:
                process.kill()
            process.wait(timeout=20)


def run_to_end(*arguments: str, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """`exeunt ARGUMENTS` for a command that is expected to end by itself."""
    return subprocess.run(
        [str(EXEUNT), *arguments], capture_output=True, text=True, timeout=120, check=False,
        env=environment(**(env or {})),
    )  # fmt: skip


def eventually(condition: Any, what: str, timeout_s: float = 60) -> None:
    """Wait until `condition()` holds; fail with `what` otherwise."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError(f"{what} did not happen within {timeout_s} s")
