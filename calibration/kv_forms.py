"""Forms in which keys and values may be held, as offline quantise-dequantise functions: what attention would read.

All of them take the keys or values of one row, [tokens, kv_heads, head_dim], keys after the rotary embedding, and
return the same shape in float32. The deployed form and its twin without rotation use the arithmetic of
`exeunt.kernels.write_kv`; the paper's form needs the whole sequence before it can quantise the first token, so no
server can hold it: it is what the deployed one is held against.
"""

from dataclasses import dataclass
from typing import Final, Protocol

from torch import Tensor

from exeunt.kernels.write_kv import dequantize_heads, quantize_heads, rotate

PARAM_BYTES: Final = 4  # scale and minimum of a token's head, float16
LARGEST_CODE: Final = 7  # of the symmetric form: codes −7 to 7


class KVForm(Protocol):
    """A way to hold keys and values."""

    @property
    def name(self) -> str:
        """A short name for tables."""
        ...

    @property
    def streams(self) -> bool:
        """Whether a token can be quantised when it is written and never again."""
        ...

    def keys(self, keys: Tensor) -> Tensor:
        """What attention would read for the keys [tokens, kv_heads, head_dim] of one row: the same shape, float32."""
        ...

    def values(self, values: Tensor) -> Tensor:
        """The same for values."""
        ...

    def head_bytes(self, head_dim: int, itemsize: int, row_tokens: int) -> float:
        """Bytes of the keys, or of the values, of one token and head; `itemsize` is of the model's dtype.

        What a form holds once for a row is shared out among its `row_tokens` tokens.
        """
        ...


@dataclass(frozen=True, slots=True)
class FullKV:
    """Keys and values as they are."""

    name: str = "full"
    streams: bool = True

    def keys(self, keys: Tensor) -> Tensor:
        """The keys themselves, float32."""
        return keys.float()

    def values(self, values: Tensor) -> Tensor:
        """The values themselves, float32."""
        return values.float()

    def head_bytes(self, head_dim: int, itemsize: int, row_tokens: int) -> float:
        """Every element in the model's dtype."""
        return float(head_dim * itemsize)


@dataclass(frozen=True, slots=True)
class TokenInt4:
    """Asymmetric INT4 per token and head; keys rotated by the Hadamard matrix while they are held, where `rotated`.

    Queries are rotated with the keys, which leaves scores as they are, so that turning the keys back here says the same
    (QuaRot, arXiv 2404.00456). Values are not rotated in either form.
    """

    name: str
    rotated: bool
    streams: bool = True

    def keys(self, keys: Tensor) -> Tensor:
        """The keys, quantised in the rotated basis where there is one, in their own basis."""
        if not self.rotated:
            return _through_int4(keys)
        return rotate(_through_int4(rotate(keys)))  # the matrix is its own inverse

    def values(self, values: Tensor) -> Tensor:
        """The values, quantised."""
        return _through_int4(values)

    def head_bytes(self, head_dim: int, itemsize: int, row_tokens: int) -> float:
        """Half a byte an element, a scale and a minimum."""
        return head_dim / 2 + PARAM_BYTES


@dataclass(frozen=True, slots=True)
class ChannelInt4:
    """Symmetric INT4 with a scale for every channel of every head over the whole row (arXiv 2604.11501).

    Scales are the largest magnitude over `LARGEST_CODE`, in float16 as they would be stored.
    """

    name: str
    streams: bool = False

    def keys(self, keys: Tensor) -> Tensor:
        """The keys, each channel rounded to multiples of its scale."""
        return self._through(keys)

    def values(self, values: Tensor) -> Tensor:
        """The values, each channel rounded to multiples of its scale."""
        return self._through(values)

    def head_bytes(self, head_dim: int, itemsize: int, row_tokens: int) -> float:
        """Half a byte an element, and the row's share of a float16 scale a channel."""
        return head_dim / 2 + 2 * head_dim / row_tokens

    def _through(self, x: Tensor) -> Tensor:
        x = x.float()
        scale = (x.abs().amax(0) / LARGEST_CODE).half().float()
        codes = (x / scale.where(scale > 0, 1.0)).round_().clamp_(-LARGEST_CODE, LARGEST_CODE)
        return codes.mul_(scale)


def _through_int4(x: Tensor) -> Tensor:
    return dequantize_heads(*quantize_heads(x.float()))


FULL: Final = FullKV()
DEPLOYED: Final = TokenInt4("INT4, keys rotated", rotated=True)
UNROTATED: Final = TokenInt4("INT4, no rotation", rotated=False)
PER_CHANNEL: Final = ChannelInt4("INT4 per channel")
FORMS: Final[tuple[KVForm, ...]] = (DEPLOYED, UNROTATED, PER_CHANNEL)
"""The forms that are compared with full keys and values; the first is what the server holds."""
