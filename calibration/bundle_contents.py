"""From what calibration found to what a bundle holds: tensors, manifest and report."""

from collections.abc import Mapping

import torch
from torch import Tensor

from exeunt.calibration.bundle_manifest import CorpusRecord, build_manifest
from exeunt.calibration.judging import Judged
from exeunt.calibration.learning import Learned
from exeunt.calibration.report.content import ReportContent, TextSource
from exeunt.calibration.report.json_report import report_json
from exeunt.calibration.report.page import report_html
from exeunt.calibration.studies import Studies
from exeunt.calibration.task import Task
from exeunt.calibration.weights_int4 import Int4Weights
from exeunt.compression.bundle import checkpoint_sha256
from exeunt.compression.bundle_weights import checkpoint_tensors, tensors_beside_int4
from exeunt.compression.bundle_writer import BundleContents
from exeunt.compression.processor import processor_name


def bundle_contents(task: Task, learned: Learned, judged: Judged, studies: Studies) -> BundleContents:
    """What `compression.bundle_writer.write_bundle` is given."""
    files = task.checkpoint.files
    with task.progress.phase("Hashing the checkpoint", sum(file.stat().st_size for file in files)) as advance:
        sha256 = checkpoint_sha256(files, advance)
    manifest = build_manifest(
        task.checkpoint,
        sha256,
        task.tokenizer,
        task.options,
        CorpusRecord(task.corpus, task.splits),
        learned.stack,
        learned.choice,
        learned.selection,
        judged.certified,
        judged.table,
    )
    content = ReportContent(
        manifest,
        learned.choice,
        learned.exits,
        learned.selection,
        judged.certified,
        judged.table,
        learned.int4,
        options=task.options,
        kv_study=studies.kv,
        rank_sweep=learned.ranks,
        exit_screen=learned.screen,
        weight_study=studies.weights,
        written=judged.written,
        text=TextSource(len(task.corpus.documents), task.corpus.repeats, task.corpus.rows),
        machine=_machine(task),
    )
    choice = learned.choice
    return BundleContents(
        checkpoint=task.checkpoint.directory,
        manifest=manifest,
        full=checkpoint_tensors(files) if "full" in manifest.weights else None,
        int4=None if learned.int4 is None else _int4_tensors(task, learned.int4),
        linear_block=None if choice is None or choice.chosen is None else choice.chosen.map,
        exits=[each.head for each in learned.selection.kept],
        report_html=report_html(content),
        report_json=report_json(content),
    )


def _machine(task: Task) -> str:
    """What calibrated, as far as bytes depend on it."""
    if task.device.type != "cpu":
        return torch.cuda.get_device_name(task.device) if task.device.type == "cuda" else f"{task.device}"
    threads = torch.get_num_threads()
    return f"{processor_name()}, {threads} thread{'s' if threads > 1 else ''}"


def _int4_tensors(task: Task, int4: Int4Weights) -> Mapping[str, Tensor]:
    """What the INT4 file holds: where no full weights lie beside it, also all that has no INT4 form."""
    if task.options.weights == "both":
        return int4.tensors()
    beside = tensors_beside_int4(task.spec, task.checkpoint.weights())
    return {**int4.tensors(), **beside}
