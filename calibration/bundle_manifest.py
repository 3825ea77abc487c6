"""What calibration found, as a bundle's manifest."""

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from exeunt.calibration.block_choice import BlockChoice
from exeunt.calibration.certificates import CertifiedVariant, nll_risk_table
from exeunt.calibration.corpus import Corpus, Splits
from exeunt.calibration.documents import HUB_PREFIX
from exeunt.calibration.evaluation import EvaluationTable
from exeunt.calibration.exit_fit import FittedExit
from exeunt.calibration.exit_selection import Drafting, ExitSelection
from exeunt.calibration.model_stack import ModelStack
from exeunt.calibration.options import CalibrationOptions
from exeunt.compression.checkpoint import Checkpoint
from exeunt.compression.manifest import (
    BaseModelRecord,
    CalibrationRecord,
    DraftRecord,
    ExitRecord,
    LinearBlockRecord,
    Manifest,
)
from exeunt.compression.tokenizer import tokenizer_class

_PACKAGES = ("torch", "transformers", "safetensors", "numpy", "scipy")


@dataclass(frozen=True, slots=True)
class CorpusRecord:
    """The text behind a calibration and how it was dealt."""

    corpus: Corpus
    splits: Splits


def build_manifest(
    checkpoint: Checkpoint,
    checkpoint_sha256: str,
    tokenizer: Any,
    options: CalibrationOptions,
    text: CorpusRecord,
    stack: ModelStack,
    choice: BlockChoice | None,
    exits: ExitSelection,
    certified: Sequence[CertifiedVariant],
    table: EvaluationTable,
) -> Manifest:
    """The manifest without its list of files, which writing adds."""
    spec = checkpoint.spec
    return Manifest(
        created=_created(),
        exeunt_version=_version("exeunt") or "0",
        base_model=BaseModelRecord(
            name=_shown_name(checkpoint),
            architecture=spec.family,
            sha256=checkpoint_sha256,
            parameters=spec.parameters,
            blocks=spec.blocks,
        ),
        weights=stack.weight_formats,
        kv_cache=stack.kv_formats,
        int4_group_size=options.group_size if stack.int4 is not None else None,
        linear_block=_linear_block(choice, spec.block_parameters),
        exits=tuple(_exit(each, exits) for each in exits.kept),
        risk_table=tuple(each.entry(options.confidence) for each in certified),
        nll_risk_table=nll_risk_table(certified, options.confidence),
        evaluation=tuple(result.record() for result in table.results),
        calibration=_calibration(options, text),
        architecture=spec,
        tokenizer_class=tokenizer_class(tokenizer),
        versions={name: found for name in _PACKAGES if (found := _version(name))}
        | {"python": platform.python_version()},
    )


def data_name(data: str) -> str:
    """How a text is called in a bundle: a file's or folder's own name, not where it lay on this machine."""
    return data if data.startswith(HUB_PREFIX) else Path(data).resolve().name


def _created() -> datetime:
    """Now, or what SOURCE_DATE_EPOCH says, so that a bundle can be made again to the byte."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH", "")
    seconds = int(epoch) if epoch.isdecimal() else None
    return (
        datetime.now(UTC).replace(microsecond=0) if seconds is None else datetime.fromtimestamp(seconds, UTC)
    )


def _shown_name(checkpoint: Checkpoint) -> str:
    path = Path(checkpoint.name)
    return path.resolve().name if path.is_dir() else checkpoint.name


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _linear_block(choice: BlockChoice | None, replaced: int) -> LinearBlockRecord | None:
    if choice is None or choice.chosen is None:
        return None
    chosen = choice.chosen
    return LinearBlockRecord(
        index=chosen.block,
        rank=chosen.map.rank,
        r2=chosen.r2_cut,
        parameters=chosen.map.parameters,
        replaced_parameters=replaced,
        r2_by_block=tuple(fit.r2 for fit in choice.fits),
    )


def _exit(fitted: FittedExit, exits: ExitSelection) -> ExitRecord:
    drafting = exits.drafting
    drafts = drafting is not None and drafting.exit is fitted
    return ExitRecord(
        block=fitted.head.block,
        name=fitted.head.name,
        agreement=fitted.training.agreement,
        untrained_agreement=fitted.training.untrained_agreement,
        auc=fitted.gate.auc,
        tokens=fitted.training.tokens,
        certified=fitted in exits.certified,
        drafting=drafts,
        draft=_draft(drafting) if drafting is not None and drafts else None,
    )


def _draft(drafting: Drafting) -> DraftRecord:
    plan = drafting.choice.plan
    return DraftRecord(
        threshold=plan.rates.threshold,
        length=plan.length,
        drafted=plan.rates.drafted,
        acceptance=plan.rates.acceptance,
        speed=plan.speed,
    )


def _calibration(options: CalibrationOptions, text: CorpusRecord) -> CalibrationRecord:
    splits = text.splits.tokens()
    return CalibrationRecord(
        data=data_name(options.data),
        sha256=text.corpus.sha256,
        tokens=sum(splits.values()),
        splits=dict(splits),
        seed=options.seed,
        origin=options.origin,
    )
