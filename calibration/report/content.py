"""What a calibration report tells: everything that was measured and decided, before it is drawn or written."""

from collections.abc import Sequence
from dataclasses import dataclass

from exeunt.calibration.block_choice import BlockChoice
from exeunt.calibration.certificates import CertifiedVariant
from exeunt.calibration.evaluation import EvaluationTable
from exeunt.calibration.exit_fit import FittedExit
from exeunt.calibration.exit_selection import ExitSelection
from exeunt.calibration.weights_int4 import Int4Weights
from exeunt.compression.manifest import Manifest


@dataclass(frozen=True, slots=True)
class ReportContent:
    """One calibration's findings; the manifest repeats some of them for machines."""

    manifest: Manifest
    choice: BlockChoice | None
    candidates: Sequence[FittedExit]
    selection: ExitSelection
    certified: Sequence[CertifiedVariant]
    table: EvaluationTable
    int4: Int4Weights | None

    @property
    def exits(self) -> tuple[FittedExit, ...]:
        """The exits kept, shallowest first."""
        return self.selection.kept

    def use(self, exit: FittedExit) -> str:
        """What an exit is kept for, in words; "-" where it is not."""
        drafting = self.selection.drafting
        uses = [
            *(["certified"] if exit in self.selection.certified else []),
            *(["drafts"] if drafting is not None and exit is drafting.exit else []),
        ]
        return ", ".join(uses) or "-"
