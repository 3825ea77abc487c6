"""What a bundle says about itself: its `manifest.json`, versioned and checked.

Reading is strict about what this version knows (types, ranges, NaN) and lenient about the rest: a key it does
not know is ignored, because within one format version new keys only add information. A change that an older
reader would misunderstand raises `FORMAT_VERSION`, and a newer version is refused whatever else it holds. The
manifest carries a checksum of all its other keys, known or not, so that an altered threshold is noticed like
an altered weight.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated, Any, Final, Literal, Self

from pydantic import (
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from exeunt.compression.architecture import Architecture, check_architecture
from exeunt.compression.bundle_format import BUNDLE_KIND, FORMAT_VERSION, PLAIN_VERSION
from exeunt.compression.rope import RopeSpec
from exeunt.compression.variant import KVFormat, SkippedKV, Variant, WeightFormat

CHECKSUM_KEY: Final = "manifest_sha256"

_ARCHITECTURE_KEYS: Final = {field.name for field in fields(Architecture)}
_ROPE_KEYS: Final = {field.name for field in fields(RopeSpec)}

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=0)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class ManifestError(ValueError):
    """A manifest that cannot be used; the message is one sentence that says why."""


class Record(BaseModel):
    """A frozen part of the manifest. Keys it does not know are ignored, NaN and infinity are refused."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class BaseModelRecord(Record):
    """The checkpoint a bundle was made from. `sha256` is over its weight files, `parameters` a count."""

    name: str
    architecture: str
    sha256: Sha256
    parameters: Count
    blocks: Count


class LinearBlockRecord(Record):
    """The block that a linear map replaces. `r2` is that of the fitted block on held-out activations."""

    index: Count
    rank: Annotated[int, Field(ge=1)]
    r2: float
    parameters: Count
    replaced_parameters: Count
    r2_by_block: tuple[float, ...] = ()  # of a full-rank map for every block of the model


class DraftRecord(Record):
    """What calibration expects of an exit that drafts for the verified mode, one stream, greedy.

    At `threshold` the gate lets the exit draft `drafted` of the tokens, of which `acceptance` are right, both counted
    on the select split; `length` is the most drafts in a row. `speed` is the expected ratio to no drafts, from times
    that were measured on the machine that calibrated: below 1 no drafting exit pays there.
    """

    threshold: Share
    length: Annotated[int, Field(ge=1)]
    drafted: Share
    acceptance: Share
    speed: Annotated[float, Field(gt=0.0)]


class ExitRecord(Record):
    """One exit. `agreement` is the share of held-out tokens on which its top token is the full model's.

    At a `certified` exit tokens of the approximate mode may leave, and the risk table speaks of these exits together;
    the one that is `drafting` proposes tokens in the verified mode. An exit may be both.
    """

    block: Count
    name: str
    agreement: Share
    untrained_agreement: Share | None = None  # the model's own head at this depth, before any fitting
    auc: Share | None = None  # of the gate's confidence against agreement
    tokens: Count = 0  # held-out tokens behind these figures
    certified: bool = True
    drafting: bool = False
    draft: DraftRecord | None = None  # of the exit that drafts

    @model_validator(mode="after")
    def _name_follows_block(self) -> Self:
        if self.name != f"block_{self.block}":
            raise ValueError(f"the exit after block {self.block} is named {self.name!r}")
        return self


class RiskTarget(Record):
    """One line of the risk table: the threshold whose disagreement is below `target` with stated confidence.

    `disagreement` and `upper_bound` are of tokens that left early, on held-out text, at `threshold`;
    `exit_rate` is the share of tokens that left. Not certified: `threshold` is None and `reason` says why.
    """

    target: Share
    certified: bool
    threshold: Share | None = None
    exit_rate: Share | None = None
    disagreement: Share | None = None
    upper_bound: Share | None = None
    tokens: Count = 0  # tokens that left early in the certifying data
    reason: str | None = None

    @model_validator(mode="after")
    def _certified_means_threshold(self) -> Self:
        if self.certified and self.threshold is None:
            raise ValueError(f"the target {self.target} is certified but has no threshold")
        return self


