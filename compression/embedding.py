"""What stands before the first block and behind the last: embeddings and final norm."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from exeunt.compression.norm import Norm


@dataclass(frozen=True, slots=True)
class Embedding:
    """The tensors outside the blocks but for the output matrix, which is a linear like any other."""

    tokens: Tensor  # [vocab, hidden]
    positions: Tensor | None  # [max positions, hidden], learned positions (GPT-2)
    final_norm: Norm

    def embed(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        """[tokens, hidden] of int64 token ids and positions [tokens]."""
        hidden = F.embedding(token_ids, self.tokens)
        return hidden if self.positions is None else hidden.add_(F.embedding(positions, self.positions))

    @property
    def nbytes(self) -> int:
        """Bytes of the matrices."""
        return self.tokens.nbytes + (self.positions.nbytes if self.positions is not None else 0)
