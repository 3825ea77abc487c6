"""A tensor that was left on another device is refused before a kernel takes its address for one of its own."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from exeunt.kernels.exit_gate.decisions import gate_decisions
from exeunt.kernels.exit_gate.dispatch import ExitWeights, exit_state, gate_confidence
from exeunt.kernels.exit_gate.gate import Confirmation, GateRule
from exeunt.kernels.exit_gate.judge import JudgeWeights
from exeunt.kernels.paged_attention import paged_attention
from exeunt.kernels.paged_batch import KVBlock, PagedBatch
from exeunt.kernels.token_draw.dispatch import draw_tokens
from exeunt.kernels.token_draw.scores import penalise_scores, truncate_scores
from exeunt.kernels.write_kv import turn_and_write_kv, write_kv

ROWS, VOCAB, UNITS, SIZE = 3, 8, 4, 6


def _judge(place: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> JudgeWeights:
    return JudgeWeights(
        (place(torch.zeros(2, UNITS)), torch.zeros(UNITS), torch.zeros(UNITS), torch.zeros(()))
    )


def _integers(*size: int) -> Tensor:
    return torch.zeros(*size, dtype=torch.int32)


def _pages() -> KVBlock:
    return KVBlock(torch.zeros(1, 1, 8, SIZE), torch.zeros(1, 1, 8, SIZE))


def _attended(queries: Tensor, positions: Tensor) -> Tensor:
    starts, tables = torch.tensor([0, ROWS], dtype=torch.int32), _integers(1, 1)
    return paged_attention(queries, _pages(), PagedBatch(positions, positions, starts, tables, ROWS), 1.0)


CALLS: dict[str, tuple[Callable[..., Any], dict[str, Tensor]]] = {
    "paged_attention": (
        _attended,
        {"queries": torch.zeros(ROWS, 2, SIZE), "positions": torch.arange(ROWS)},
    ),
    "write_kv": (
        lambda **given: write_kv(**given, block=_pages()),
        {
            "keys": torch.zeros(ROWS, 1, SIZE),
            "values": torch.zeros(ROWS, 1, SIZE),
            "slots": torch.arange(ROWS),
        },
    ),
    "turn_and_write_kv": (
        lambda **given: turn_and_write_kv(**given, block=_pages(), heads=2),
        {
            "qkv": torch.zeros(ROWS, 4, SIZE),
            "table": torch.zeros(ROWS, 2, SIZE),
            "positions": torch.arange(ROWS),
            "slots": torch.arange(ROWS),
            "head_norm": torch.ones(3, SIZE),
        },
    ),
    "draw_tokens": (
        draw_tokens,
        {
            "logits": torch.zeros(ROWS, VOCAB),
            "scores": torch.zeros(ROWS, VOCAB),
            "temperatures": torch.zeros(ROWS),
            "keys": _integers(ROWS, 2),
            "token_keys": _integers(VOCAB),
        },
    ),
    "penalise_scores": (
        penalise_scores,
        {
            "logits": torch.zeros(ROWS, VOCAB),
            "history": _integers(2),
            "starts": _integers(ROWS + 1),
            "penalties": torch.ones(ROWS),
            "eos_ids": _integers(1),
            "masks_eos": torch.zeros(ROWS, dtype=torch.bool),
        },
    ),
    "truncate_scores": (
        truncate_scores,
        {
            "scores": torch.zeros(ROWS, VOCAB),
            "temperatures": torch.zeros(ROWS),
            "top_k": _integers(ROWS),
            "top_p": torch.ones(ROWS),
        },
    ),
    "gate_confidence": (
        lambda **given: gate_confidence(**given, judge=_judge()),
        {
            "probe_logit": torch.zeros(ROWS),
            "logits": torch.zeros(ROWS, VOCAB),
            "combine": torch.zeros(4),
            "units": torch.zeros(ROWS, UNITS),
        },
    ),
    "gate_decisions": (
        lambda **given: gate_decisions(
            **given,
            rule=GateRule(torch.zeros(4), 0.5, _judge(), Confirmation(torch.zeros(4), 0.5, _judge())),
        ),
        {
            "probe_logit": torch.zeros(ROWS),
            "units": torch.zeros(ROWS, UNITS),
            "logits": torch.zeros(ROWS, VOCAB),
            "thresholds": torch.zeros(ROWS),
            "whole": torch.zeros(ROWS, VOCAB),
        },
    ),
}


@pytest.mark.parametrize(
    ("call", "name"), [(call, name) for call, (_, given) in CALLS.items() for name in given]
)
def test_each_tensor_must_be_where_the_others_are(call: str, name: str) -> None:
    function, given = CALLS[call]
    function(**given)
    with pytest.raises(ValueError, match=r"are on .*meta.*, expected one device$"):
        function(**given | {name: given[name].to("meta")})


def test_a_rules_tensors_must_be_there_too() -> None:
    given = CALLS["gate_decisions"][1]
    plain = {name: tensor for name, tensor in given.items() if name != "whole"}
    there, combine = _judge(lambda tensor: tensor.to("meta")), torch.zeros(4)
    for rule in (GateRule(combine.to("meta"), 0.5), GateRule(combine, 0.5, there)):
        with pytest.raises(ValueError, match=r"and the rule's tensors are on .*meta"):
            gate_decisions(**plain, rule=rule)
    for last in (
        Confirmation(combine.to("meta"), 0.5, _judge()),
        Confirmation(combine, 0.5, there),
    ):
        with pytest.raises(ValueError, match=r"and the rule's tensors are on .*meta"):
            gate_decisions(**given, rule=GateRule(combine, 0.5, None, last))
    with pytest.raises(ValueError, match=r"and the judge's weights are on .*meta"):
        gate_confidence(plain["probe_logit"], plain["logits"], combine, plain["units"], there)


def test_an_exits_weights_are_on_one_device_and_its_states_with_them() -> None:
    probe = (torch.zeros(UNITS, SIZE), torch.zeros(UNITS), torch.zeros(UNITS), torch.zeros(()))
    weights = ExitWeights(torch.ones(SIZE), torch.zeros(SIZE), 1e-5, torch.zeros(SIZE, SIZE), probe)
    exit_state(torch.ones(ROWS, SIZE), weights)
    with pytest.raises(
        ValueError, match=r"^hidden and the exit's weights are on meta, cpu, expected one device$"
    ):
        exit_state(torch.ones(ROWS, SIZE, device="meta"), weights)
    with pytest.raises(ValueError, match=r"^the exit's weights are on cpu, meta, "):
        ExitWeights(torch.ones(SIZE), torch.zeros(SIZE, device="meta"), 1e-5, torch.zeros(SIZE, SIZE), probe)
