"""What only a GPU runs of many parameters, memory that shows who reads it, and an interpreter made less slow."""

from collections.abc import Callable
from typing import Any, Final

import pytest
import torch
from torch import Tensor

HERE: Final = torch.cuda.is_available()


def on_gpu_only(*values: object) -> Any:
    """Parameters whose kind others cover: the interpreter would take seconds for them."""
    slow = pytest.mark.skipif(
        not HERE, reason="slow under Triton's interpreter, which runs others of its kind"
    )
    return pytest.param(*values, marks=slow)


def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have what is allocated and not written show: it is NaN, or of other dtypes 1."""
    empty = torch.empty

    def filled(*size: object, **options: object) -> Tensor:
        made: Tensor = empty(*size, **options)  # type: ignore[call-overload]
        return made.fill_(torch.nan if made.is_floating_point() else 1)

    monkeypatch.setattr(torch, "empty", filled)


def patch_language_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the interpreter replace the language's functions once a launch: it does so at every call of a function in
    a kernel, again and to the same effect, which takes a fifth of its time."""
    from triton.runtime import interpreter

    original: Callable[[Any], Any] | None = getattr(interpreter, "_patch_lang", None)
    if original is None:  # a version that works in another way
        return
    replaced: set[frozenset[int]] = set()

    def once(function: Any) -> Any:
        names = function.__globals__.values()
        seen = frozenset(
            id(part) for part in (interpreter.tl, interpreter.tl.core) if any(x is part for x in names)
        )
        if seen in replaced:
            return None
        at_launch = not replaced
        scope = original(function)
        replaced.add(seen)
        if at_launch:
            restore = scope.restore

            def restored() -> None:
                replaced.clear()
                restore()

            scope.restore = restored
        return scope

    monkeypatch.setattr(interpreter, "_patch_lang", once)
