"""Figures as people read them, the same in every table of the report."""

from exeunt.calibration.evaluation import Measure, Mode
from exeunt.calibration.evaluation_table import with_interval
from exeunt.calibration.report.parts import Cell, Tone
from exeunt.calibration.risk import percent
from exeunt.compression.variant import SkippedKV, Variant

NOTHING = "–"
NO_INTERVAL = "no interval"


def count(number: int) -> str:
    """12,345."""
    return f"{number:,}"


def share(value: float | None, digits: int = 1) -> str:
    """0.123 is 12.3 %."""
    return NOTHING if value is None else f"{100 * value:.{digits}f} %"


def signed_share(value: float, digits: int = 1) -> str:
    """0.123 is +12.3 %."""
    return f"{100 * value:+.{digits}f} %"


def plain(value: float | None, form: str = "{:.2f}") -> str:
    """The value in a form; a dash where there is none."""
    return NOTHING if value is None else form.format(value)


def measured(measure: Measure | None, form: str = "{:.2f}", tone: Tone = "", scale: float = 1.0) -> Cell:
    """A value with its interval beneath, both times `scale`."""
    if measure is None:
        return Cell(NOTHING)
    low, high = (form.format(scale * end) for end in (measure.low, measure.high))
    return Cell(
        form.format(scale * measure.value), f"{low} to {high}" if measure.bounded else NO_INTERVAL, tone
    )


def measured_share(measure: Measure | None, digits: int = 1, tone: Tone = "") -> Cell:
    """A share with its interval, in per cent."""
    return measured(measure, f"{{:.{digits}f}} %", tone, 100.0)


def in_words(measure: Measure, form: str = "{:+.2f}") -> str:
    """A value with its interval in a sentence: +0.31 [+0.12, +0.50]."""
    return with_interval(measure, form)


def variant_name(variant: Variant) -> str:
    """A variant in a few words; the full one is called by what it is."""
    parts = [
        *(["INT4 weights"] if variant.weights == "int4" else []),
        *(["INT4 KV"] if variant.kv_cache == "int4" else []),
        *(["linear block"] if variant.linear_block else []),
    ]
    return " + ".join(parts) or "nothing compressed"


def skipped_name(skipped_kv: SkippedKV) -> str:
    """What becomes of skipped keys and values, as a past participle."""
    return {"propagate": "propagated", "backfill": "backfilled"}[skipped_kv]


def promised(mode: Mode) -> str:
    """What is certified of a mode's exits, of either risk; nothing where nothing is."""
    promises = [
        *([] if mode.target is None else [f"at most {percent(mode.target)} differ"]),
        *([] if mode.nll_target is None else [f"at most {mode.nll_target:g} nats a token less likely"]),
    ]
    return ", ".join(promises)
