"""Graphs without a GPU, strictly: a capture records operators, and a replay runs those over the same memory.

`FakePool` runs the Python again, and so forgives what a GPU does not. Here

- a capture computes nothing: what it writes to tensors that were there before is undone, what it makes holds NaN;
- a capture refuses what waits for the device or takes something from the host, and shapes that depend on values;
- a replay reads and writes the memory of the capture. What was there before is known by a weak reference to its
  storage, for a graph keeps nothing alive, and a replay over memory that was freed fails;
- what a graph leaves in scratch is overwritten around each replay, as other graphs of the pool would overwrite it;
- what Python looks up, counts or decides happens once.

It knows nothing of streams, of copies that are still under way, or of what memory is the host's: all of it is.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from exeunt.compression.graph_pool import Captured, GraphPool
from tests.compression.fake_graphs import GROWN, TOTAL

_HOST_READS: Final = frozenset({Tensor.tolist, Tensor.numpy, Tensor.cpu, Tensor.__array__, Tensor.pin_memory})
"""What waits for a GPU and is no operator on a CPU."""
_HOST_NUMBERS: Final = frozenset({torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor})
"""What copies numbers of the host to a GPU."""
_OF_VALUES: Final = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
_INDEXED: Final = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")
_LIFTED: Final = "aten::lift_fresh"  # what Python's numbers become tensors by, in an index for one
_UNWRITTEN: Final = ("aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty")


class RecordingError(RuntimeError):
    """What a graph cannot hold, or a graph that reads what is not there any more."""


class RecordedPool(GraphPool):
    """Records on the CPU; `refused` says what was wrong with captures and replays, of which it counts both.

    A capture that is refused runs without a graph, as everywhere: whoever uses the pool looks at `refused`.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        """`device` is not looked at: the pool may stand where a GPU's is made."""
        super().__init__(torch.device("cpu"))
        self.refused: list[str] = []
        self.captures = self.replays = 0

    def computed_nothing(self, result: Any) -> None:
        """A capture has ended and left this `result`: for a test to look at."""

    def _memory(self) -> tuple[int, int]:
        return TOTAL, TOTAL

    def _record(self, run: Callable[[], Any]) -> Captured[Any]:
        with torch.inference_mode(), _telling(self.refused):
            run()  # as on a GPU: what is made once is made here
            recorder = _Recorder()
            with recorder, _NoHostValues():
                result = run()
            graph = _Graph(recorder, result)
            self.computed_nothing(result)
            graph.replay()  # as on a GPU: a first launch belongs to the capture
        self.captures += 1

        def replay() -> None:
            with torch.inference_mode(), _telling(self.refused):
                graph.replay()
            self.replays += 1

        return Captured(replay, result, GROWN)


@contextmanager
def _telling(told: list[str]) -> Iterator[None]:
    """Note what was wrong: others catch the error and go on without a graph."""
    try:
        yield
    except RuntimeError as error:
        told.append(str(error))
        raise


@dataclass(frozen=True, slots=True)
class _Outside:
    """A tensor that was there before the capture: where it lies, and no more of it than a weak reference."""

    storage: StorageWeakRef
    dtype: torch.dtype
    geometry: tuple[int, tuple[int, ...], tuple[int, ...]]  # offset, shape and strides, in elements

    @classmethod
    def of(cls, tensor: Tensor) -> "_Outside":
        geometry = (int(tensor.storage_offset()), tuple(tensor.shape), tuple(tensor.stride()))
        return cls(StorageWeakRef(tensor.untyped_storage()), tensor.dtype, geometry)

    def found(self) -> Tensor:
        """The tensor as it is now. Raises RecordingError where its memory is free."""
        if self.storage.expired():
            offset, shape, _ = self.geometry
            raise RecordingError(
                f"a replay reads memory that was freed: {list(shape)} {self.dtype} at {offset}"
            )
        storage = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        return torch.empty(0, dtype=self.dtype).set_(storage, *self.geometry)


@dataclass(frozen=True, slots=True)
class _Place:
    """Stands in an operator's arguments for one of the tensors from outside."""

    index: int


@dataclass(frozen=True, slots=True)
class _Step:
    """One operator of a graph."""

    operator: Any
    args: Any
    kwargs: Any
    made: list[Tensor | None]  # where each tensor that it returns is left; None for those that were there

    def run(self, outside: Sequence[Tensor]) -> None:
        """Do it again, and leave what it makes where the capture had it."""
        found = self.operator(*_real(self.args, outside), **_real(self.kwargs, outside))
        for kept, again in zip(self.made, _tensors(found), strict=True):
            if kept is not None:
                kept.copy_(again)


