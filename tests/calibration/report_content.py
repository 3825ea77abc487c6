"""A calibration's findings made up for the tests of the report: every figure is different and known."""

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from exeunt.calibration.block_choice import BlockChoice, Replacement
from exeunt.calibration.block_fitter import BlockFit
from exeunt.calibration.certificates import CertifiedVariant
from exeunt.calibration.certification import Certification, NllCertification
from exeunt.calibration.drafting_choice import DraftChoice, DraftPlan, DraftRates, PassCosts
from exeunt.calibration.evaluation import EvaluationTable, Measure, Mode, ModeResult
from exeunt.calibration.exit_choice import ExitCosts
from exeunt.calibration.exit_records import FittedExit
from exeunt.calibration.exit_screen import ExitScreen, ScreenedExit
from exeunt.calibration.exit_selection import Drafting, ExitSelection
from exeunt.calibration.exit_training import CurvePoint, TrainedHead
from exeunt.calibration.gate_quality import GateQuality
from exeunt.calibration.generation import Written
from exeunt.calibration.kv_forms import DEPLOYED as DEPLOYED_KV
from exeunt.calibration.kv_forms import PER_CHANNEL, KVForm
from exeunt.calibration.kv_forward import KVPart
from exeunt.calibration.kv_study import ContextCost, KVCost, KVDifference, KVStudy, KVWeightsCosts
from exeunt.calibration.loss_comparison import LossComparison, LossOutcome
from exeunt.calibration.nll_risk import NllCertificate, NllCounts
from exeunt.calibration.options import CalibrationOptions
from exeunt.calibration.rank_sweep import RankPoint, RankSweep
from exeunt.calibration.report.content import ReportContent
from exeunt.calibration.risk import Certificate, ExitCounts
from exeunt.calibration.thresholds import GateShares, ThresholdPlan
from exeunt.calibration.weight_study import FormName, WeightForm, WeightStudy
from exeunt.calibration.weights_int4 import Int4Weights
from exeunt.compression.linear_block import LinearBlock
from exeunt.compression.manifest import BaseModelRecord, CalibrationRecord, LinearBlockRecord, Manifest
from exeunt.compression.variant import Variant, WeightFormat
from exeunt.kernels.int4_linear import quantize
from tests.calibration.conftest import confirmed_exit, random_exit

FULL, WEIGHTS, KV = Variant(), Variant("int4"), Variant("full", "int4")
DEPLOYED = Variant("int4", "int4")
LINEAR = Variant(linear_block=True)
TARGETS = (0.02, 0.05)


def about(value: float, width: float = 0.1) -> Measure:
    """A value with an interval that is not symmetric."""
    return Measure(value, value - width, value + 1.5 * width)


def mode_result(mode: Mode, increase: float, left: float = 0.0, **more: Any) -> ModeResult:
    """A mode whose perplexity is 20 and what it is increased by."""
    return ModeResult(
        mode=mode,
        perplexity=about(20.0 + increase, 2.0),
        perplexity_increase=about(increase, 0.0 if mode.variant == FULL and left == 0 else 0.07),
        perplexity_ratio=about(1.0 + increase / 20, 0.004),
        exits_ratio=about(1.01, 0.002) if left else None,
        kl=about(0.01 + increase / 100, 0.001),
        agreement=about(0.9 - increase / 100, 0.01),
        mean_depth=about(4.0 - 2.0 * left),
        exit_rate=about(left, 0.01),
        disagreement=about(0.04, 0.01) if left else None,
        passes_saved=about(left / 2, 0.01),
        compute_saved=about(left / 3, 0.01),
        by_exit=(int(1000 * left),),
        tokens=1000,
        **more,
    )


