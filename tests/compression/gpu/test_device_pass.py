"""A pass whose exits the device decides: to the bit what asking each exit and taking its rows out gives."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from exeunt.compression.decode_graphs import DecodeGraphs
from exeunt.compression.decoder import Decoder
from exeunt.compression.graph_pool import Captured
from exeunt.compression.variant import KVFormat
from exeunt.kernels.model_pass import AtExit
from tests.compression.fake_graphs import FakePool
from tests.compression.gpu.exit_forms import Form
from tests.compression.gpu.prepared_pass import check_pass
from tests.compression.gpu.test_gpu_block import _decoder
from tests.compression.staged_pass import ALL, STEP, Case
from tests.kernels.triton.on_gpu import HERE, on_gpu_only

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # as in test_gpu_block

FEW = (  # of each kind one: more takes Triton's interpreter long
    Case(asks=3, threshold=0.5),
    Case(new=2, wanted=0),
    Case(waiting={1: 1, 2: 1}, asks=3, threshold=0.5, at_exit=AtExit.WAITS, wanted=3),
    Case(waiting={2: 1}, asks=1, threshold=0.5, at_exit=AtExit.STAYS, wanted=2),
    Case(asks=2, threshold=0.5),
    Case(new=0, waiting={1: 1}, at_exit=AtExit.STAYS),
    Case(asks=1, threshold=0.5, at_exit=AtExit.WAITS),
)


class _Once(FakePool):
    """Runs what it captures once, and not twice: the interpreter takes seconds for each time."""

    def _record(self, run: Callable[[], Any]) -> Captured[Any]:
        made = list(run())

        def replay() -> None:
            made[:] = run()

        return Captured(replay, made, 0)


def _capture(decoder: Decoder) -> None:
    """Have it run in graphs; in such as only do the same again where there is no GPU."""
    if decoder.device.type == "cuda":
        assert decoder.capture(64) is not None
        return
    assert decoder._rope is not None
    decoder._rope.reserve(512)
    decoder._graphs = DecodeGraphs(decoder._blocks, 64, _Once())


@pytest.mark.parametrize(
    ("cases", "forms", "weights", "kv"),
    [
        (FEW, ("listed", "whole"), "int4", "int4"),
        on_gpu_only(ALL, ("whole", "whole"), "full", "full"),
        on_gpu_only(ALL, ("confirmed", "listed"), "int4", "full"),
        on_gpu_only(ALL, ("listed", "confirmed"), "full", "int4"),
        on_gpu_only(STEP, ("confirmed", "whole"), "int4", "int4"),
        on_gpu_only([case for case in ALL if not case.asks], ("whole", "whole"), "int4", "int4"),
        on_gpu_only(STEP[:1], ("whole", "whole"), "int4", "int4"),
    ],
)
def test_a_pass_of_the_device_is_the_one_that_asks(
    tmp_path: Path,
    device: torch.device,
    cases: Sequence[Case],
    forms: tuple[Form, Form],
    weights: str,
    kv: KVFormat,
) -> None:
    decoder = _decoder("llama", tmp_path, device, torch.bfloat16, weights, num_hidden_layers=3)
    shares = (0.0, 0.1, 0.3, 0.6, 0.9) if HERE else (0.6,)
    check_pass(decoder, kv, forms, cases, shares=shares, rounds=1 + HERE, capture=_capture)
