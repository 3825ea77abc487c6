"""A look at every tensor of a checkpoint before the long work, so that what is wrong with its last block is said first.

Blocks are read when they are needed, which for the last one may be an hour later.
"""

from collections.abc import Callable, Iterator, Mapping

from torch import Tensor

from exeunt.compression.architecture import Architecture
from exeunt.compression.checkpoint_names import block_shapes, shared_shapes
from exeunt.compression.weights import StackedTensors, WeightError, WeightSource


def check_weights(
    source: WeightSource, spec: Architecture, advance: Callable[[int], None] = lambda _blocks: None
) -> None:
    """Read every tensor of `source` that a full-precision decoder needs once, one in memory at a time.

    `advance` is told each block, and the tensors outside the blocks as one more: `spec.blocks` + 1 in all. Raises
    WeightError for the first tensor that is missing, has another shape than the config asks for, is not floating
    point, or holds NaN or infinity.
    """
    _check(source.shared(), shared_shapes(spec), "")
    advance(1)
    for index in range(spec.blocks):
        _check(source.block(index), block_shapes(spec), f"blocks.{index}.")
        advance(1)


def _check(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], prefix: str) -> None:
    for name, shape in shapes.items():
        if name not in tensors:
            raise WeightError(f"Tensor '{prefix}{name}' is missing from the model's files.")
        outputs, *inputs = shape
        found = 0
        for part in _parts(tensors, name):  # reading checks that it is finite
            if list(part.shape[1:]) != inputs:
                raise WeightError(
                    f"Tensor '{prefix}{name}' is {list(part.shape)}; the config asks for {list(shape)}."
                )
            found += len(part)
        if found != outputs:
            raise WeightError(
                f"Tensor '{prefix}{name}' has {found} outputs; the config asks for {list(shape)}."
            )


def _parts(tensors: Mapping[str, Tensor], name: str) -> Iterator[Tensor]:
    """The tensor, in parts where it lies so: joining them would copy it for nothing."""
    if isinstance(tensors, StackedTensors):
        yield from tensors.parts(name)
    else:
        yield tensors[name]
