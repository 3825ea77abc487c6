"""What an exit reads off hidden states, how sure it is of its logits, and which rows leave."""

from exeunt.kernels.exit_gate.decisions import GatedRows, gate_decisions, gate_rows
from exeunt.kernels.exit_gate.dispatch import ExitWeights, exit_state, gate_confidence
from exeunt.kernels.exit_gate.gate import (
    MOST_LOGITS,
    Confirmation,
    GateRule,
    NativeGate,
    exit_gate,
    native_gate,
)
from exeunt.kernels.exit_gate.judge import JudgeWeights

__all__ = [
    "MOST_LOGITS",
    "Confirmation",
    "ExitWeights",
    "GateRule",
    "GatedRows",
    "JudgeWeights",
    "NativeGate",
    "exit_gate",
    "exit_state",
    "gate_confidence",
    "gate_decisions",
    "gate_rows",
    "native_gate",
]
