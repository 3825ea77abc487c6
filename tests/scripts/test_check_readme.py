"""The checker of the pages: it finds what is wrong, and leaves alone what is right."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from scripts.check_readme.answers import compare_answer, differences
from scripts.check_readme.check import check
from scripts.check_readme.commands import check_command
from scripts.check_readme.pages import ROOT, ShownWrongError
from scripts.check_readme.requests import read_curl

ANSWER = {
    "text": " and",
    "seed": None,
    "tokens": [{"id": 1, "logprob": -0.5}, {"id": 2, "logprob": -1}],
    "depth": {"mean": 3.5, "by_exit": {"block_2": 1, "final": 1}},
}


@pytest.fixture
def server() -> Iterator[str]:
    """A server that answers /generate as ours does, and 400 to a prompt that is missing."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            answer, status = (ANSWER, 200) if "prompt" in body else ({"error": {"message": "no prompt"}}, 400)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        def log_message(self, *args: object) -> None:
            pass

    found = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=found.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{found.server_port}"
    found.shutdown()
    found.server_close()


def _page(folder: Path, text: str) -> Path:
    page = folder / "README.md"
    page.write_text(text)
    return page


def _problems(folder: Path, text: str, server: str | None = None) -> list[str]:
    return [
        problem.message
        for problem in check([_page(folder, text)], with_server=server is not None, url=server)
    ]


class TestCommands:
    @pytest.mark.parametrize(
        "command",
        [
            "make serve",
            "make serve PYTHON=python3.12",
            "EXEUNT_PORT=9000 make serve",
            "exeunt serve bundle --port 9000 --kv-cache-memory=1GiB",
            "exeunt calibrate MODEL --out BUNDLE --data text.txt",
            "exeunt --help",
            "git clone https://example.org/exeunt && cd exeunt && make test",
            "docker compose -f deploy/compose.yaml up --build",
            "docker build --target cuda .",
            "scripts/check",
            "curl http://127.0.0.1:8000/health | jq .",
        ],
    )
    def test_what_exists_is_accepted(self, command: str) -> None:
        check_command(command)

    @pytest.mark.parametrize(
        ("command", "message"),
        [
            ("make coffee", "no target coffee"),
            ("EXEUNT_PROT=9000 make serve", "no variable EXEUNT_PROT"),
            ("exeunt sing", "no `exeunt sing`"),
            ("exeunt serve --prot 9000", "no option --prot"),
            ("make test && exeunt serve --loud", "no option --loud"),
            ("docker compose -f deploy/compose.yml up", "no deploy/compose.yml"),
            ("docker build --target tpu .", "no target tpu"),
            ("python scripts/dance.py", "no scripts/dance.py"),
            ("frobnicate", "not known"),
            ("curl http://example.org/generate", "the server is at"),
            ("curl --frob http://127.0.0.1:8000/", "--frob is not known"),
        ],
    )
    def test_what_does_not_exist_is_named(self, command: str, message: str) -> None:
        with pytest.raises(ShownWrongError, match=message):
            check_command(command)

    def test_fences_and_running_text_are_read_others_are_not(self, tmp_path: Path) -> None:
        text = (
            "Say `make tea`.\n\n```bash\n# make cake\nmake \\\n  pie\n```\n\n```python\nmake_bread()\n```\n"
        )
        problems = check([_page(tmp_path, text)], with_server=False)
        assert [(p.line, p.message.split()[-1]) for p in problems] == [(4 + 1, "pie"), (1, "tea")]

    def test_console_output_is_no_command(self, tmp_path: Path) -> None:
        assert _problems(tmp_path, "```console\n$ make test\nfrobnicated 3 tests\n```\n") == []


class TestLinks:
    def test_they_must_lead_somewhere(self, tmp_path: Path) -> None:
        (tmp_path / "other.md").write_text("# A Heading, of `code`\n")
        good = (
            "[a](other.md) [b](other.md#a-heading-of-code) [c](https://example.org) [d](#here)\n\n## Here\n"
        )
        assert _problems(tmp_path, good) == []
        assert _problems(tmp_path, "![x](images/none.svg)") == ["the link images/none.svg leads nowhere"]
        assert _problems(tmp_path, "[x](other.md#nothing)") == ["other.md has no heading #nothing"]