def evaluation(**more: Any) -> EvaluationTable:
    """Five variants with exits off, and the deployed one at a certified target of each risk."""
    off = {FULL: 0.0, WEIGHTS: 0.123, KV: 0.456, DEPLOYED: 0.789, LINEAR: 2.5}
    results = [mode_result(Mode(variant), increase) for variant, increase in off.items()]
    results.append(mode_result(Mode(DEPLOYED, 0.91, 0.05), 0.853, left=0.2))
    backfilled = (
        (Mode(DEPLOYED, 0.9123, 0.05, "backfill"), 0.805, 0.2),
        (Mode(DEPLOYED, 0.87, None, "backfill", 0.05), 0.82, 0.3),
    )
    for mode, increase, left in backfilled:  # who computes later saves passes, and exits only cost
        results.append(replace(mode_result(mode, increase, left=left), compute_saved=about(-0.06, 0.01)))
    thresholds = {0.95: 0.05, 0.8: 0.3, 0.6: 0.5}
    sweep = tuple(mode_result(Mode(DEPLOYED, at), 1.0 + left, left=left) for at, left in thresholds.items())
    return EvaluationTable("words.txt, certify split", 1000, 7, 4, tuple(results), sweep, **more)


def kv_cost(form: KVForm, part: KVPart, increase: float) -> KVCost:
    """The cost of a form at two lengths of context."""
    by_context = (
        ContextCost(1, 16, 160, about(increase / 20, 0.001)),
        ContextCost(17, 32, 150, about(increase / 25, 0.001)),
    )
    errors = (0.011, 0.012) if part == "both" else (0.011, 0.0)
    return KVCost(
        form.name,
        form.streams,
        part,
        about(20 + increase),
        about(increase, 0.01),
        about(0.01),
        *errors,
        96.0,
        by_context,
    )


def kv_study() -> KVStudy:
    """Two forms under two kinds of weights."""
    kinds: tuple[tuple[WeightFormat, float], ...] = (("full", 0.0), ("int4", 0.2))
    under = [
        KVWeightsCosts(
            weights,
            about(20.0),
            384.0,
            (
                kv_cost(DEPLOYED_KV, "keys", 0.0301 + shift),
                kv_cost(DEPLOYED_KV, "both", 0.0502 + shift),
                kv_cost(PER_CHANNEL, "both", 0.0903 + shift),
            ),
            (KVDifference(PER_CHANNEL.name, about(-0.0401 + shift, 0.2), about(-0.0071, 0.001)),),
        )
        for weights, shift in kinds
    ]
    return KVStudy(1000, 64, 7, tuple(under))


def fitted_exit(block: int, agreement: float) -> FittedExit:
    """An exit with a gate of its own figures."""
    head = confirmed_exit(block, block, 0.9) if block == 2 else random_exit(block, block)
    quality = GateQuality(
        auc=0.8 + block / 100,
        auc_probe=0.7,
        auc_top=0.75,
        calibration_error=0.012,
        reliability=((0.15, 0.12, 100), (0.55, 0.6, 300), (0.95, 0.97, 600)),
        tokens=1000,
        roc=((0.0, 0.0), (0.1, 0.6), (1.0, 1.0)),
        coverage=((0.1, 0.01), (0.25 + block / 100, 0.03), (1.0, 0.3)),
        auc_listed=0.777 if block == 2 else None,
    )
    training = TrainedHead(
        head.norm,
        head.adapter,
        untrained_agreement=0.31,
        ridge_agreement=0.42,
        agreement=agreement,
        selective=agreement + 0.1,
        curve=(CurvePoint(0, 0.42, 0.5), CurvePoint(1000, agreement, agreement + 0.1)),
        stopped_early=block == 2,
    )
    outcomes = [
        LossOutcome(agreement - d, agreement + 0.1 - d, (0.1 - d, 0.3 - d), 1000) for d in (0.05, 0.0, 0.02)
    ]
    losses = (
        LossComparison(block, 1000, TARGETS, outcomes[0], outcomes[1], outcomes[2], served="top token")
        if block == 2
        else None
    )
    return FittedExit(head, training, quality, losses)


def exit_screen() -> ExitScreen:
    """Three blocks, of which the last two were trained."""
    exits = tuple(
        ScreenedExit(
            block=block,
            agreement=0.3 + block / 10,
            ridge_agreement=0.25 + block / 10,
            start="own head",
            selective=0.5 + block / 10,
            separability=0.7 + block / 100,
            leaving=(0.01 + block / 10, 0.02 + block / 10),
            saving=-0.01 + block / 100,
            draft_speed=1.1 - block / 10,
            trained=block > 0,
            reason="" if block == 0 else "saving, place 1" if block == 2 else "draft speed, place 1",
        )
        for block in range(3)
    )
    return ExitScreen(exits, 900, TARGETS)


