"""Calibration from a checkpoint and a text to a bundle: the steps in order, each in its own module.

Nothing is written at the target before everything is decided; hidden states go to a temporary folder that is gone
when calibration ends, however it ends, unless unfinished work is to be kept (`CalibrationOptions.work`).
"""

from pathlib import Path

from exeunt.calibration.bundle_contents import bundle_contents
from exeunt.calibration.judging import judge
from exeunt.calibration.kernel_compilation import compile_kernels
from exeunt.calibration.learning import learn
from exeunt.calibration.options import CalibrationOptions
from exeunt.calibration.progress import ProgressReport
from exeunt.calibration.studies import study
from exeunt.calibration.task import opened
from exeunt.compression.bundle_writer import check_target, tensor_bytes, write_bundle


def calibrate(options: CalibrationOptions, progress: ProgressReport) -> Path:
    """Make the bundle that `options` asks for and return where it stands.

    Raises CalibrationError (OptionError for the options, CorpusError for the text), BundleError for the target, and
    CheckpointError, ConfigError, UnsupportedModelError, WeightError or TokenizerError for the model. Whatever is
    raised, KeyboardInterrupt included, leaves no bundle, and an older bundle at the target as it was.
    """
    target = check_target(options.out)
    with opened(options, progress) as task:
        compile_kernels(task.device, task.progress)
        learned = learn(task)
        judged = judge(task, learned)
        contents = bundle_contents(task, learned, judged, study(task, learned))
        with task.progress.phase("Writing the bundle", tensor_bytes(contents)) as advance:
            return write_bundle(target, contents, advance).path
