"""What a calibration report tells: everything that was measured and decided, before it is drawn or written."""

from collections.abc import Sequence
from dataclasses import dataclass

from exeunt.calibration.block_choice import BlockChoice
from exeunt.calibration.certificates import CertifiedVariant
from exeunt.calibration.evaluation import EvaluationTable
from exeunt.calibration.exit_records import FittedExit
from exeunt.calibration.exit_screen import ExitScreen
from exeunt.calibration.exit_selection import ExitSelection
from exeunt.calibration.generation import Written
from exeunt.calibration.kv_study import KVStudy
from exeunt.calibration.options import CalibrationOptions
from exeunt.calibration.rank_sweep import RankSweep
from exeunt.calibration.weight_study import WeightStudy
from exeunt.calibration.weights_int4 import Int4Weights
from exeunt.compression.manifest import Manifest


@dataclass(frozen=True, slots=True)
class TextSource:
    """The documents that were dealt to the splits, and how many more were left out as repeats of one of them.

    Where they are passages that short rows of a data set were joined to, `rows` counts those (0: nothing was joined).
    """

    documents: int
    repeats: int
    rows: int = 0


@dataclass(frozen=True, slots=True)
class ReportContent:
    """One calibration's findings; the manifest repeats some of them for machines.

    Studies that were not made are None or empty, and the report then has no section on them.
    """

    manifest: Manifest
    choice: BlockChoice | None
    candidates: Sequence[FittedExit]
    selection: ExitSelection
    certified: Sequence[CertifiedVariant]
    table: EvaluationTable
    int4: Int4Weights | None
    options: CalibrationOptions | None = None
    kv_study: KVStudy | None = None
    rank_sweep: RankSweep | None = None
    exit_screen: ExitScreen | None = None
    written: tuple[Written, ...] = ()
    weight_study: WeightStudy | None = None
    text: TextSource | None = None
    machine: str = ""  # that calibrated, in words

    @property
    def exits(self) -> tuple[FittedExit, ...]:
        """The exits kept, shallowest first."""
        return self.selection.kept

    def keeps(self, exit: FittedExit) -> bool:
        """Whether a candidate is one of the exits kept."""
        return any(exit is kept for kept in self.exits)

    def use(self, exit: FittedExit) -> str:
        """What an exit is kept for, in words; "-" where it is not."""
        drafting = self.selection.drafting
        uses = [
            *(["certified"] if any(exit is each for each in self.selection.certified) else []),
            *(["drafts"] if drafting is not None and exit is drafting.exit else []),
        ]
        return ", ".join(uses) or "-"
