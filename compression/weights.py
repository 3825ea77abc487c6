"""A model's tensors under their canonical names, read from safetensors files one block at a time.

`CheckpointWeights` reads a Hugging Face checkpoint, `CanonicalWeights` files that already have our names (a bundle's).
The names are listed in `exeunt.compression.checkpoint_names`. Every tensor is checked as it is read: present, of the
right shape, floating point and finite.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from exeunt.compression import checkpoint_names as names
from exeunt.compression.architecture import Architecture


class WeightError(ValueError):
    """A tensor is missing, has the wrong shape or type, or holds NaN or infinity; the message names it."""


class WeightSource(Protocol):
    """Where a decoder gets its tensors. Mappings are lazy: a tensor is read when it is looked up."""

    def shared(self) -> Mapping[str, Tensor]:
        """The tensors outside the blocks, by canonical name."""
        ...

    def block(self, index: int) -> Mapping[str, Tensor]:
        """One block's tensors by canonical name without `blocks.<index>.`."""
        ...


class LazyTensors(Mapping[str, Tensor]):
    """Tensors that are read when they are looked up, and not kept."""

    def __init__(self, loaders: dict[str, Callable[[], Tensor]]) -> None:
        self._loaders = loaders

    def __getitem__(self, name: str) -> Tensor:
        return self._loaders[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._loaders)

    def __len__(self) -> int:
        return len(self._loaders)


class StackedTensors(LazyTensors):
    """Lazy tensors that may lie in parts, one on top of the other: whoever copies them anyway need not join them first.

    Joined for a look-up, the parts of a large tensor would stand in memory beside the copy that is made of it.
    """

    def __init__(self, parts: Mapping[str, Callable[[], Iterator[Tensor]]]) -> None:
        super().__init__({name: partial(_joined, each) for name, each in parts.items()})
        self._parts = parts

    def parts(self, name: str) -> Iterator[Tensor]:
        """The parts of `name`, the first outputs' first, each read when its turn comes. Raises WeightError."""
        return self._parts[name]()


def _joined(parts: Callable[[], Iterator[Tensor]]) -> Tensor:
    first, *rest = parts()
    return torch.cat([first, *rest]) if rest else first.contiguous()


class SafetensorsFiles:
    """The tensors of several safetensors files as one set."""

    def __init__(self, files: Sequence[Path]) -> None:
        """Open `files`; WeightError where one is unreadable or two hold the same name."""
        self._handles: dict[Path, Any] = {}
        self._file_of: dict[str, Path] = {}
        for file in files:
            try:
                handle: Any = safe_open(file, framework="pt")
            except (OSError, SafetensorError) as error:
                raise WeightError(f"{file} cannot be read as safetensors: {error}") from error
            self._handles[file] = handle
            for name in handle.keys():  # noqa: SIM118 - the handle is not a mapping
                if name in self._file_of:
                    raise WeightError(
                        f"Tensor {name!r} stands in both {self._file_of[name].name} and {file.name}."
                    )
                self._file_of[name] = file

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def read(self, name: str, shape: tuple[int, ...] | None = None) -> Tensor:
        """The tensor `name`, still backed by the file: copy it before the file may change. Finite, of `shape`.

        Raises WeightError.
        """
        file = self._file_of.get(name)
        if file is None:
            raise WeightError(f"Tensor {name!r} is missing from the model's files.")
        tensor: Tensor = self._handles[file].get_tensor(name)
        if shape is not None and tuple(tensor.shape) != shape:
            raise WeightError(f"Tensor {name!r} is {list(tensor.shape)}; the config asks for {list(shape)}.")
        _check_finite(name, tensor)
        return tensor


