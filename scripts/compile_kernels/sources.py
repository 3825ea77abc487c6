"""Of which sources a record of compiled kernels is: digests that change with the code, not with what is said of it."""

import ast
import hashlib
import io
import tokenize
from pathlib import Path
from typing import Final

import exeunt.kernels.gpu

KERNELS: Final = Path(exeunt.kernels.gpu.__file__).parent
_BESIDE: Final = ("linear_parts.py", "linear_rule.py", "linear_tiles.py", "int4_linear/pairs.py")
"""What else says which constants kernels are compiled with."""


def source_digests() -> dict[str, str]:
    """A digest of each file that kernels are compiled from, by its path below `kernels/`."""
    paths = {*KERNELS.rglob("*triton.py"), *(KERNELS / name for name in _BESIDE)}
    return {
        path.relative_to(KERNELS).as_posix(): digest_of(path.read_text(encoding="utf-8"))
        for path in sorted(paths)
    }


def digest_of(text: str) -> str:
    """A digest of a source in Python; comments, docstrings and empty lines do not count."""
    return hashlib.sha256(_code(text).encode()).hexdigest()[:12]


def _code(text: str) -> str:
    """A source without its comments, docstrings and empty lines."""
    lines = text.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(ast.parse(text)):
        match node:
            case ast.Expr(value=ast.Constant(value=str()), lineno=first, end_lineno=int(last)):
                lines[first - 1 : last] = [""] * (last - first + 1)
    return "\n".join(line.rstrip() for line in lines if line.strip())
