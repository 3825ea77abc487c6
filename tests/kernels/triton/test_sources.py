"""What Triton's launcher demands of a kernel's source, which its interpreter does not."""

import ast
from pathlib import Path

import exeunt.kernels.gpu

TAKEN = {"params", "specialization", "options", "backend", "specialize_impl"}
"""Names that the function which Triton writes to bind a launch's arguments has for itself."""


def test_no_kernel_has_an_argument_that_the_launcher_takes_for_its_own() -> None:
    found, kernels = [], 0
    for path in sorted(Path(exeunt.kernels.gpu.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and any(
                "triton.jit" in ast.unparse(each) for each in node.decorator_list
            ):
                kernels += 1
                taken = TAKEN.intersection(argument.arg for argument in node.args.args)
                found += [f"{path.name}: {node.name}({name})" for name in taken]
    assert kernels > 10
    assert not found
