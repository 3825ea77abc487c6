"""Exits, drafts, thresholds and certificates as plain values, for `report.json`."""

from dataclasses import asdict
from typing import Any

from exeunt.calibration.certificates import CertifiedVariant
from exeunt.calibration.certification import NllCertification
from exeunt.calibration.drafting_choice import DEEP_TOKENS
from exeunt.calibration.exit_records import FittedExit
from exeunt.calibration.exit_selection import Drafting, ExitSelection
from exeunt.calibration.nll_risk import CLIP
from exeunt.calibration.report.content import ReportContent


def exits_record(content: ReportContent) -> dict[str, Any]:
    """Everything about exits but their certificates, by the keys of `report.json`."""
    selection = content.selection
    return {
        "exits": [_exit(each) | {"use": content.use(each)} for each in content.exits],
        "exits_left_out": [_exit(each) for each in content.candidates if not content.keeps(each)],
        "costs": _costs(selection),
        "screen": None if content.exit_screen is None else asdict(content.exit_screen),
        "drafting": None if selection.drafting is None else _drafting(selection.drafting),
        "thresholds": {
            "tested": list(selection.plan.thresholds),
            "gates": [asdict(shares) for shares in selection.shares],
            "begins": {f"{target}": begin for target, begin in selection.plan.begins.items()},
            "error_correlation": selection.plan.correlation,
            "nll": None if selection.plan.nll is None else asdict(selection.plan.nll),
        },
    }


def certified_record(each: CertifiedVariant) -> dict[str, Any]:
    """One combination: its targets, and what was counted at each threshold tested."""
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
        "text_blocks": each.text_blocks,
        "nll": None if each.nll is None else _nll(each.nll),
    }


def _nll(found: NllCertification) -> dict[str, Any]:
    """The second risk of one combination, in nats per token."""
    return {
        "clip": CLIP,
        "targets": [
            {
                **asdict(each),
                "certified": each.certified,
                "perplexity_ratio": None if each.perplexity_ratio is None else asdict(each.perplexity_ratio),
            }
            for each in found.certificates
        ],
        "tested": [
            {
                "threshold": threshold,
                "exits": counts.left,
                "tokens": counts.total,
                "increase": counts.increase,
                "text_blocks": int((counts.tokens > 0).sum()),
            }
            for threshold, counts in found.tested
        ],
    }


def _exit(fitted: FittedExit) -> dict[str, Any]:
    confirmation = fitted.head.confirmation
    return {
        "name": fitted.head.name,
        "block": fitted.head.block,
        "agreement_untrained": fitted.training.untrained_agreement,
        "agreement_ridge": fitted.training.ridge_agreement,
        "agreement_trained": fitted.training.agreement,
        "selective_agreement": fitted.training.selective,
        "start": fitted.training.start,
        "loss": fitted.training.loss,
        "training_curve": [asdict(point) for point in fitted.training.curve],
        "stopped_early": fitted.training.stopped_early,
        "still_rising": fitted.training.still_rising,
        "losses": None if fitted.losses is None else asdict(fitted.losses),
        "gate": asdict(fitted.gate),
        "combine": [float(weight) for weight in fitted.head.combine],
        "screen_ratio": fitted.head.screen_ratio,
        "shortlist": None if fitted.head.shortlist is None else len(fitted.head.shortlist),
        "shortlist_tokens": None if fitted.head.shortlist is None else len(fitted.head.shortlist),
        "list_ratio": None if confirmation is None else confirmation.list_ratio,
        "confirm_combine": None if confirmation is None else [float(each) for each in confirmation.combine],
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
