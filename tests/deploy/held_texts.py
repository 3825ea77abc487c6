"""`exeunt` that cuts no long text before a file appears: run as a module, with the file and `exeunt`'s arguments."""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from exeunt.deploy import cli
from exeunt.server.api.tokenizer import SharedTokenizer


def main(file: str, *arguments: str) -> None:
    """Run the command line as described above."""
    own = SharedTokenizer._on_copy

    def held(tokenizer: SharedTokenizer, use: Callable[[Any], Any]) -> Any:
        print("a text is held", file=sys.stderr, flush=True)
        while not Path(file).exists():
            time.sleep(0.02)
        return own(tokenizer, use)

    SharedTokenizer._on_copy = held  # type: ignore[assignment, method-assign]
    cli.main(arguments)


if __name__ == "__main__":
    main(*sys.argv[1:])
