"""The report for machines: `report.json`. It holds no times but those that a choice of exits was made by."""

import json
from dataclasses import asdict
from typing import Any

from exeunt.calibration.block_choice import BlockChoice
from exeunt.calibration.certificates import CertifiedVariant
from exeunt.calibration.evaluation import EvaluationTable, ModeResult
from exeunt.calibration.generation import Written
from exeunt.calibration.json_values import json_values
from exeunt.calibration.papers import (
    EXITS_PERPLEXITY,
    EXITS_SOURCE,
    EXITS_TRADE_OFF,
    KV_JOINT,
    KV_SOURCE,
)
from exeunt.calibration.report.asked import options_record
from exeunt.calibration.report.content import ReportContent
from exeunt.calibration.report.json_exits import certified_record, exits_record
from exeunt.calibration.report.sections.trade_off import trade_off_variant
from exeunt.calibration.report.verdict import FAIR, SMALL, Cost, verdict_of
from exeunt.calibration.trade_off import trade_offs
from exeunt.calibration.weights_int4 import Int4Weights


def report_json(content: ReportContent) -> str:
    """The text of `report.json`."""
    manifest = content.manifest
    record = {
        "base_model": manifest.base_model.model_dump(),
        "calibration": None if manifest.calibration is None else manifest.calibration.model_dump(),
        "text": None if content.text is None else asdict(content.text),
        "options": None if content.options is None else options_record(content.options),
        "machine": content.machine or None,
        "versions": {"exeunt": manifest.exeunt_version, **manifest.versions},
        "verdict": _verdict(content),
        "weights_int4": None if content.int4 is None else _weights(content.int4),
        "weight_study": None if content.weight_study is None else content.weight_study.as_json(),
        "kv_study": None if content.kv_study is None else asdict(content.kv_study),
        "linear_block": None if content.choice is None else _choice(content.choice),
        "rank_sweep": None if content.rank_sweep is None else asdict(content.rank_sweep),
        **exits_record(content),
        "certificates": [certified_record(each) for each in content.certified],
        "evaluation": evaluation_record(content.table),
        "generation": [_mode(each) for each in content.written],
        "trade_off": _trade_off(content),
        "papers": {
            "exits": {
                "source": EXITS_SOURCE,
                "perplexity": EXITS_PERPLEXITY,
                "trade_off": [
                    {"compute_saved": saved, "perplexity_increase": cost} for saved, cost in EXITS_TRADE_OFF
                ],
            },
            "kv": {"source": KV_SOURCE, "perplexity_full": KV_JOINT[0], "perplexity_int4": KV_JOINT[1]},
        },
    }
    return json.dumps(json_values(record), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def evaluation_record(table: EvaluationTable) -> dict[str, Any]:
    """An evaluation as plain values."""
    return {
        "text": table.text,
        "tokens": table.tokens,
        "text_blocks": table.text_blocks,
        "blocks": table.blocks,
        "interval": "95 % bootstrap over blocks of text",
        "modes": [_mode(result) for result in table.results],
        "sweep": [_mode(result) for result in table.sweep],
    }


def _mode(result: ModeResult | Written) -> dict[str, Any]:
    """A mode's figures, headed by what the mode is."""
    mode = result.mode
    head = {
        "name": mode.name,
        **asdict(mode.variant),
        "threshold": mode.threshold,
        "target": mode.target,
        "nll_target": mode.nll_target,
        "skipped_kv": None if mode.threshold is None else mode.skipped_kv,
    }
    return head | {name: value for name, value in asdict(result).items() if name != "mode"}


def _verdict(content: ReportContent) -> dict[str, Any]:
    verdict = verdict_of(content)
    return {
        "called_small_up_to": SMALL,
        "called_fair_up_to": FAIR,
        "costs": [_cost(cost) for cost in verdict.together],
        "certified": None if verdict.deployed is None else _certified(verdict.deployed),
        "advice": [
            {"use": each.use, "compression": each.request, "cost": _cost(each.cost)}
            for each in verdict.advice
        ],
    }


def _certified(outcome: CertifiedVariant) -> dict[str, Any]:
    """The combination that the verdict speaks of, and its certified targets of both risks."""
    nll = () if outcome.nll is None else outcome.nll.certificates
    return {
        **asdict(outcome.variant),
        "skipped_kv": outcome.skipped_kv,
        "max_disagreement": [each.target for each in outcome.certification.certificates if each.certified],
        "max_nll_increase": [each.target for each in nll if each.certified],
    }


def _trade_off(content: ReportContent) -> list[dict[str, Any]]:
    """Every curve of what exits save against what they cost, and how it compares with the paper's."""
    variant = trade_off_variant(content)
    return [] if variant is None else [asdict(each) for each in trade_offs(content.table, variant)]


def _cost(cost: Cost) -> dict[str, Any]:
    called = {"good": "small", "fair": "fair", "bad": "large"}.get(cost.tone)  # None without an interval
    return {**asdict(cost), "called": called}


def _weights(int4: Int4Weights) -> dict[str, Any]:
    return {
        "group_size": int4.group_size,
        "rounding": int4.rounding,
        "relative_squared_error": {
            f"blocks.{block}.{name}": error for (block, name), error in int4.relative_error.items()
        },
        "relative_squared_output_error": {
            f"blocks.{block}.{name}": error for (block, name), error in int4.output_error.items()
        },
    }


def _choice(choice: BlockChoice) -> dict[str, Any]:
    return {
        "chosen": None if choice.chosen is None else choice.chosen.block,
        "blocks": [
            {
                "block": fit.block,
                "r2": fit.r2,
                "r2_cut": fit.r2_cut,
                "missed": fit.missed,
                "rank": fit.map.rank,
            }
            for fit in choice.fits
        ],
        "candidates": [asdict(candidate) for candidate in choice.candidates],
        "together": None if choice.together is None else asdict(choice.together),
        "tokens": choice.tokens,
        "text_blocks": choice.text_blocks,
    }
