"""`exeunt eval`: every mode of a loaded model on a text of the user's."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from torch import Tensor

from exeunt.calibration.bundle_manifest import data_name
from exeunt.calibration.corpus import numbered_rows_of, read_corpus
from exeunt.calibration.errors import OptionError
from exeunt.calibration.evaluation import EvaluationTable, Mode, evaluate_modes
from exeunt.calibration.generation import TEMPERATURES, GenerationSize, Written, generate_modes
from exeunt.calibration.modes import plan_modes
from exeunt.calibration.option_limits import check_seed
from exeunt.calibration.page_arena import PageArena
from exeunt.calibration.progress import ProgressReport
from exeunt.calibration.scored_text import ScoredText, sliding_windows
from exeunt.calibration.teacher_forcing import ForcedModel
from exeunt.calibration.text_encoding import separator, text_encoding
from exeunt.calibration.trade_off import TradeOff, trade_offs
from exeunt.compression.architecture import ConfigError, UnsupportedModelError, load_architecture
from exeunt.compression.model import LoadedModel
from exeunt.compression.variant import Variant

WINDOW: Final = 512
LEAST_WINDOW: Final = 16


@dataclass(frozen=True, slots=True)
class EvaluationOptions:
    """How much of the text is used, and how. Lengths are tokens.

    `window` None is `WINDOW`, or a shorter context that the model has; `stride` None is the window: rows side by side.
    Raises OptionError for what cannot be.
    """

    tokens: int = 16_000  # that count
    window: int | None = None
    stride: int | None = None
    batch_tokens: int = 4096
    seed: int = 0  # of the documents' order, the bootstrap and what is drawn
    generate: bool = False  # let every mode write, too

    def __post_init__(self) -> None:
        check_seed(self.seed)
        if self.tokens < LEAST_WINDOW:
            raise OptionError(
                f"{self.tokens} tokens are too few to evaluate on; give at least {LEAST_WINDOW}."
            )
        if self.window is not None and self.window < LEAST_WINDOW:
            raise OptionError(
                f"A window of {self.window} tokens is too short to evaluate in; give at least {LEAST_WINDOW}."
            )
        if self.stride is not None and self.stride < 1:
            raise OptionError(f"The stride is {self.stride} tokens; it must be at least 1.")
        self._check_stride(self.window or WINDOW)

    def window_and_stride(self, context: int) -> tuple[int, int]:
        """Both for a model of that context; raises OptionError for what the model cannot read."""
        if self.window is not None and self.window > context:
            raise OptionError(
                f"The window of {self.window} tokens is longer than the model's context; give at most {context}."
            )
        window = min(self.window or WINDOW, context)
        self._check_stride(window)
        return window, self.stride or window

    def check_for(self, directory: Path) -> None:
        """Raise OptionError for what the model in `directory` cannot read, before its weights are read."""
        if self.window is None and self.stride is None:
            return
        with suppress(ConfigError, UnsupportedModelError):  # to be told by whoever loads it
            self.window_and_stride(load_architecture(directory).max_position_embeddings)

    def _check_stride(self, window: int) -> None:
        if self.stride is not None and self.stride > window:
            raise OptionError(
                f"The stride of {self.stride} tokens is longer than the window of {window}, and what lies between two "
                "windows would count nowhere; give a stride of at most the window."
            )


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Every mode's figures, the default variant's price of exits beside the paper's, and what modes wrote if asked."""

    table: EvaluationTable
    trade_off: tuple[TradeOff, ...]
    written: tuple[Written, ...]


def evaluate(
    model: LoadedModel, data: str, options: EvaluationOptions, progress: ProgressReport
) -> Evaluation:
    """The figures of every mode that `model` holds, on the text `data` (see `corpus.read_corpus`).

    The reference is full weights, full KV, full depth; where only INT4 weights are loaded, those. Raises CorpusError,
    and OptionError for a window that the model cannot read.
    """
    text = _text(model, data, options, progress)
    exits, arena = [model.exits[place] for place in model.certified_exits], PageArena()
    models = {
        variant: ForcedModel(model.decoder(variant), variant.kv_cache, exits, arena)
        for variant in model.variants
    }
    plan = plan_modes(
        models,
        model.variants,
        _reference(model),
        model.default_variant,
        model.manifest.risk_table if model.manifest is not None else (),
        text.rows,
        progress,
        batch_tokens=options.batch_tokens,
        nll_table=model.manifest.nll_risk_table if model.manifest is not None else (),
        both=True,
    )
    work = (len(plan.modes) + len(plan.sweep)) * text.read
    with progress.phase("Evaluating every mode", work) as advance:
        table = evaluate_modes(
            plan.modes,
            models,
            text,
            text=data_name(data),
            batch_tokens=options.batch_tokens,
            seed=options.seed,
            sweep=plan.sweep,
            advance=advance,
        )
    written = _written(model, models, plan.modes, text.rows, options, progress) if options.generate else ()
    return Evaluation(table, trade_offs(table, model.default_variant), written)


def _written(
    model: LoadedModel,
    models: Mapping[Variant, ForcedModel],
    modes: Sequence[Mode],
    rows: Sequence[Tensor],
    options: EvaluationOptions,
    progress: ProgressReport,
) -> tuple[Written, ...]:
    size = GenerationSize().fitted(rows, model.spec.max_position_embeddings)
    work = len(modes) * len(TEMPERATURES) * size.tokens
    with progress.phase("Letting every mode write", work) as advance:
        return generate_modes(
            modes,
            models,
            models[modes[0].variant],
            rows,
            size,
            model.tokenizer.decode,
            seed=options.seed,
            temperatures=TEMPERATURES,
            advance=advance,
        )


def _text(model: LoadedModel, data: str, options: EvaluationOptions, progress: ProgressReport) -> ScoredText:
    spec, tokens, seed = model.spec, options.tokens, options.seed
    window, stride = options.window_and_stride(spec.max_position_embeddings)
    corpus = read_corpus(data, separator(model.tokenizer))
    if corpus.rows:  # what was read is not what the text calls its documents
        progress.note(f"{data}: {corpus.in_words()}.")
    encoding = text_encoding(model.tokenizer, spec)
    if stride == window:
        numbered = numbered_rows_of(corpus, encoding, tokens=tokens, row_tokens=window, seed=seed)
        numbers, rows = zip(*numbered, strict=True)
        return ScoredText.of_rows(rows, numbers)
    return sliding_windows(corpus, encoding, tokens=tokens, window=window, stride=stride, seed=seed)


def _reference(model: LoadedModel) -> Variant:
    """The least compressed variant: full weights before full KV before no linear block."""
    return max(model.variants, key=lambda v: (v.weights == "full", v.kv_cache == "full", not v.linear_block))
