"""The small language model that ships with Exeunt, as a Hugging Face folder inside the package."""

from importlib.resources import files
from pathlib import Path
from typing import Final

CALIBRATION_TEXT: Final = "calibration.txt"
"""The name of the text that the model is calibrated on, in its folder."""


def path() -> Path:
    """Return the folder of the packaged model; ``AutoModelForCausalLM`` and ``AutoTokenizer`` load it.

    Raises FileNotFoundError if the package does not lie unpacked on disk, as in a zip archive.
    """
    folder = Path(str(files(__name__)))
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"the packaged model is not on disk at {folder}")
    return folder
