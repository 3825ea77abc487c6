"""`exeunt eval`: every mode of a loaded model on a text of the user's."""

from dataclasses import dataclass

from exeunt.calibration.bundle_manifest import data_name
from exeunt.calibration.corpus import read_corpus, rows_of
from exeunt.calibration.errors import CalibrationError
from exeunt.calibration.evaluation import EvaluationTable, evaluate_modes
from exeunt.calibration.modes import loose_threshold, modes_of
from exeunt.calibration.progress import ProgressReport
from exeunt.calibration.teacher_forcing import ForcedModel
from exeunt.calibration.text_encoding import separator, text_encoding
from exeunt.compression.model import LoadedModel
from exeunt.compression.variant import Variant


@dataclass(frozen=True, slots=True)
class EvaluationOptions:
    """How much of the text is used, and how. Lengths are tokens."""

    tokens: int = 16_000
    row_tokens: int = 512
    batch_tokens: int = 4096
    seed: int = 0  # of the documents' order and the bootstrap

    def __post_init__(self) -> None:
        if self.tokens < 16 or not 16 <= self.row_tokens <= self.batch_tokens:
            raise CalibrationError(
                f"Evaluation cannot use {self.tokens} tokens in rows of {self.row_tokens} and batches of "
                f"{self.batch_tokens}; each must be at least 16, and a batch hold a row."
            )


def evaluate(
    model: LoadedModel, data: str, options: EvaluationOptions, progress: ProgressReport
) -> EvaluationTable:
    """The figures of every mode that `model` holds, on the text `data` (see `corpus.read_corpus`).

    The reference is full weights, full KV, full depth; where only INT4 weights are loaded, those. Raises CorpusError.
    """
    spec = model.spec
    rows = rows_of(
        read_corpus(data, separator(model.tokenizer)),
        text_encoding(model.tokenizer, spec),
        tokens=options.tokens,
        row_tokens=min(options.row_tokens, spec.max_position_embeddings),
        seed=options.seed,
    )
    exits = [model.exits[place] for place in model.certified_exits]
    models = {
        variant: ForcedModel(model.decoder(variant), variant.kv_cache, exits) for variant in model.variants
    }
    loose = {}
    if exits:
        deployed = models[model.default_variant]
        threshold = loose_threshold(deployed, rows, progress, batch_tokens=options.batch_tokens)
        loose = dict.fromkeys(models, threshold)
    risk_table = model.manifest.risk_table if model.manifest is not None else ()
    modes = modes_of(model.variants, _reference(model), model.default_variant, risk_table, loose)
    with progress.phase("Evaluating every mode", len(modes) * sum(map(len, rows))) as advance:
        return evaluate_modes(
            modes,
            models,
            rows,
            text=data_name(data),
            batch_tokens=options.batch_tokens,
            seed=options.seed,
            advance=advance,
        )


def _reference(model: LoadedModel) -> Variant:
    """The least compressed variant: full weights before full KV before no linear block."""
    return max(model.variants, key=lambda v: (v.weights == "full", v.kv_cache == "full", not v.linear_block))
