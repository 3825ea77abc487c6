"""The command: checks README.md and docs/*.md, or the pages named."""

import argparse
import sys
from pathlib import Path

from scripts.check_readme import __doc__ as DESCRIPTION
from scripts.check_readme.check import check
from scripts.check_readme.pages import (
    ROOT,
)


def main() -> int:
    """Check the pages named, else README.md and docs/*.md; 0 when all is well."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.check_readme", description=(DESCRIPTION or "").partition("\n")[0]
    )
    parser.add_argument("pages", nargs="*", type=Path)
    parser.add_argument("--no-server", action="store_true", help="do not send the requests shown")
    parser.add_argument("--url", help="send the requests shown to this server")
    arguments = parser.parse_args()
    pages = arguments.pages or [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    problems = check(
        [page.resolve() for page in pages], with_server=not arguments.no_server, url=arguments.url
    )
    for problem in problems:
        print(problem, file=sys.stderr)
    print(f"{len(pages)} pages, {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
