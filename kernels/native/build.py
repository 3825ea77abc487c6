"""Compiles the native kernels with the system's C++ compiler, once per machine, and keeps the result.

The library lies in $XDG_CACHE_HOME/exeunt/native (~/.cache without it), named by a hash of the sources, the compiler,
the flags and the processor's features. It appears there by an atomic rename, under a lock that makes a second
process wait instead of compiling too. A cache that cannot be written is replaced by a folder of this process's own.
"""

import atexit
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent
BASE_FLAGS = (
    "-O3",
    "-std=c++17",
    "-shared",
    "-fPIC",
    "-ffp-contract=off",
    "-fvisibility=hidden",
    "-Wno-psabi",
)
# Tried in order: not every compiler has OpenMP's headers, or knows its own machine by name.
FLAG_CHOICES = (("-march=native", "-fopenmp"), ("-march=native",), ("-fopenmp",), ())
COMPILERS = ("c++", "g++", "clang++")
_COMPILE_SECONDS = 300.0


class NativeBuildError(RuntimeError):
    """The native kernels could not be compiled; the message holds the compiler's own."""


def find_compiler() -> str | None:
    """Return the path of the C++ compiler: $CXX where it is set, else the first of `COMPILERS` on the path."""
    wanted = os.environ.get("CXX")
    return next(filter(None, map(shutil.which, [wanted] if wanted else COMPILERS)), None)


def cached_library(compiler: str, flags: tuple[str, ...]) -> Path:
    """Return the path of the compiled library, compiling it where this machine has not done so yet.

    Raises NativeBuildError with the compiler's message where it fails.
    """
    name = f"{_fingerprint(compiler, flags)}.so"
    try:
        folder = cache_folder()
        target = folder / name
        if (
            target.is_file()
        ):  # needs no lock: it appeared whole, perhaps in a cache this process may only read
            return target
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / f"{name}.lock"):
            if not target.is_file():
                compile_library(compiler, flags, target)
            return target
    except OSError as error:
        own = Path(tempfile.mkdtemp(prefix="exeunt-native-"))
        atexit.register(shutil.rmtree, own, ignore_errors=True)
        logger.warning("native kernels: the cache cannot be used (%s), compiling into %s", error, own)
        compile_library(compiler, flags, own / name)
        return own / name


def is_cached(compiler: str, flags: tuple[str, ...]) -> bool:
    """Whether this machine has compiled the library already."""
    return (cache_folder() / f"{_fingerprint(compiler, flags)}.so").is_file()


def cache_folder() -> Path:
    """Return the folder of compiled libraries; it need not exist."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "exeunt" / "native"


def compile_library(compiler: str, flags: tuple[str, ...], target: Path) -> None:
    """Compile the native kernels to `target`, which appears whole or not at all; raises NativeBuildError."""
    handle, unfinished = tempfile.mkstemp(prefix=".compiling-", suffix=".so", dir=target.parent)
    os.close(handle)
    try:
        command = [compiler, *BASE_FLAGS, *flags, str(SOURCES / "exeunt.cpp"), "-o", unfinished]
        logger.info("compiling the native kernels: %s", " ".join(command))
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=_COMPILE_SECONDS, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise NativeBuildError(f"{compiler} did not run: {error}") from error
        if done.returncode:
            message = done.stderr.strip().splitlines()
            raise NativeBuildError(f"{compiler} failed ({done.returncode}): {' | '.join(message[:5])}")
        os.replace(unfinished, target)
    finally:
        Path(unfinished).unlink(missing_ok=True)


def _fingerprint(compiler: str, flags: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    for source in (*sorted(SOURCES.glob("*.h")), SOURCES / "exeunt.cpp"):
        digest.update(source.read_bytes())
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=60, check=False)
    for part in (compiler, version.stdout, *BASE_FLAGS, *flags, platform.machine(), processor()):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:32]


def processor() -> str:
    """What tells this processor from another that shares the cache: its model and features."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    wanted = ("model name", "flags", "Features", "CPU implementer", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    try:
        import fcntl
    except ImportError:  # no locks on this system: two processes may both compile, the rename is still atomic
        yield
        return
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
