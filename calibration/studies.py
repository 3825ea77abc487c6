"""The comparisons behind the choices that were not made for this model alone: how weights are rounded, how KV is held."""

from dataclasses import dataclass

from exeunt.calibration.kv_study import PARTS, KVStudy, KVSubject, study_kv, study_work
from exeunt.calibration.learning import Learned
from exeunt.calibration.task import Task, head_rows


@dataclass(frozen=True, slots=True)
class Studies:
    """Those that were made."""

    weights: None
    kv: KVStudy | None


def study(task: Task, learned: Learned) -> Studies:
    """The comparisons that the options ask for, on the select split."""
    return Studies(_weights(task), _kv(task, learned))


def _weights(task: Task) -> None:
    return None


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
        "Comparing forms of keys and values", study_work(subjects, rows, tokens)
    ) as advance:
        return study_kv(
            subjects,
            rows,
            tokens=tokens,
            batch_tokens=options.batch_tokens,
            seed=options.seed,
            advance=advance,
        )
