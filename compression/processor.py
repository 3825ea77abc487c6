"""Which processor this machine has."""

import platform


def processor_name() -> str:
    """The processor's name as the system tells it, or its architecture where it does not."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
