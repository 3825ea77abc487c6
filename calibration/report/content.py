"""What a calibration report tells: everything that was measured and decided, before it is drawn or written."""

from collections.abc import Sequence
from dataclasses import dataclass

from exeunt.calibration.block_choice import BlockChoice
from exeunt.calibration.certificates import CertifiedVariant
from exeunt.calibration.evaluation import EvaluationTable
from exeunt.calibration.exit_fit import FittedExit
from exeunt.calibration.thresholds import ThresholdPlan
from exeunt.calibration.weights_int4 import Int4Weights
from exeunt.compression.manifest import Manifest


@dataclass(frozen=True, slots=True)
class ReportContent:
    """One calibration's findings; the manifest repeats some of them for machines."""

    manifest: Manifest
    choice: BlockChoice | None
    candidates: Sequence[FittedExit]
    exits: Sequence[FittedExit]  # the candidates kept
    plan: ThresholdPlan
    certified: Sequence[CertifiedVariant]
    table: EvaluationTable
    int4: Int4Weights | None
