"""What an exit reads off hidden states, and how sure it is of its logits."""

from exeunt.kernels.exit_gate.dispatch import ExitWeights, exit_state, gate_confidence

__all__ = ["ExitWeights", "exit_state", "gate_confidence"]
