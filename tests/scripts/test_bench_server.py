"""The server beside its engine, on a random model: what is measured and written, and what is refused."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from scripts import bench_runs, bench_server
from tests.deploy.server_process import byte_bundle


def test_it_measures_whole_and_streamed_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, counted = byte_bundle(tmp_path), []
    monkeypatch.setattr(bench_runs, "packaged_bundle", lambda: bundle)
    monkeypatch.setattr(bench_server, "CLIENTS", 4)
    over_http = bench_server.over_http

    def counting(*asked: object) -> bench_runs.Run:
        run = over_http(*asked)  # type: ignore[arg-type]
        counted.append(run.tokens)
        return run

    monkeypatch.setattr(bench_server, "over_http", counting)
    bench_server.main(tmp_path / "out.json", prompt_tokens=8, new_tokens=6, repeats=1)
    record = json.loads((tmp_path / "out.json").read_text())
    assert list(record["results"]) == [
        f"4 clients, {weights}, {how}"
        for weights in bench_runs.VARIANTS
        for how in ("whole answers", "streamed")
    ]
    assert set(counted) == {4 * 6}  # every client's answer came whole
    assert all(row["tokens_per_s"] > 0 < row["against_tokens_per_s"] for row in record["results"].values())
    assert 0 < record["start"]["seconds_to_ready"] < 300
    cpu = [row["cpu_us_per_token"] for row in record["results"].values()]
    assert all(set(each) == {"server", "clients", "engine_alone"} for each in cpu)
    assert all(each["clients"] > 0 and each["engine_alone"] > 0 for each in cpu)
    assert record["model"]["name"] == "small"


def test_cpu_is_that_of_the_runs_by_the_clock_given() -> None:
    clock = iter((0.0, 1.0, 3.0, 10.0, 11.0))
    time = bench_server.CpuTime(lambda: next(clock))
    run = time.of(lambda: bench_runs.Run(tokens=100, seconds=1.0))
    assert [run().tokens for _ in range(3)] == [100, 100, 100]
    assert time.us_per_token == pytest.approx(3.0 / 200 * 1e6)


class _Refuses(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"# TYPE process_cpu_seconds_total counter\nprocess_cpu_seconds_total 12.5\n")

    def do_POST(self) -> None:
        self.send_error(503)

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_an_answer_that_is_none_is_an_error() -> None:
    with HTTPServer(("127.0.0.1", 0), _Refuses) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            url = f"http://127.0.0.1:{server.server_port}"
            assert bench_server.server_cpu(url)() == 12.5
            with pytest.raises(RuntimeError, match="503"):
                bench_server.over_http(url, [[1]], {"stream": False})
        finally:
            server.shutdown()
