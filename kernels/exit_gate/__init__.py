"""What an exit reads off hidden states, how sure it is of its logits, and which rows leave."""

from exeunt.kernels.exit_gate.decisions import GatedRows, gate_decisions, gate_rows
from exeunt.kernels.exit_gate.dispatch import ExitWeights, exit_state, gate_confidence
from exeunt.kernels.exit_gate.gate import Confirmation, GateRule, exit_gate
from exeunt.kernels.exit_gate.judge import JudgeWeights

__all__ = [
    "Confirmation",
    "ExitWeights",
    "GateRule",
    "GatedRows",
    "JudgeWeights",
    "exit_gate",
    "exit_state",
    "gate_confidence",
    "gate_decisions",
    "gate_rows",
]
