"""What an exit reads off hidden states, how sure it is of its logits, and which rows leave."""

from exeunt.kernels.exit_gate.dispatch import ExitWeights, exit_state, gate_confidence
from exeunt.kernels.exit_gate.gate import GateRule, exit_gate
from exeunt.kernels.exit_gate.judge import JudgeWeights

__all__ = ["ExitWeights", "GateRule", "JudgeWeights", "exit_gate", "exit_state", "gate_confidence"]
