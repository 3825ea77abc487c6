"""What `exeunt bench` is pointed at: a running server, or a bundle or model that is loaded for it."""

from collections.abc import Iterator
from contextlib import contextmanager

from exeunt.calibration.progress import watched_progress
from exeunt.deploy.arguments import UsageError, is_address, lacks_scheme
from exeunt.deploy.bench import Driver
from exeunt.deploy.bench_engine import EngineDriver, engine_driver
from exeunt.deploy.bench_http import HTTPDriver
from exeunt.deploy.bench_load import Load
from exeunt.deploy.preparation import load_to_measure
from exeunt.deploy.signals import InterruptibleProgress, Interruption


@contextmanager
def driver(target: str, load: Load, device: str, interruption: Interruption) -> Iterator[Driver]:
    """Sends requests to `target`. Raises what loading raises, LoadError where the load does not fit, and
    UsageError for an address without http://.
    """
    if is_address(target):
        asked: HTTPDriver | EngineDriver = HTTPDriver(target, concurrency=load.concurrency)
    else:
        if lacks_scheme(target):
            raise UsageError(
                f"{target} is no folder and no model's id; if a server is meant, its address begins with http://: "
                f"http://{target}."
            )
        progress = InterruptibleProgress(watched_progress(), interruption)
        asked = engine_driver(load_to_measure(target, device, progress), load)
    try:
        yield asked
    finally:
        asked.close()
