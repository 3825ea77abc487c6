"""Makes `exeunt` importable from this repository on a machine where nothing can be installed."""

import atexit
import os
import shutil
import sys
import tempfile
import tomllib
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]
_MADE = "EXEUNT_SOURCE_TREE"  # which process made which folder
_LAYERS = ("kernels", "compression", "calibration", "server", "deploy")


def make_importable() -> None:
    """Put a folder of links on the path, of this process and of those it starts, where `exeunt` is not installed."""
    before = os.environ.get(_MADE, "")
    if before.startswith(f"{os.getpid()} "):  # by this process, before it replaced itself by a fresh one
        _remove_at_exit(before.partition(" ")[2])
    if _installed():
        return
    folder = Path(tempfile.mkdtemp(prefix="exeunt-"))
    os.environ[_MADE] = f"{os.getpid()} {folder}"
    _remove_at_exit(str(folder))
    (folder / "exeunt").mkdir()
    for layer in _LAYERS:
        (folder / "exeunt" / layer).symlink_to(_ROOT / layer)
    project = tomllib.loads((_ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    about = folder / f"exeunt-{project['version']}.dist-info"
    about.mkdir()
    lines = ("Metadata-Version: 2.1", "Name: exeunt", f"Version: {project['version']}", "")
    (about / "METADATA").write_text("\n".join(lines), encoding="utf-8")
    sys.path.insert(0, str(folder))
    paths = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(folder) if not paths else f"{folder}{os.pathsep}{paths}"


def _remove_at_exit(folder: str) -> None:
    """Remove it with the process that made it, not with one of its forks."""
    made_by = os.getpid()

    def remove() -> None:
        if os.getpid() == made_by:
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)


def _installed() -> bool:
    try:
        version("exeunt")
        return find_spec("exeunt.kernels") is not None
    except (PackageNotFoundError, ModuleNotFoundError):
        return False