class RiskEntry(Record):
    """The certified targets of one combination of variant and skipped-KV method."""

    weights: WeightFormat
    kv_cache: KVFormat
    linear_block: bool
    skipped_kv: SkippedKV
    targets: tuple[RiskTarget, ...]
    confidence: Share = 0.95  # of each certificate: 1 - delta
    text_blocks: Count = 0  # independent blocks of text behind it

    @property
    def variant(self) -> Variant:
        """The variant this entry is about."""
        return Variant(self.weights, self.kv_cache, self.linear_block)


class NllRiskTarget(Record):
    """One line of the other risk table: the threshold at which text becomes less likely by at most `target`.

    `target`, `increase` and `upper_bound` are means over all tokens of held-out text, in nats per token, of the rise of
    the negative log-likelihood over full depth of the same variant, each token's clipped to ± the entry's `clip`; with
    the entry's confidence the mean is below `upper_bound`. `unclipped` is the mean without a clip, with the 95 %
    interval `unclipped_low` to `unclipped_high`, and the perplexities follow from it: none of these is certified. Not
    certified: `threshold` is None and `reason` says why.
    """

    target: Annotated[float, Field(gt=0.0)]
    certified: bool
    threshold: Share | None = None
    exit_rate: Share | None = None
    increase: float | None = None
    upper_bound: float | None = None
    unclipped: float | None = None
    unclipped_low: float | None = None
    unclipped_high: float | None = None
    perplexity: float | None = None  # of the mode, unclipped
    full_perplexity: float | None = None  # of full depth of the same variant
    tokens: Count = 0  # all tokens of the certifying text that count
    reason: str | None = None

    @model_validator(mode="after")
    def _certified_means_threshold(self) -> Self:
        if self.certified and self.threshold is None:
            raise ValueError(f"the NLL target {self.target} is certified but has no threshold")
        return self


class NllRiskEntry(Record):
    """The certified NLL targets of one combination of variant and skipped-KV method."""

    weights: WeightFormat
    kv_cache: KVFormat
    linear_block: bool
    skipped_kv: SkippedKV
    targets: tuple[NllRiskTarget, ...]
    clip: Annotated[float, Field(gt=0.0)]  # nats: what one token may count at most
    confidence: Share = 0.95
    text_blocks: Count = 0  # independent blocks of text behind it

    @property
    def variant(self) -> Variant:
        """The variant this entry is about."""
        return Variant(self.weights, self.kv_cache, self.linear_block)


class EvaluationRow(Record):
    """One mode on held-out text, teacher-forced. KL is in nats per token, against the uncompressed model."""

    name: str
    weights: WeightFormat
    kv_cache: KVFormat
    linear_block: bool
    early_exit: Literal["off", "verified", "approximate"] = "off"
    skipped_kv: SkippedKV | None = None
    target: Share | None = None  # of disagreement
    nll_target: Annotated[float, Field(gt=0.0)] | None = None  # of the rise of the mean NLL, nats a token
    threshold: Share | None = None
    perplexity: Annotated[float, Field(gt=0.0)]
    kl: float | None = None
    agreement: Share | None = None  # of the top token with the uncompressed model's
    mean_depth: Annotated[float, Field(ge=0.0)]
    exit_rate: Share
    passes_saved: Share | None = None  # of the blocks' passes, those that no token had to wait for
    compute_saved: float | None = None  # of full depth's multiply-accumulates, net: exits may only cost
    tokens: Count

    @property
    def variant(self) -> Variant:
        """The variant this row is about."""
        return Variant(self.weights, self.kv_cache, self.linear_block)


class CalibrationRecord(Record):
    """The data behind a bundle. `splits` maps a split's use to its tokens; `origin` is the text's source."""

    data: str
    sha256: Sha256
    tokens: Count
    splits: dict[str, Count]
    seed: int
    origin: str | None = None


class FileRecord(Record):
    """One file of the bundle: SHA-256 and size in bytes."""

    sha256: Sha256
    bytes: Count


