"""The log's two forms, and what it leaves out."""

import json
import logging
import sys

import pytest

from exeunt.deploy.logs import JSONFormatter, TextFormatter, configure_logging


def record(message: str, *values: object, failed: bool = False) -> logging.LogRecord:
    trouble = None
    if failed:
        try:
            raise ValueError("why")
        except ValueError:
            trouble = sys.exc_info()
    return logging.LogRecord("exeunt.test", logging.WARNING, __file__, 1, message, values, trouble)


def test_json_lines_hold_the_whole_event() -> None:
    entry = json.loads(JSONFormatter().format(record("über %s\nzwei", 3)))
    assert entry.pop("time") > 1e9
    assert entry == {"level": "warning", "logger": "exeunt.test", "message": "über 3\nzwei"}
    failed = JSONFormatter().format(record("bad", failed=True))
    assert "\n" not in failed
    assert "ValueError: why" in json.loads(failed)["exception"]


def test_text_lines_have_a_time_in_utc() -> None:
    line = record("hello %s", "you")
    line.created = 0.0
    assert TextFormatter().format(line) == "1970-01-01T00:00:00Z WARNING exeunt.test: hello you"


@pytest.mark.parametrize(("level", "shown"), [("info", ["/generate"]), ("debug", ["/generate", "/ready"])])
def test_probes_are_logged_only_where_everything_is(
    level: str, shown: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    configure_logging(level)
    for path in ("/generate", "/ready"):
        logging.getLogger("uvicorn.access").info('%s - "%s %s HTTP/%s" %d', "me", "GET", path, "1.1", 200)
    logging.getLogger("someone.else").info("chatter")
    told = capsys.readouterr().err
    assert [path for path in ("/generate", "/ready") if path in told] == shown
    assert "chatter" not in told