class _Recorder(TorchDispatchMode):
    """Notes the operators that run, and takes back what they do."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[_Step] = []
        # what the capture allocates, by address: held, so that no address is given out twice
        self.made: dict[int, Tensor] = {}
        self._numbers: dict[int, Tensor] = {}  # what a GPU's operators are given as single numbers
        self.outside: dict[Any, _Outside] = {}
        self._places: dict[Any, _Place] = {}

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with self:
            parts = operator.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
        _check_recordable(operator, args)
        if operator._schema.name == _LIFTED:
            return self._numbers.setdefault(_address(args[0]), args[0])
        written = _written(operator, args, kwargs)
        undone = [(each, each.clone()) for each in written if not self._is_made_here(each)]
        with torch._C.DisableTorchFunction():
            found = operator(*args, **kwargs)
        self._note(operator, args, kwargs, found, bool(written))
        for each, before in undone:
            each.copy_(before)
        return found

    def _note(self, operator: Any, args: Any, kwargs: Any, found: Any, writes: bool) -> None:
        """Keep the operator, unless it makes and writes nothing: a view is where it is."""
        read = self._spec(args), self._spec(kwargs)
        there = {_address(each) for each in (*_tensors(args), *_tensors(kwargs))} | self.made.keys()
        made = [each if each.numel() and _address(each) not in there else None for each in _tensors(found)]
        self.made |= {_address(each): each for each in made if each is not None}
        unwritten = operator._schema.name in _UNWRITTEN
        if writes or (any(each is not None for each in made) and not unwritten):
            self.steps.append(_Step(operator, *read, made))

    def _is_made_here(self, tensor: Tensor) -> bool:
        return _address(tensor) in self.made

    def _spec(self, value: Any) -> Any:
        """An operator's arguments, with places in them for tensors from outside."""
        if isinstance(value, Tensor):
            own = not value.numel() or self._is_made_here(value) or _address(value) in self._numbers
            return value if own else self._place(_Outside.of(value))
        if isinstance(value, tuple | list):
            return type(value)(self._spec(each) for each in value)
        if isinstance(value, dict):
            return {name: self._spec(each) for name, each in value.items()}
        return value

    def _place(self, found: _Outside) -> _Place:
        key = (found.storage.cdata, found.dtype, found.geometry)
        if key not in self._places:  # the first to be met is kept, and with it the meaning of `cdata`
            self.outside[key] = found
            self._places[key] = _Place(len(self._places))
        return self._places[key]


class _NoHostValues(TorchFunctionMode):
    """Refuses what takes values from a tensor to Python, or from Python to a tensor."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function in _HOST_READS:
            raise _not_permitted(f"{function.__name__} waits for the device")
        if function in _HOST_NUMBERS:
            raise _not_permitted(f"{function.__name__} copies numbers of the host")
        return function(*args, **(kwargs or {}))


class _Graph:
    """What a capture recorded."""

    def __init__(self, recorder: _Recorder, result: Any) -> None:
        kept = {_address(each) for each in _tensors(result)}
        self._steps, self._outside = recorder.steps, list(recorder.outside.values())
        self._made = [_whole(each) for each in recorder.made.values()]
        self._scratch = [_whole(each) for place, each in recorder.made.items() if place not in kept]
        _poison(self._made)

    def replay(self) -> None:
        """Run the operators over the same memory; raises RecordingError where some of it is not there any more."""
        outside = [each.found() for each in self._outside]
        _poison(self._made)
        for step in self._steps:
            step.run(outside)
        _poison(self._scratch)


def _check_recordable(operator: Any, args: tuple[Any, ...]) -> None:
    """Raise RecordingError where a graph cannot hold the operator."""
    name = operator._schema.name
    if name == _LIFTED and args[0].dim():
        raise _not_permitted("a list of numbers is copied from the host")
    if name in _INDEXED:  # their shape depends on values only where a mask says what is taken
        if any(each.dtype in (torch.bool, torch.uint8) for each in _tensors(args[1])):
            raise _not_permitted(f"{operator} by a mask has a shape that depends on values")
    elif any(tag in operator.tags for tag in _OF_VALUES):
        raise _not_permitted(f"{operator} depends on values")


def _not_permitted(what: str) -> RecordingError:
    return RecordingError(f"operation not permitted when stream is capturing: {what}")


def _written(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The arguments that an operator's schema says it writes to."""
    found = []
    for place, argument in enumerate(operator._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = kwargs.get(argument.name, args[place] if place < len(args) else None)
            found += list(_tensors(value))
    return found


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for each in value:
            yield from _tensors(each)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _real(value: Any, outside: Sequence[Tensor]) -> Any:
    """Arguments with what stands in their places."""
    if isinstance(value, _Place):
        return outside[value.index]
    if isinstance(value, tuple | list):
        return type(value)(_real(each, outside) for each in value)
    if isinstance(value, dict):
        return {name: _real(each, outside) for name, each in value.items()}
    return value


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _whole(tensor: Tensor) -> Tensor:
    """All of the memory that a tensor lies in."""
    count = tensor.untyped_storage().nbytes() // tensor.element_size()
    return tensor.as_strided((count,), (1,), 0)


def _poison(tensors: Sequence[Tensor]) -> None:
    """Have whoever reads them show: NaN, true, or numbers that are no index of anything."""
    for each in tensors:
        if each.is_floating_point():
            each.fill_(torch.nan)
        else:
            each.fill_(1 if each.dtype == torch.bool else torch.iinfo(each.dtype).max // 2)
