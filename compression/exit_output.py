"""The output matrix as a model's exits read it: the whole of it, and the few rows that are looked at first."""

from dataclasses import dataclass, field
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from exeunt.compression.linear import Linear
from exeunt.compression.native_matrix import NotNativeError, native_matrix
from exeunt.compression.row_graphs import StepGraphs
from exeunt.kernels.native.descriptors import Matrix


@dataclass(frozen=True, slots=True)
class Shortlist:
    """Tokens whose logits an exit looks at first: ids [S] int64, ascending, each once, at least two.

    Raises ValueError for others.
    """

    ids: Tensor
    key: bytes = field(init=False, repr=False)  # the same for the same tokens, wherever they lie

    def __post_init__(self) -> None:
        ids = self.ids
        if ids.dtype != torch.int64 or ids.dim() != 1 or len(ids) < 2:
            raise ValueError(
                f"a shortlist is {list(ids.shape)} {ids.dtype}, it must be [at least 2] torch.int64"
            )
        if int(ids[0]) < 0 or not bool((ids[1:] > ids[:-1]).all()):
            raise ValueError("a shortlist's tokens must ascend from 0 or above, each once")
        object.__setattr__(self, "key", ids.cpu().numpy().tobytes())

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device: torch.device | str) -> "Shortlist":
        """The same on `device`."""
        return Shortlist(self.ids.to(device))


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class ExitOutput:
    """Maps an exit's states [K, hidden] to logits [K, vocab] float32.

    `matrix` describes `linear` to the native gate, None where that cannot read it.
    """

    linear: Linear
    dtype: torch.dtype  # of the states
    matrix: Matrix | None = field(init=False, repr=False)
    graphs: StepGraphs | None = field(init=False, repr=False, default=None)  # see `replay_in`
    _held: list[Tensor] = field(init=False, repr=False, default_factory=list)  # what `matrix` points into
    _picked: "dict[bytes, ExitOutput]" = field(init=False, repr=False, default_factory=dict)
    _source: Linear | None = field(
        init=False, repr=False, default=None
    )  # what a shortlist's rows were taken from

    def __post_init__(self) -> None:
        try:
            matrix = native_matrix(self.linear, self.dtype, self._held)
        except NotNativeError:
            matrix = None
        object.__setattr__(self, "matrix", matrix)

    def __call__(self, state: Tensor) -> Tensor:
        return self.linear(state).float()

    def captured(self, state: Tensor) -> Tensor:
        """The same logits, by a captured graph where there is one."""
        if self.graphs is not None:
            key = ("an exit's projection", id(self.linear))
            found = self.graphs.run(key, lambda state: (self(state),), state)
            if found is not None:
                return found[0].clone()
        return self(state)

    def replay_in(self, graphs: StepGraphs | None) -> None:
        """Have gates and projections of few rows run as graphs from now on, or, with None, no longer."""
        object.__setattr__(self, "graphs", graphs)

    def only(self, shortlist: Shortlist) -> "ExitOutput":
        """The same for the tokens of `shortlist` alone: logits [K, S], with the native kernels bit for bit the whole
        one's. All exits and variants that read one matrix share the copy of its rows.

        Raises ValueError where the shortlist names a token that the matrix has no row for.
        """
        found = self._picked.get(shortlist.key)
        if found is None:
            found = self._picked[shortlist.key] = self._shared(shortlist)
        return found

    @property
    def shortlist_bytes(self) -> int:
        """Bytes of the rows copied for shortlists so far."""
        return sum(picked.linear.nbytes for picked in self._picked.values())

    def _shared(self, shortlist: Shortlist) -> "ExitOutput":
        place = (id(self.linear), self.dtype, shortlist.key)
        found = _SHORTLISTED.get(place)
        if found is None:
            ids = shortlist.ids
            if int(ids[-1]) >= self.linear.out_features:
                raise ValueError(
                    f"the shortlist names token {int(ids[-1])}, the output matrix has {self.linear.out_features}"
                )
            found = ExitOutput(self.linear.pick(ids), self.dtype)
            object.__setattr__(found, "_source", self.linear)  # which keeps its id from being another's
            _SHORTLISTED[place] = found
        return found


_SHORTLISTED: WeakValueDictionary[tuple[int, torch.dtype, bytes], ExitOutput] = WeakValueDictionary()
