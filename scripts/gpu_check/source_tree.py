"""Makes `exeunt` importable from this repository on a machine where nothing can be installed."""

import os
import sys
import tempfile
import tomllib
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]
_LAYERS = ("kernels", "compression", "calibration", "server", "deploy")


def make_importable() -> None:
    """Put a folder of links on the path, of this process and of those it starts, where `exeunt` is not installed."""
    if _installed():
        return
    folder = Path(tempfile.mkdtemp(prefix="exeunt-"))
    (folder / "exeunt").mkdir()
    for layer in _LAYERS:
        (folder / "exeunt" / layer).symlink_to(_ROOT / layer)
    project = tomllib.loads((_ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    about = folder / f"exeunt-{project['version']}.dist-info"
    about.mkdir()
    lines = ("Metadata-Version: 2.1", "Name: exeunt", f"Version: {project['version']}", "")
    (about / "METADATA").write_text("\n".join(lines), encoding="utf-8")
    sys.path.insert(0, str(folder))
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(folder) if not before else f"{folder}{os.pathsep}{before}"


def _installed() -> bool:
    try:
        version("exeunt")
        return find_spec("exeunt.kernels") is not None
    except (PackageNotFoundError, ModuleNotFoundError):
        return False
