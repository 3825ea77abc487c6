"""A GPU's way through decoders and engines on the CPU: operators that stand for kernels, and recorded graphs."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
import torch

import exeunt.compression.decoder
import exeunt.compression.model
from exeunt.compression.decode_graphs import DecodeGraphs
from exeunt.compression.decoder import Decoder
from exeunt.compression.row_graphs import StepGraphs
from tests.compression.recorded_graphs import RecordedPool
from tests.compression.stand_in_kernels import install_stand_ins


@dataclass
class RecordedGPU:
    """The pools that were made while it was installed."""

    pools: list[RecordedPool] = field(default_factory=list)

    @property
    def captures(self) -> int:
        """Graphs that were recorded."""
        return sum(pool.captures for pool in self.pools)

    @property
    def replays(self) -> int:
        """How often they ran."""
        return sum(pool.replays for pool in self.pools)

    @property
    def refused(self) -> list[str]:
        """What was wrong with captures and replays."""
        return [each for pool in self.pools for each in pool.refused]

    def new_pool(self, device: torch.device) -> RecordedPool:
        """A pool, which stands for one on `device`."""
        self.pools.append(RecordedPool(device))
        return self.pools[-1]


@contextmanager
def recorded_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[RecordedGPU]:
    """Have decoders on the CPU take a GPU's way, and capture graphs that are recorded, as `monkeypatch` lasts.

    At the end nothing may have been refused.
    """
    pytest.importorskip("triton", reason="needs the package triton")
    install_stand_ins(monkeypatch)
    made = RecordedGPU()
    for module in (exeunt.compression.decoder, exeunt.compression.model):
        monkeypatch.setattr(module, "GraphPool", made.new_pool)
    own = Decoder.capture

    def capture(decoder: Decoder, most_context: int, shared: StepGraphs | None = None) -> DecodeGraphs | None:
        there, decoder.device = decoder.device, torch.device("cuda")  # no other device's passes are captured
        try:
            return own(decoder, most_context, shared)
        finally:
            decoder.device = there

    monkeypatch.setattr(Decoder, "capture", capture)
    yield made
    assert not made.refused, made.refused