def counts(left: int, wrong: int) -> ExitCounts:
    """Thirty blocks of text that are all alike."""
    return ExitCounts(np.full(30, left / 30), np.full(30, wrong / 30), 3000)


def certified(variant: Variant, reason: str = "only 3 tokens left") -> CertifiedVariant:
    """A variant that holds the looser target alone."""
    certificates = (
        Certificate(TARGETS[0], None, 30, 3000, 0.1, 0.3, reason),
        Certificate(TARGETS[1], 0.9123, 600, 3000, 0.031, 0.044, None),
    )
    tested = ((0.95, counts(300, 6)), (0.9123, counts(600, 19)))
    by_exit = ((0.95, (300,)), (0.9123, (600,)))
    return CertifiedVariant(
        variant, "propagate", Certification(certificates, tested, by_exit), nll_certification(reason), 31
    )


def nll_certification(reason: str) -> NllCertification:
    """The other risk: the looser of two targets holds."""
    certificates = (
        NllCertificate(0.01, None, 60, 3000, 0.008, 0.013, Measure(0.009, 0.004, 0.014), 20.2, 20.0, reason),
        NllCertificate(0.05, 0.87, 900, 3000, 0.031, 0.047, Measure(0.033, 0.02, 0.046), 20.7, 20.0, None),
    )
    return NllCertification(certificates, ((0.95, nll_counts(60, 0.008)), (0.87, nll_counts(900, 0.031))))


def nll_counts(left: int, increase: float) -> NllCounts:
    """Thirty blocks of text of a hundred tokens each."""
    ones = np.ones(30)
    return NllCounts(100 * increase * ones, 110 * increase * ones, 300 * ones, left / 30 * ones, 100 * ones)


def choice() -> BlockChoice:
    """Four blocks, of which the last two were tried."""

    def stand_in(block: int) -> LinearBlock:
        return LinearBlock(block, torch.zeros(2, 32), torch.zeros(32, 2), torch.zeros(32))

    fits = tuple(
        BlockFit(block=b, r2=0.5 + b / 10, r2_cut=0.3 + b / 10, missed=0.2, map=stand_in(b)) for b in range(4)
    )
    tried = (Replacement((2,), about(22.22), about(2.22)), Replacement((3,), about(21.11), about(1.11)))
    together = Replacement((2, 3), about(33.33), about(13.33))
    return BlockChoice(fits[3], fits, tried, together, 8000, 31)


def rank_sweep() -> RankSweep:
    """Three sizes of the last block's map."""
    points = tuple(
        RankPoint(rank, 32 * (2 * rank + 1), reduction, 0.9 - reduction / 100, about(20 + cost), about(cost))
        for rank, reduction, cost in ((32, 2.6, 0.51), (2, 34.0, 1.11), (1, 56.7, 2.22))
    )
    return RankSweep(3, about(20.0), points, 8000, 31)


def int4_weights() -> Int4Weights:
    """The errors of two layers in four blocks."""
    errors = {
        (block, name): (1 + block + 10 * number) / 1000
        for block in range(4)
        for number, name in enumerate(("attention.query", "mlp.up"))
    }
    outputs = {key: error / 2 for key, error in errors.items()}
    return Int4Weights({}, quantize(torch.ones(8, 32), 32), 32, errors, outputs, "gptq")


def weight_study() -> WeightStudy:
    """Three ways of rounding."""
    kinds = ("attention.query", "mlp.up", "output")
    costs: dict[FormName, float] = {"nearest": 0.404, "gptq": 0.202, "nf4": 0.303}
    forms = [
        WeightForm(
            name=name,
            bits=5.0,
            weight_error={kind: 0.01 + number / 1000 for number, kind in enumerate(kinds)},
            output_error={kind: cost / 100 + number / 1000 for number, kind in enumerate(kinds)},
            perplexity=about(20 + cost),
            increase=about(cost, 0.05),
            kl=about(0.01),
        )
        for name, cost in costs.items()
    ]
    return WeightStudy(1000, 7, 32, about(20.0), tuple(forms))


