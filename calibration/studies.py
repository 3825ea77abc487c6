"""The comparisons behind what was not chosen for this model alone: rounding of weights, forms of keys and values."""

from dataclasses import dataclass

from exeunt.calibration.block_runner import BlockRunner
from exeunt.calibration.kv_study import PARTS, KVStudy, KVSubject, study_kv
from exeunt.calibration.kv_study import study_work as kv_work
from exeunt.calibration.learning import Learned
from exeunt.calibration.task import Task
from exeunt.calibration.weight_study import WeightStudy, study_weights
from exeunt.calibration.weight_study import study_work as weights_work


@dataclass(frozen=True, slots=True)
class Studies:
    """Those that were made."""

    weights: WeightStudy | None
    kv: KVStudy | None


def study(task: Task, learned: Learned) -> Studies:
    """The comparisons that the options ask for, on the select split."""
    return Studies(_weights(task, learned), _kv(task, learned))


def _weights(task: Task, learned: Learned) -> WeightStudy | None:
    """What INT4 weights cost, by rounding and levels; None where there are none."""
    options, int4, splits = task.options, learned.int4, task.splits
    tokens = options.studies.weights
    if int4 is None or not tokens:
        return None
    runner = BlockRunner(task.spec, "full", task.device, task.dtype)
    work = weights_work(int4, splits.select, task.spec.blocks, tokens)
    with task.progress.phase("Comparing roundings of weights", work) as advance:
        return study_weights(
            task.checkpoint.weights(),
            runner,
            int4,
            splits.select,
            documents=splits.documents.get("select"),
            tokens=tokens,
            batch_tokens=options.batch_tokens,
            seed=options.seed,
            advance=advance,
        )


def _kv(task: Task, learned: Learned) -> KVStudy | None:
    """What INT4 keys and values cost, by form; None where there are none."""
    options, stack = task.options, learned.stack
    tokens = options.studies.kv
    if options.kv_cache == "full" or not tokens:
        return None
    # Keys and values apart are studied under the deployed weights; under full ones that costs as much again.
    subjects = [KVSubject("full", stack.full, parts=PARTS if stack.int4 is None else ("both",))]
    if stack.int4 is not None:
        subjects.append(KVSubject("int4", stack.int4))
    rows = task.splits.select
    with task.progress.phase(
        "Comparing forms of keys and values", kv_work(subjects, rows, tokens)
    ) as advance:
        return study_kv(
            subjects,
            rows,
            tokens=tokens,
            batch_tokens=options.batch_tokens,
            seed=options.seed,
            documents=task.splits.documents.get("select"),
            advance=advance,
        )
