"""The sections of the report, one module each, in the order in which the page has them."""

from collections.abc import Callable
from typing import Final

from exeunt.calibration.report.content import ReportContent
from exeunt.calibration.report.parts import Section
from exeunt.calibration.report.sections.certificates import certificates_section
from exeunt.calibration.report.sections.drafting import drafting_section
from exeunt.calibration.report.sections.exits import exits_section
from exeunt.calibration.report.sections.gates import gates_section
from exeunt.calibration.report.sections.generation import generation_section
from exeunt.calibration.report.sections.kv import kv_section
from exeunt.calibration.report.sections.linear_block import linear_block_section
from exeunt.calibration.report.sections.made import made_section
from exeunt.calibration.report.sections.modes import modes_section
from exeunt.calibration.report.sections.summary import summary_section
from exeunt.calibration.report.sections.trade_off import trade_off_section
from exeunt.calibration.report.sections.weights import weights_section

BUILDERS: Final[tuple[Callable[[ReportContent], Section | None], ...]] = (
    summary_section,
    trade_off_section,
    modes_section,
    certificates_section,
    exits_section,
    gates_section,
    drafting_section,
    linear_block_section,
    weights_section,
    kv_section,
    generation_section,
    made_section,
)