class TestRequests:
    CURL = """```bash
curl -s http://127.0.0.1:8000/generate -H 'Content-Type: application/json' -d '{
  "prompt": "It was a dark night"
}'
```
"""

    def test_a_true_answer_is_accepted(self, tmp_path: Path, server: str) -> None:
        shown = {
            **ANSWER,
            "text": "other",
            "tokens": [{"id": 9, "logprob": 0}],
            "depth": {"mean": 2, "by_exit": {}},
        }
        assert (
            _problems(tmp_path, f"{self.CURL}\n```json\n{json.dumps(shown, indent=2)}\n```\n", server) == []
        )

    def test_an_untrue_one_is_found(self, tmp_path: Path, server: str) -> None:
        shown = {**ANSWER, "text": 3, "extra": 1}
        problems = _problems(tmp_path, f"{self.CURL}\n```json\n{json.dumps(shown)}\n```\n", server)
        assert len(problems) == 2
        assert problems[0].endswith("the answer has no extra")
        assert problems[1].endswith("text is a string, not a number")

    def test_a_refused_request_is_found(self, tmp_path: Path, server: str) -> None:
        problems = _problems(tmp_path, self.CURL.replace("prompt", "promt"), server)
        assert len(problems) == 1
        assert "answered 400" in problems[0]

    def test_curl_is_read(self) -> None:
        request = read_curl(["-sN", "localhost:8000/a", "--json", "{}", "-H", "Authorization: Bearer k"])
        assert (request.method, request.path, request.body) == ("POST", "/a", "{}")
        assert request.headers["authorization"] == "Bearer k"


class TestShapes:
    def test_dots_stand_for_what_was_left_out(self) -> None:
        shown = '{\n  "text": " x",\n  "tokens": [{"id": 3, "logprob": -2.0}, ...],\n  ...\n}'
        assert compare_answer(shown, json.dumps(ANSWER)) == []
        assert compare_answer('{"text": " x"}', json.dumps(ANSWER)) == [
            "the answer lacks depth, seed, tokens"
        ]

    @pytest.mark.parametrize(
        ("shown", "real", "expected"),
        [
            ({"a": 1}, {"a": 1.5}, []),
            ({"a": True}, {"a": 1}, ["a is a number, not a boolean"]),
            ({"a": None}, {"a": "x"}, ["a is a string, not null"]),
            ({"a": [{"b": 1}]}, {"a": [{"b": "x"}]}, ["a[0].b is a string, not a number"]),
            ({"a": [1]}, {"a": []}, ["a is empty"]),
            ({"a": [None, 1]}, {"a": [None, 2, 3]}, []),
            ({"a": [1, "x"]}, {"a": [None, 2]}, ["a[1] is null, not a string"]),
            ({"by_exit": {"x": 1}}, {"by_exit": {"y": 2}}, []),
        ],
    )
    def test_differences(self, shown: Any, real: Any, expected: list[str]) -> None:
        assert list(differences(shown, real)) == expected

    def test_events_of_a_stream(self) -> None:
        real = 'data: {"text": "a", "tokens": []}\n\ndata: {"usage": 3}\n\ndata: [DONE]\n'
        assert compare_answer('data: {"text": "b", "tokens": []}\ndata: [DONE]\n', real) == []
        assert compare_answer('data: {"txt": "b"}\n', real) == ['no event is like {"txt": "b"}']
        assert compare_answer('data: {"text": "b"}\n', real) == ['no event is like {"text": "b"}']
        assert compare_answer('data: {"text": "b", ...}\n...\ndata: [DONE]\n', real) == []
        assert compare_answer('data: {"text": 3, ...}\n', real) == ['no event is like {"text": 3, ...}']


def test_the_pages_of_this_repository_are_true() -> None:
    """What needs no server; tests/deploy/test_serve.py sends the requests."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    assert [str(problem) for problem in check(pages, with_server=False)] == []
