"""Loading a model's tokenizer: as `transformers` chooses its class, or of the class that a bundle remembers."""

from pathlib import Path
from typing import Any


class TokenizerError(ValueError):
    """A tokenizer that cannot be loaded; the message is one sentence that says why."""


def load_tokenizer(directory: Path, class_name: str | None = None) -> Any:
    """The tokenizer of a checkpoint or bundle directory, transformers' `PreTrainedTokenizerBase`.

    `class_name` is what `tokenizer_class` said of it when it was loaded before. With it the class need not be looked
    for by the model's config: `AutoTokenizer` imports most of transformers to that end, which takes longer than all
    else in loading a small bundle. A name that this transformers does not know is looked for anew. Raises
    TokenizerError.
    """
    try:
        return _class(class_name).from_pretrained(directory)
    except Exception as error:  # transformers raises many kinds here, all about the files
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise TokenizerError(f"{directory} has no tokenizer that transformers can load: {reason}") from error


def tokenizer_class(tokenizer: Any) -> str | None:
    """The name under which transformers has the class of `tokenizer`; None where it has it under none."""
    name = type(tokenizer).__name__
    return name if _known(name) is type(tokenizer) else None


def _class(name: str | None) -> Any:
    known = None if name is None else _known(name)
    if known is not None:
        return known
    from transformers import AutoTokenizer

    return AutoTokenizer


def _known(name: str) -> type | None:
    import transformers

    try:
        found = getattr(transformers, name, None)
    except ImportError:  # the class is there, and something that its module needs is not
        return None
    base = transformers.PreTrainedTokenizerBase
    return found if isinstance(found, type) and issubclass(found, base) and found is not base else None
