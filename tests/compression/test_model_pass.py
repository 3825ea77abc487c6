"""A pass in one native call against the same pass a stage at a time: the same bits, whatever leaves and joins where."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from exeunt.compression.linear import Int4Linear
from exeunt.compression.model_pass import ModelPass
from exeunt.compression.variant import KVFormat
from exeunt.kernels.int4_linear import quantize
from exeunt.kernels.model_pass import AtExit
from exeunt.kernels.native.library import native_library
from tests.compression.staged_pass import ALL, STEP, Case, changed, compared, prepared, random_exits
from tests.compression.test_native_blocks import a_decoder

pytestmark = pytest.mark.skipif(
    native_library() is None, reason="needs the native kernels (a C++ compiler, and EXEUNT_NATIVE not 0)"
)


@pytest.mark.parametrize("linear_block", [False, True])
@pytest.mark.parametrize("int4", [False, True])
@pytest.mark.parametrize("format", ["full", "int4"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "qwen3"])
def test_a_pass_has_the_bits_of_its_stages(
    name: str, format: KVFormat, int4: bool, linear_block: bool, tmp_path: Path
) -> None:
    decoder = a_decoder(name, tmp_path, torch.float32, int4, linear_block)
    assert 0 < sum(compared(decoder, format, STEP).logits_of[:2]) < len(STEP) - 2
    assert compared(decoder, format, changed(STEP, 0.0)).logits_of[0] > 0
    assert compared(decoder, format, changed(STEP, 2.0)).logits_of[:2] == [0, 0]
    assert compared(decoder, format, [replace(case, asks=0) for case in STEP]).ends_piece == [0, 0]
    compared(decoder, format, [replace(case, asks=0) for case in STEP], ())
    compared(decoder, format, ALL)
    everyone = compared(decoder, format, changed(ALL, 0.0))
    assert -1 in everyone.stopped  # what waited where its row did not come by
    compared(decoder, format, changed(ALL, 2.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_pass_in_16_bits_has_the_bits_of_its_stages(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    decoder = a_decoder(name, tmp_path, dtype, False, False)
    for cases in (STEP, ALL):
        for threshold in (0.0, 0.5, 2.0):
            compared(decoder, "full", changed(cases, threshold))
            compared(decoder, "int4", changed(cases, threshold))


@pytest.mark.parametrize("seed", range(6))
def test_any_rows_have_the_bits_of_their_stages(seed: int, tmp_path: Path) -> None:
    decoder = a_decoder("llama", tmp_path, torch.float32, False, True)
    g = np.random.default_rng(seed)
    for _ in range(8):
        cases = []
        for _ in range(int(g.integers(1, 14))):
            new, waiting = (
                int(g.integers(0, 4)),
                {n: int(g.integers(1, 3)) for n in (1, 2) if g.random() < 0.4},
            )
            if not (new or waiting):
                new = 1
            kind, asks = AtExit(int(g.integers(0, 3))), int(g.integers(0, 4)) * (new > 0)
            cases.append(Case(new, waiting, asks, float(g.uniform(0.2, 0.9)), kind, int(g.integers(0, 4))))
        compared(decoder, "int4" if g.random() < 0.5 else "full", cases)


def test_exits_may_read_another_form_of_the_output_matrix(tmp_path: Path) -> None:
    decoder = a_decoder("llama", tmp_path, torch.float32, False, False)
    weight = torch.randn(decoder.spec.vocab_size, decoder.spec.hidden_size)
    decoder.let_exits_read(Int4Linear(quantize(weight, 8)))
    assert sum(compared(decoder, "full", STEP).logits_of[:2]) > 0


def test_nothing_is_drawn_where_nobody_asks(tmp_path: Path) -> None:
    decoder = a_decoder("llama", tmp_path, torch.float32, False, False)
    made = prepared(decoder, "full", STEP, None)
    whole = ModelPass.of(decoder, random_exits(decoder))
    assert whole is not None
    assert whole.run(made.states, made.native, made.held.pages).drawn is None
