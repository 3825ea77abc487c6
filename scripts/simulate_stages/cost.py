"""What a stage costs: bytes over bandwidth or operations over peak, whichever is more, and its kernel launches."""

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Machine:
    """A GPU. `bandwidth` (bytes/s) and `peak` (operations/s) are what kernels achieve, not what the data sheet says."""

    name: str
    memory: float  # bytes
    bandwidth: float
    peak: float
    launch_s: float  # per kernel, within a captured graph


@dataclass(frozen=True, slots=True)
class Model:
    """The sizes of a decoder that its costs follow from. `width` is heads × head size."""

    name: str
    blocks: int
    block_parameters: float
    head_parameters: float  # output matrix: the model's own head and every exit's projection
    gate_parameters: float  # adapter and probe of an exit, read in bf16
    kv_share: float  # of a block's parameters, its K and V projections
    width: int
    kernels_per_block: int = 5
    kernels_per_part: int = 3  # of a head, a gate, a projection, or a propagation

    @property
    def parameters(self) -> float:
        return self.blocks * self.block_parameters + self.head_parameters


@dataclass(frozen=True, slots=True)
class Formats:
    """Bytes per weight, and KV bytes per token over all blocks."""

    name: str
    weight_bytes: float
    kv_bytes: float


H200: Final = Machine("H200", 141e9, 0.85 * 4.8e12, 0.6 * 990e12, 1.3e-6)
MISTRAL_7B: Final = Model(
    "Mistral-7B",
    blocks=32,
    block_parameters=2 * 4096 * (4096 + 1024) + 3 * 4096 * 14336,
    head_parameters=32000 * 4096,
    gate_parameters=4096 * (4096 + 64),
    kv_share=2 * 1024 / (2 * (4096 + 1024) + 3 * 14336),
    width=4096,
)
KV_BYTES: Final = 32 * 2 * 1024 * 2.0  # bf16 K and V of 8 heads of 128, in 32 blocks
BF16: Final = Formats("bf16", 2.0, KV_BYTES)
INT4: Final = Formats("int4", 4.2e9 / MISTRAL_7B.parameters, KV_BYTES / 3.6)  # codes, scales and offsets
EXIT_WEIGHT_BYTES: Final = INT4.weight_bytes  # exits read the output matrix in INT4 in every variant


@dataclass(frozen=True, slots=True)
class StageCosts:
    """Seconds of the parts of a pass of `model`, cut behind `depth` blocks by an exit, at a context of so many tokens.

    `host_s` is what each run of a stage costs beside the device: the copy back that says who left, and planning.
    """

    machine: Machine
    model: Model
    formats: Formats
    context: int
    depth: int
    host_s: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.depth < self.model.blocks:
            raise ValueError(
                f"an exit after {self.depth} blocks does not cut a model of {self.model.blocks} blocks"
            )

    @property
    def most_sequences(self) -> int:
        """How many sequences of this context fit into memory beside the weights."""
        free = self.machine.memory - self.model.parameters * self.formats.weight_bytes
        return int(free // (self.context * self.formats.kv_bytes))

    def full(self, rows: float) -> float:
        """A step of `rows` sequences with exits off."""
        return self._blocks(self.model.blocks, rows, rows) + self._head(rows) + self.host_s

    def shallow(self, rows: float, asked: float, projected: float) -> float:
        """The blocks in front of the exit for one token a row; its gate for `asked` rows, its projection for
        `projected`."""
        seconds = self._blocks(self.depth, rows, rows) + self.host_s
        if asked:
            seconds += self._part(2.0, self.model.gate_parameters, asked)
        if projected:
            seconds += self._part(EXIT_WEIGHT_BYTES, self.model.head_parameters, projected)
        return seconds

    def propagate(self, rows: float) -> float:
        """Keys and values of the blocks behind the exit for `rows` tokens, from their states at the exit."""
        if not rows:
            return 0.0
        model = self.model
        skipped = (model.blocks - self.depth) * model.block_parameters * model.kv_share
        return self._part(self.formats.weight_bytes, skipped, rows)

    def deep(self, rows: float, tokens: float, heads: float) -> float:
        """The blocks behind the exit for `tokens` tokens of `rows` sequences, and the own head for `heads` of them."""
        return self._blocks(self.model.blocks - self.depth, rows, tokens) + self._head(heads) + self.host_s

    def _blocks(self, blocks: int, sequences: float, tokens: float) -> float:
        """A sequence's keys and values are read once a pass, however many tokens it brings."""
        model, formats = self.model, self.formats
        parameters = blocks * model.block_parameters
        cached = sequences * self.context * formats.kv_bytes * blocks / model.blocks
        attention = 4.0 * model.width * self.context * blocks * tokens
        return self._seconds(
            parameters * formats.weight_bytes + cached,
            2.0 * parameters * tokens + attention,
            blocks * model.kernels_per_block,
        )

    def _head(self, tokens: float) -> float:
        return self._part(self.formats.weight_bytes, self.model.head_parameters, tokens)

    def _part(self, weight_bytes: float, parameters: float, tokens: float) -> float:
        return self._seconds(
            weight_bytes * parameters, 2.0 * parameters * tokens, self.model.kernels_per_part
        )

    def _seconds(self, read: float, operations: float, kernels: int) -> float:
        machine = self.machine
        return max(read / machine.bandwidth, operations / machine.peak) + kernels * machine.launch_s