class Manifest(Record):
    """The contents of `manifest.json`."""

    kind: Literal["exeunt-bundle"] = BUNDLE_KIND
    format_version: int = PLAIN_VERSION  # `write_bundle` raises it where the exits need it
    created: AwareDatetime
    exeunt_version: str
    base_model: BaseModelRecord
    weights: tuple[WeightFormat, ...]
    kv_cache: tuple[KVFormat, ...]
    int4_group_size: Annotated[int, Field(ge=1)] | None = None
    linear_block: LinearBlockRecord | None = None
    exits: tuple[ExitRecord, ...] = ()
    risk_table: tuple[RiskEntry, ...] = ()
    nll_risk_table: tuple[NllRiskEntry, ...] = ()
    evaluation: tuple[EvaluationRow, ...] = ()
    calibration: CalibrationRecord | None = None
    architecture: Architecture | None = (
        None  # worked out of config.json; None in bundles made before it was kept
    )
    tokenizer_class: str | None = None  # of transformers; None: to be found by config.json
    versions: dict[str, str] = {}
    files: dict[str, FileRecord] = {}

    @field_validator("architecture", mode="before")
    @classmethod
    def _of_these_keys(cls, value: Any) -> Any:
        """None where another release wrote it, with keys that say more or less: config.json then has the word.

        A key that is not known may change the model, and what is passed over silently would make it another.
        """
        if not isinstance(value, dict):
            return value
        rope = value.get("rope")
        known = value.keys() == _ARCHITECTURE_KEYS
        return value if known and (not isinstance(rope, dict) or rope.keys() == _ROPE_KEYS) else None

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if not self.weights or not self.kv_cache:
            raise ValueError("a bundle holds at least one weight format and one KV format")
        if "int4" in self.weights and self.int4_group_size is None:
            raise ValueError("INT4 weights need an int4_group_size")
        for name in self.files:
            if not _is_plain_name(name):
                raise ValueError(f"{name!r} is not the name of a file inside the bundle")
        if sum(record.drafting for record in self.exits) > 1:
            raise ValueError("more than one exit is the drafting one")
        if self.architecture is not None:
            check_architecture(self.architecture)
        return self


def manifest_json(manifest: Manifest) -> str:
    """The text of `manifest.json`, checksum included."""
    fields = manifest.model_dump(mode="json")
    return json.dumps({**fields, CHECKSUM_KEY: _checksum(fields)}, indent=1, ensure_ascii=False) + "\n"


def read_manifest(text: str) -> Manifest:
    """The manifest in `text`; raises ManifestError when it is broken, newer, altered or of something else."""
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:  # the first also for a number of too many digits
        raise ManifestError(f"manifest.json is not valid JSON ({error})") from error
    if not isinstance(fields, dict) or fields.get("kind") != BUNDLE_KIND:
        raise ManifestError("manifest.json is not that of an Exeunt bundle")
    _check_version(fields.get("format_version"))
    if fields.pop(CHECKSUM_KEY, None) != _checksum(fields):
        raise ManifestError(
            "manifest.json was altered after the bundle was made (its checksum does not match); "
            "copy the bundle again or calibrate anew"
        )
    try:
        return Manifest.model_validate(fields)
    except ValidationError as error:
        raise ManifestError(_first_problem(error)) from error


def _check_version(version: object) -> None:
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ManifestError(
            f"manifest.json has the format version {version!r}, it must be a positive integer"
        )
    if version > FORMAT_VERSION:
        raise ManifestError(
            f"the bundle has format version {version}, this Exeunt reads up to {FORMAT_VERSION}; "
            "install a newer Exeunt or calibrate anew with this one"
        )


def _checksum(fields: Mapping[str, object]) -> str:
    canonical = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _is_plain_name(name: str) -> bool:
    return name not in ("", ".", "..") and not any(sign in name for sign in "/\\\0")


def _first_problem(error: ValidationError) -> str:
    problem = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in problem["loc"]) or "manifest"
    return f"manifest.json: {where}: {problem['msg'][:1].lower()}{problem['msg'][1:]}"
