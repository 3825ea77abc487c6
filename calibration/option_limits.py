"""What calibration and evaluation both take and refuse alike: seeds, and names of files and folders."""

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from exeunt.calibration.errors import OptionError

MOST_SEED: Final = 2**31 - 1
"""Seeds are multiplied by thousands where draws are numbered, and must then still be numbers of 64 bits."""


def check_seed(seed: int) -> None:
    """Raise OptionError for a seed below 0 or above `MOST_SEED`."""
    if not 0 <= seed <= MOST_SEED:
        raise OptionError(f"The seed is {seed}; give a whole number from 0 to {MOST_SEED}.")


def check_names(names: Mapping[str, str | Path | None]) -> None:
    """Raise OptionError where a name, by the option that gave it, has bytes that are no UTF-8; None is no name.

    Names stand in the manifest and in the report, which are UTF-8.
    """
    for option, name in names.items():
        try:
            str(name).encode()
        except UnicodeEncodeError:
            shown = str(name).encode(errors="backslashreplace").decode()
            raise OptionError(
                f"{option} is {shown}, a name with bytes that are no UTF-8; rename it, or give a link to it."
            ) from None
