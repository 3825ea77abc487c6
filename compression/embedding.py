"""What stands before the first block and behind the last: embeddings, final norm, output matrix."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from exeunt.compression.norm import Norm


@dataclass(frozen=True, slots=True)
class Embedding:
    """The tensors outside the blocks; `output` is `tokens` itself where the model ties them."""

    tokens: Tensor  # [vocab, hidden]
    positions: Tensor | None  # [max positions, hidden], learned positions (GPT-2)
    final_norm: Norm
    output: Tensor  # [vocab, hidden]

    def embed(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        """[tokens, hidden] of int64 token ids and positions [tokens]."""
        hidden = F.embedding(token_ids, self.tokens)
        return hidden if self.positions is None else hidden.add_(F.embedding(positions, self.positions))

    @property
    def nbytes(self) -> int:
        """Bytes of the matrices; a tied output matrix counts once."""
        matrices = [self.tokens] if self.output is self.tokens else [self.tokens, self.output]
        return sum(m.nbytes for m in matrices) + (self.positions.nbytes if self.positions is not None else 0)