def manifest(name: str = "tiny") -> Manifest:
    """What the bundle says of itself."""
    return Manifest(
        created=datetime(2024, 1, 1, tzinfo=UTC),
        exeunt_version="1.2.3",
        base_model=BaseModelRecord(
            name=name, architecture="llama", sha256="a" * 64, parameters=12345, blocks=4
        ),
        weights=("int4", "full"),
        kv_cache=("int4", "full"),
        int4_group_size=32,
        linear_block=LinearBlockRecord(index=3, rank=2, r2=0.6, parameters=160, replaced_parameters=5440),
        calibration=CalibrationRecord(
            data="words.txt",
            sha256="b" * 64,
            tokens=6000,
            splits={"fit": 3000, "select": 2000, "certify": 1000},
            seed=7,
        ),
        versions={"torch": "2.13.0"},
    )


def selection(*exits: FittedExit) -> ExitSelection:
    """The last exit is certified, the first drafts."""
    plans = tuple(
        DraftPlan(DraftRates(0.5, 0.9, 0.6, 0.7 + n / 100), 2, 1.11 + n / 10) for n in range(len(exits))
    )
    passes = PassCosts(
        0.05,
        0.1,
        {each.head.depth: 0.3 for each in exits},
        {each.head.depth: (0.8, 0.9, 1.0, 1.2, 1.5) for each in exits},
    )
    return ExitSelection(
        certified=exits[-1:],
        plan=ThresholdPlan((0.95, 0.9123), dict.fromkeys(TARGETS, 0.95), 0.01),
        drafting=Drafting(exits[0], tuple(exits), DraftChoice(0, plans), passes),
        costs=ExitCosts(0.31, 0.72, 0.053, whole=1.25),
        shares=(GateShares(0.95, 1.0, 0.6, 0.25, 0.2), GateShares(0.9123, 1.0, 0.7, 0.35, 0.3)),
    )


def written(sample: str = "and they lived") -> tuple[Written, ...]:
    """Two modes, each at two temperatures."""
    return tuple(
        Written(
            mode=mode,
            temperature=temperature,
            perplexity=about(3.0 + 10 * temperature + number),
            mean_depth=about(4.0 - number),
            exit_rate=about(0.2 * number, 0.01),
            repeated=0.11 + number / 100,
            distinct=0.81 + number / 100,
            prompt="Once upon a time",
            sample=f"{sample} {number}",
        )
        for temperature in (0.0, 1.0)
        for number, mode in enumerate((Mode(FULL), Mode(DEPLOYED, 0.91, 0.05)))
    )


def options() -> CalibrationOptions:
    """What was asked for, with the folders of the machine."""
    return CalibrationOptions(
        model="/secret/model", out=Path("/secret/bundle"), data="/secret/words.txt", exits=(0, 2), seed=7
    )


def content(name: str = "tiny") -> ReportContent:
    """Everything, of a model called `name`."""
    exits = (fitted_exit(0, 0.531), fitted_exit(1, 0.642), fitted_exit(2, 0.753))
    outcomes = (certified(DEPLOYED), replace(certified(DEPLOYED), skipped_kv="backfill"), certified(FULL))
    return ReportContent(
        manifest(name),
        choice(),
        exits,
        selection(exits[0], exits[2]),
        outcomes,
        evaluation(),
        int4_weights(),
        options=options(),
        kv_study=kv_study(),
        rank_sweep=rank_sweep(),
        exit_screen=exit_screen(),
        written=written(),
        weight_study=weight_study(),
    )


def bare_content() -> ReportContent:
    """A bundle that saves nothing: full weights, full KV, no linear block, no exits."""
    plain = manifest().model_copy(
        update={"weights": ("full",), "kv_cache": ("full",), "int4_group_size": None, "linear_block": None}
    )
    table = EvaluationTable("words.txt, certify split", 1000, 7, 4, (mode_result(Mode(FULL), 0.0),))
    nothing = ExitSelection((), ThresholdPlan((), {}, 0.0))
    return ReportContent(plain, None, (), nothing, (), table, None)
