"""A pass through one decoder with its exits: on a CPU one native call, and the head where that has none."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from exeunt.compression.decoder import Decoder
from exeunt.compression.exit_output import ExitOutput
from exeunt.compression.exits import ExitHead
from exeunt.compression.kv_format import KVPages
from exeunt.compression.norm import Norm
from exeunt.kernels.blocks import PageRange
from exeunt.kernels.model_pass import MOST_EXITS, NativePass, PassBatch, Passed
from exeunt.kernels.native.descriptors import Matrix


@dataclass(frozen=True, slots=True)
class ModelPass:
    """What takes tokens through the whole of one decoder; `of` says where there is such."""

    decoder: Decoder
    native: NativePass
    _outputs: tuple[ExitOutput, ExitOutput]  # keep alive what the native head points into, and the gates
    _exits: tuple[ExitHead, ...]
    _stages: tuple[tuple[int, int], ...]  # the first block of each and one past its last

    @classmethod
    def of(cls, decoder: Decoder, exits: Sequence[ExitHead]) -> "ModelPass | None":
        """The pass over a decoder's blocks with these exits; None where the native kernels cannot run all of it."""
        blocks = decoder.native_blocks
        other = any(type(head) is not ExitHead for head in exits)  # another class has a gate of its own
        if blocks is None or other or len(exits) > MOST_EXITS:
            return None
        project = decoder.project_exit
        gates = [(head.depth, head.native_gate(project)) for head in exits]
        known = tuple((depth, gate) for depth, gate in gates if gate is not None)
        if len(known) < len(gates) or any(gate.dtype != decoder.dtype for _, gate in known):
            return None
        embedding = decoder.embedding.tokens, decoder.embedding.positions
        if not all(table is None or table.is_contiguous() for table in embedding):
            return None
        output = ExitOutput(decoder.output, decoder.dtype)
        head = _head(decoder.final_norm, output)
        native = NativePass(embedding, blocks, known, head, decoder.output.out_features)
        bounds = (0, *(depth for depth, _ in known), decoder.spec.blocks)
        return cls(decoder, native, (output, project), tuple(exits), tuple(pairwise(bounds)))

    def takes(self, batch: PassBatch, pages: KVPages) -> bool:
        """Whether a batch can pass at once over these pages."""
        places = self._places(pages)
        return places is not None and self.native.blocks.takes(places) and self.native.takes(batch)

    def run(self, states: Tensor, batch: PassBatch, pages: KVPages) -> Passed:
        """Take tokens through all blocks; `states` [T, hidden] is overwritten; see `NativePass.run`.

        Raises ValueError for pages that it does not take.
        """
        decoder, places = self.decoder, self._places(pages)
        if places is None:
            raise ValueError("the native kernels do not take these pages")
        passed = self.native.run(states, batch, places, decoder.rotation_table(batch.max_context))
        asked = passed.logits_of[-1]
        if self.native.head is None and asked:
            passed.logits[-asked:] = decoder.head(states[passed.with_logits[-asked:]])
        self._count(passed)
        return passed

    def _places(self, pages: KVPages) -> PageRange | None:
        return pages.native(0, self.decoder.spec.blocks)

    def _count(self, passed: Passed) -> None:
        """Count the calls of blocks as if stage after stage had been called."""
        calls = self.decoder.block_calls
        for tokens, (start, stop) in zip(passed.tokens, self._stages, strict=True):
            if tokens:
                calls.count(start, stop, tokens)


def _head(norm: Norm, output: ExitOutput) -> tuple[Tensor, Matrix] | None:
    """The model's head as the native pass takes it."""
    fits = norm.weight.dtype == output.dtype and norm.weight.is_contiguous()
    if norm.kind != "rms" or output.matrix is None or not fits:
        return None
    return norm.weight, output.matrix
