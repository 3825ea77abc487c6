"""The operators that stand for kernels do what those do: a row's bits know no company, and plain PyTorch is near."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import exeunt.kernels.gpu
import exeunt.kernels.native.library
from exeunt.compression.variant import KVFormat
from exeunt.kernels.token_draw import draw_tokens
from exeunt.kernels.token_draw.scores import truncate_scores
from tests.compression.gpu.exit_forms import FORMS, Form, exit_of_form
from tests.compression.gpu.test_gpu_block import MODELS, TEXT, _decoder, _states
from tests.compression.stand_in_kernels import install_stand_ins

FORMATS: tuple[tuple[str, KVFormat], ...] = (("full", "full"), ("int4", "int4"))
CPU = torch.device("cpu")
LENGTH = TEXT.shape[1]


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="needs the package triton")
    install_stand_ins(monkeypatch)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("weights", "kv"), FORMATS)
def test_blocks_do_what_single_operations_do(
    name: str, weights: str, kv: KVFormat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunks = [7, 1, LENGTH - 8]
    decoder = _decoder(name, tmp_path, CPU, torch.float32, weights, True)
    assert decoder.native_blocks is None
    fused = _states(decoder, kv, [*TEXT], chunks)
    monkeypatch.setattr(exeunt.kernels.gpu, "interpreted", False)
    wanted = _states(_decoder(name, tmp_path, CPU, torch.float32, weights, True), kv, [*TEXT], chunks)
    error = (fused - wanted).norm() / wanted.norm()
    assert (
        0 < error < (2e-5 if kv == "full" else 2e-2)
    )  # with INT4 a rounding the other way moves a code by one


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("weights", "kv"), FORMATS)
def test_a_state_does_not_depend_on_company_or_chunks(
    name: str, weights: str, kv: KVFormat, tmp_path: Path
) -> None:
    decoder = _decoder(name, tmp_path, CPU, torch.bfloat16, weights)
    together = _states(decoder, kv, [*TEXT], [LENGTH])
    alone = torch.cat([_states(decoder, kv, [row], [5, 1, 1, LENGTH - 7]) for row in TEXT])
    assert torch.equal(together, alone)


@pytest.mark.parametrize("form", FORMS)
def test_a_gate_says_of_each_row_what_it_says_of_it_alone(
    form: Form, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = _decoder("llama", tmp_path, CPU, torch.bfloat16, "full")
    head = exit_of_form(decoder, 1, form, seed=8, units=9, listed=105)
    state = torch.randn(11, decoder.spec.hidden_size, generator=torch.Generator().manual_seed(1)).bfloat16()
    with torch.inference_mode():
        sure = head.gate(state, torch.zeros(11), decoder.project_exit).confidence
        thresholds = torch.full((11,), float(sure.quantile(0.5)))
        thresholds[3] = torch.inf
        together = head.gate(state, thresholds, decoder.project_exit)
        for row in range(len(state)):
            alone = head.gate(state[row : row + 1], thresholds[row : row + 1], decoder.project_exit)
            assert torch.equal(alone.confidence[0], together.confidence[row])
            assert torch.equal(alone.leaves[0], together.leaves[row])
        monkeypatch.setattr(exeunt.kernels.gpu, "interpreted", False)
        plain = head.gate(state, thresholds, decoder.project_exit)
    assert 0 < int(together.leaves.sum()) < 10
    torch.testing.assert_close(
        together.confidence, plain.confidence, rtol=0.05, atol=0.05
    )  # of bfloat16 logits


def test_draws_say_of_each_row_what_they_say_of_it_alone() -> None:
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(9, 300, generator=generator) * 4
    temperatures = torch.tensor([0.0, 0.7, 1.3] * 3)
    keys = torch.randint(-(2**31), 2**31, (9, 2), generator=generator).int()
    token_keys = torch.randint(-(2**31), 2**31, (300,), generator=generator).int()
    top_k, top_p = torch.tensor([0, 5, 40] * 3).int(), torch.tensor([1.0, 0.9, 0.5] * 3)

    def drawn(logits: Tensor, temperatures: Tensor, keys: Tensor) -> tuple[Tensor, ...]:
        return draw_tokens(logits, logits, temperatures, keys, token_keys)

    def cut(*rows: Tensor) -> tuple[Tensor, ...]:
        return (truncate_scores(*rows),)

    _same_alone(drawn, logits, temperatures, keys)
    _same_alone(cut, logits, temperatures, top_k, top_p)


def _same_alone(function: Callable[..., tuple[Tensor, ...]], *rows: Tensor) -> None:
    together = function(*rows)
    for row in range(len(rows[0])):
        alone = function(*(each[row : row + 1] for each in rows))
        for one, all_ in zip(alone, together, strict=True):
            assert torch.equal(one[0], all_[row])
