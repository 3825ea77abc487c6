"""What is known of a model before it is calibrated or loaded: settings that cannot fit it are refused at once."""

from dataclasses import dataclass
from pathlib import Path

from exeunt.compression.architecture import Architecture, load_architecture
from exeunt.compression.model import default_dtype
from exeunt.compression.variant import KVFormat, Variant, WeightFormat
from exeunt.deploy import packaged_model
from exeunt.deploy.loading import (
    SettingsError,
    Shape,
    Source,
    check_batch,
    check_guard,
    check_plain,
    check_waiting,
    default_variant,
    engine_limits,
    resolve_device,
    resolve_dtype,
)
from exeunt.deploy.packaged import bundle_folder, cache_folder, calibration_options
from exeunt.server.api.compression import NotOfferedError, resolve
from exeunt.server.api.offer import SKIPPED_KV, Certificate, Offer, exit_modes
from exeunt.server.api.schemas import CompressionOptions
from exeunt.server.settings import Settings


@dataclass(frozen=True, slots=True)
class ExpectedModel:
    """A model that is on disk, or will be once it is calibrated.

    `offer` is what requests can ask of it: of what is still to be calibrated the most that this can give.
    """

    spec: Architecture
    offer: Offer


def check_settings(source: Source | None, settings: Settings) -> None:
    """Refuse what cannot fit the model at `source`, None being the packaged one, before the long work.

    A bundle, the packaged model's own included, and a model on the Hub say more when they are loaded.

    Raises SettingsError, and ConfigError or UnsupportedModelError for a checkpoint that cannot be served.
    """
    device = resolve_device(settings.device)
    check_batch(settings)
    check_guard(settings)
    check_waiting(settings)
    if source is None:
        if bundle_folder().exists():
            return
        model = expected_bundle(packaged_model.path(), settings)
    elif source.is_bundle:
        return
    else:
        check_plain(source, settings)
        folder = Path(source.path)
        if not folder.is_dir():
            return
        model = expected_plain(folder)
    check_defaults(settings.default_compression, model.offer)
    check_guarded(settings, model.offer)
    dtype = resolve_dtype(settings.dtype) or default_dtype(model.spec, device)
    default = default_variant(model.offer.default, settings)
    block = 0 if default.linear_block else None  # any: the KV of all blocks is alike in size
    engine_limits(Shape(model.spec, dtype, device, default, block), settings)


def check_defaults(defaults: CompressionOptions, offer: Offer) -> None:
    """Raise SettingsError where `--default-compression` asks for what is not on offer."""
    try:
        resolve(defaults, CompressionOptions(), offer)
    except NotOfferedError as error:
        raise SettingsError(f"--default-compression: {error}") from error


def check_guarded(settings: Settings, offer: Offer) -> None:
    """Raise SettingsError where the exit guard is asked for and there is no certified target that it could guard."""
    certified = any(offer.certified(variant, method) for variant in offer.variants for method in SKIPPED_KV)
    if settings.exit_guard and not certified:
        raise SettingsError(
            "--exit-guard raises the thresholds of certified targets, and this model has none: leave it out, or serve "
            "a bundle whose risk table has some (`exeunt inspect` shows it)."
        )


def expected_bundle(folder: Path, settings: Settings) -> ExpectedModel:
    """What calibrating the packaged model in `folder` can give, as far as it would be loaded.

    Raises SettingsError for a target that calibration does not look at.
    """
    from exeunt.calibration.options import (
        exit_blocks,
    )  # with all that calibrates: not for a server that does not

    spec = load_architecture(folder)
    options = calibration_options(folder, cache_folder())
    early_exit = settings.default_compression.early_exit
    for name, targets in (("max_disagreement", options.targets), ("max_nll_increase", options.nll_targets)):
        asked = None if early_exit is None else getattr(early_exit, name)
        if asked is not None and asked not in targets:
            raise SettingsError(
                f"--default-compression: compression.early_exit.{name} is {asked:g}; the packaged model is calibrated "
                f"for {', '.join(f'{target:g}' for target in targets)}."
            )
    weights: tuple[WeightFormat, ...] = (
        ("int4", "full") if settings.weights == "both" else (settings.weights,)
    )
    kv_cache: tuple[KVFormat, ...] = ("int4", "full")
    variants = tuple(
        Variant(each, kv, linear) for each in weights for kv in kv_cache for linear in (False, True)
    )
    hoped, hoped_nll = (
        tuple(Certificate(target, 1.0) for target in targets)
        for targets in (options.targets, options.nll_targets)
    )
    exits = tuple(f"block_{block}" for block in exit_blocks(spec, options.exits))
    offer = Offer(
        variants=variants,
        default=variants[0],
        exits=exits,
        modes=exit_modes(exits=len(exits), certified=len(exits)),
        certificates={(variant, method): hoped for variant in variants for method in SKIPPED_KV},
        nll_certificates={(variant, method): hoped_nll for variant in variants for method in SKIPPED_KV},
    )
    return ExpectedModel(spec, offer)


def expected_plain(folder: Path) -> ExpectedModel:
    """What a checkpoint gives that is served as it is."""
    spec = load_architecture(folder)
    default = Variant("full", "full", False)
    variants = (default, Variant("full", "int4", False)) if spec.head_dim % 2 == 0 else (default,)
    return ExpectedModel(spec, Offer(variants=variants, default=default))
