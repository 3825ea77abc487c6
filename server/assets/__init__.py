"""Pages that the server shows, as files of the package."""

from importlib.resources import files


def page(name: str) -> str:
    """The text of a page; raises FileNotFoundError for a name that there is not."""
    return (files(__name__) / name).read_text(encoding="utf-8")
