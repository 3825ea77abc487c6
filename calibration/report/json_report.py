"""The report for machines: `report.json`. It holds no times but those that a choice of exits was made by."""

import json
from dataclasses import asdict
from typing import Any

from exeunt.calibration.block_choice import BlockChoice
from exeunt.calibration.certificates import CertifiedVariant
from exeunt.calibration.drafting_choice import DEEP_TOKENS
from exeunt.calibration.evaluation import EvaluationTable, ModeResult
from exeunt.calibration.exit_fit import FittedExit
from exeunt.calibration.exit_selection import Drafting, ExitSelection
from exeunt.calibration.report.content import ReportContent
from exeunt.calibration.thresholds import BLOCK_TOKENS


def report_json(content: ReportContent) -> str:
    """The text of `report.json`."""
    manifest, plan = content.manifest, content.selection.plan
    record = {
        "base_model": manifest.base_model.model_dump(),
        "calibration": None if manifest.calibration is None else manifest.calibration.model_dump(),
        "weights_int4": None if content.int4 is None else _weights(content),
        "linear_block": None if content.choice is None else _choice(content.choice),
        "exits": [_exit(each) | {"use": content.use(each)} for each in content.exits],
        "exits_left_out": [_exit(each) for each in content.candidates if each not in content.exits],
        "costs": _costs(content.selection),
        "drafting": None if content.selection.drafting is None else _drafting(content.selection.drafting),
        "thresholds": {
            "tested": list(plan.thresholds),
            "begins": {f"{target}": begin for target, begin in plan.begins.items()},
            "error_correlation": plan.correlation,
            "block_tokens": BLOCK_TOKENS,
        },
        "certificates": [_certified(each) for each in content.certified],
        "evaluation": evaluation_record(content.table),
    }
    return json.dumps(record, indent=1, ensure_ascii=False) + "\n"


def evaluation_record(table: EvaluationTable) -> dict[str, Any]:
    """An evaluation as plain values."""
    return {
        "text": table.text,
        "tokens": table.tokens,
        "text_blocks": table.text_blocks,
        "blocks": table.blocks,
        "interval": "95 % percentile bootstrap over blocks of text",
        "modes": [_mode(result) for result in table.results],
    }


def _mode(result: ModeResult) -> dict[str, Any]:
    record = {name: value for name, value in asdict(result).items() if name != "mode"}
    head = {
        "name": result.mode.name,
        **asdict(result.mode.variant),
        "threshold": result.mode.threshold,
        "target": result.mode.target,
        "skipped_kv": None if result.mode.threshold is None else result.mode.skipped_kv,
    }
    return head | record


def _weights(content: ReportContent) -> dict[str, Any]:
    int4 = content.int4
    errors = {} if int4 is None else int4.relative_error
    return {
        "group_size": None if int4 is None else int4.group_size,
        "relative_squared_error": {
            f"blocks.{block}.{name}": error for (block, name), error in errors.items()
        },
    }


def _choice(choice: BlockChoice) -> dict[str, Any]:
    return {
        "chosen": None if choice.chosen is None else choice.chosen.block,
        "blocks": [
            {"block": fit.block, "r2": fit.r2, "r2_cut": fit.r2_cut, "rank": fit.map.rank}
            for fit in choice.fits
        ],
        "candidates": [asdict(candidate) for candidate in choice.candidates],
        "together": None if choice.together is None else asdict(choice.together),
        "tokens": choice.tokens,
    }


def _exit(fitted: FittedExit) -> dict[str, Any]:
    return {
        "name": fitted.head.name,
        "block": fitted.head.block,
        "agreement_untrained": fitted.training.untrained_agreement,
        "agreement_ridge": fitted.training.ridge_agreement,
        "agreement_trained": fitted.training.agreement,
        "gate": asdict(fitted.gate),
        "combine": [float(weight) for weight in fitted.head.combine],
        "screen_ratio": fitted.head.screen_ratio,
    }


def _costs(selection: ExitSelection) -> dict[str, Any]:
    """What was measured where exits were chosen by it."""
    drafting = selection.drafting
    exits = None if selection.costs is None else asdict(selection.costs)
    passes = None if drafting is None else {"deep_tokens": list(DEEP_TOKENS), **asdict(drafting.costs)}
    return {"in_units_of_a_block": exits, "in_units_of_a_token_of_one_stream": passes}


def _drafting(drafting: Drafting) -> dict[str, Any]:
    pairs = zip(drafting.candidates, drafting.choice.plans, strict=True)
    return {
        "exit": drafting.exit.head.name,
        "candidates": [{"name": each.head.name, **asdict(plan)} for each, plan in pairs],
    }


def _certified(each: CertifiedVariant) -> dict[str, Any]:
    by_exit = dict(each.certification.by_exit)
    return {
        "variant": asdict(each.variant),
        "skipped_kv": each.skipped_kv,
        "targets": [asdict(certificate) for certificate in each.certification.certificates],
        "tested": [
            {
                "threshold": threshold,
                "exits": counts.total,
                "wrong": counts.wrong,
                "tokens": counts.tokens,
                "text_blocks": len(counts.exits),
                "by_exit": list(by_exit[threshold]),
            }
            for threshold, counts in each.certification.tested
        ],
    }