class CheckpointWeights:
    """The weights of a Hugging Face checkpoint, fused and turned to canonical form as they are read."""

    def __init__(self, files: Sequence[Path], spec: Architecture) -> None:
        """Open the checkpoint's safetensors `files`.

        Raises WeightError where a tensor is missing or one is there that this architecture has no place for: both
        would change the model's output without a word.
        """
        self.spec = spec
        self._files = SafetensorsFiles(files)
        self._shared = names.shared_sources(spec)
        self._block = names.block_sources(spec)
        self._prefix = self._find_prefix()
        self._check_names()

    def shared(self) -> StackedTensors:
        """Embedding, final norm and output matrix by canonical name, each read when it is asked for.

        In the checkpoint's dtype and backed by its files: copy what is kept. Asking raises WeightError.
        """
        return StackedTensors(
            {name: partial(self._read, source, "") for name, source in self._shared.items()}
        )

    def block(self, index: int) -> StackedTensors:
        """One block's tensors by canonical name, without "blocks.<i>."; linears are [out, in], QKV and gate+up fused.

        Each is read when it is asked for, which raises WeightError.
        """
        prefix = names.block_prefix(self.spec, index)
        return StackedTensors(
            {name: partial(self._read, source, prefix) for name, source in self._block.items()}
        )

    def _read(self, source: names.TensorSource, prefix: str) -> Iterator[Tensor]:
        for name, shape in source.parts:
            part = self._files.read(self._name(prefix + name), shape)
            yield part.t() if source.transposed else part

    def _name(self, name: str) -> str:
        return name if name == "lm_head.weight" else self._prefix + name

    def _find_prefix(self) -> str:
        embedding = self._shared["embedding.tokens"].parts[0][0]
        prefixes = names.checkpoint_prefixes(self.spec)
        for prefix in prefixes:
            if prefix + embedding in self._files:
                return prefix
        raise WeightError(f"Tensor {prefixes[0] + embedding!r} is missing from the model's files.")

    def _check_names(self) -> None:
        expected = {self._name(name) for source in self._shared.values() for name, _ in source.parts}
        for block in range(self.spec.blocks):
            prefix = self._prefix + names.block_prefix(self.spec, block)
            expected |= {prefix + name for source in self._block.values() for name, _ in source.parts}
        for name in sorted(expected):
            if name not in self._files:
                raise WeightError(f"Tensor {name!r} is missing from the model's files.")
        for name in self._files:
            if name == "lm_head.weight" and self.spec.tied:
                self._check_tied()
            elif name not in expected and not names.is_derived(name):
                raise WeightError(
                    f"Tensor {name!r} has no place in a {self.spec.family} model as config.json describes it; "
                    "leaving it out would change the model's output."
                )

    def _check_tied(self) -> None:
        embedding = self._files.read(self._name(self._shared["embedding.tokens"].parts[0][0]))
        if not torch.equal(embedding, self._files.read("lm_head.weight")):
            raise WeightError(
                "config.json ties the output matrix to the embedding, but 'lm_head.weight' differs from it; "
                "set tie_word_embeddings to false."
            )


class CanonicalWeights:
    """Weights in safetensors files that hold canonical names already; several files count as one set."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = SafetensorsFiles(files)

    def shared(self) -> Mapping[str, Tensor]:
        """The tensors that belong to no block, by name.

        Each is read when it is asked for, which may raise WeightError.
        """
        return LazyTensors(
            {name: self._loader(name) for name in self._files if not name.startswith("blocks.")}
        )

    def block(self, index: int) -> Mapping[str, Tensor]:
        """One block's tensors by name without "blocks.<i>.": `.weight`, or `.codes`, `.scales` and `.offsets`.

        Each is read when it is asked for, which may raise WeightError; a block that is not there has no tensors.
        """
        prefix = f"blocks.{index}."
        return LazyTensors(
            {name.removeprefix(prefix): self._loader(name) for name in self._files if name.startswith(prefix)}
        )

    def _loader(self, name: str) -> Callable[[], Tensor]:
        return lambda: self._files.read(name)


def _check_finite(name: str, tensor: Tensor) -> None:
    if tensor.dtype == torch.uint8:  # INT4 codes
        return
    if not tensor.is_floating_point() or tensor.itemsize < 2:  # float8 is a quantised form without its scales
        raise WeightError(
            f"Tensor {name!r} is {tensor.dtype}; weights must be float32, bfloat16 or float16, so give the "
            "full-precision checkpoint."
        )
    if tensor.numel():
        low, high = torch.aminmax(tensor)  # both carry NaN; one pass and no copy, unlike isfinite
        if not bool(torch.isfinite(low) & torch.isfinite(high)):
            raise WeightError(
                f"Tensor {name!r} holds NaN or infinity, and every answer would; get the checkpoint's files anew, or a "
                "training step before this one."
            )
