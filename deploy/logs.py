"""How the server logs: one line an event on standard error, as text or as JSON."""

import json
import logging
import sys
import time
from typing import Final, TextIO

from exeunt.calibration.progress import LineProgress

_QUIET_PATHS: Final = ("/health", "/ready", "/metrics")  # asked every few seconds by machines


class JSONFormatter(logging.Formatter):
    """A log record as one JSON object."""

    def format(self, record: logging.LogRecord) -> str:
        """`time` is Unix seconds; `exception` is there only where there was one."""
        entry = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False)


class TextFormatter(logging.Formatter):
    """A log record as a line for people, in UTC."""

    converter = time.gmtime  # type: ignore[assignment] # the stubs know only one of its signatures

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(name)s: %(message)s", "%Y-%m-%dT%H:%M:%SZ")


class StandardErrorHandler(logging.StreamHandler[TextIO]):
    """Writes to what standard error is at the moment: while a progress bar is shown, to the lines above it."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)  # StreamHandler's own would set the stream

    @property
    def stream(self) -> TextIO:  # type: ignore[override] # an attribute there
        """Standard error."""
        return sys.stderr


class LoggedProgress(LineProgress):
    """Calibration's progress as log lines: for logs that no terminal shows, where a bar would be noise."""

    def __init__(self) -> None:
        super().__init__(lambda line: logging.getLogger("exeunt.calibrate").info("%s", line))


def configure_logging(level: str, *, as_json: bool = False) -> None:
    """Send everything to standard error; ours and the HTTP server's from `level` on, others' from warnings on."""
    handler = StandardErrorHandler()
    handler.setFormatter(JSONFormatter() if as_json else TextFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    chosen = getattr(logging, level.upper())
    for name in ("exeunt", "uvicorn"):
        logging.getLogger(name).setLevel(chosen)
    # uvicorn reports its own start, stop and every probe; what matters of that, the server says itself.
    logging.getLogger("uvicorn.error").setLevel(
        max(chosen, logging.WARNING) if chosen > logging.DEBUG else chosen
    )
    if chosen > logging.DEBUG:
        logging.getLogger("uvicorn.access").addFilter(_is_no_probe)


def _is_no_probe(record: logging.LogRecord) -> bool:
    arguments = record.args
    path = arguments[2] if isinstance(arguments, tuple) and len(arguments) > 2 else ""
    return not str(path).startswith(_QUIET_PATHS)
