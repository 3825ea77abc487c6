"""What `exeunt inspect` says of a bundle: what is inside, what it saves, how it was made, what is certified."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC
from typing import Final, TypeVar

import torch
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from torch import Tensor

from exeunt.compression.architecture import Architecture
from exeunt.compression.bundle import (
    EXITS,
    FULL_WEIGHTS,
    INT4_WEIGHTS,
    LINEAR_BLOCK,
    MANIFEST,
    REPORT_HTML,
    REPORT_JSON,
    Bundle,
)
from exeunt.compression.kv_format import kv_layout, page_bytes_for
from exeunt.compression.manifest import (
    DraftRecord,
    EvaluationRow,
    Manifest,
    NllRiskEntry,
    NllRiskTarget,
    RiskEntry,
    RiskTarget,
)
from exeunt.compression.variant import KVFormat

_KINDS: Final = {
    FULL_WEIGHTS: "weights, full",
    INT4_WEIGHTS: "weights, INT4",
    LINEAR_BLOCK: "linear block",
    EXITS: "exit heads",
    REPORT_HTML: "report",
    REPORT_JSON: "report",
    MANIFEST: "manifest",
}
_OTHER_KIND: Final = "config and tokenizer"
_NEARLY_ALL: Final = 0.995
_UNITS: Final = ("bytes", "kB", "MB", "GB", "TB")

Entry = TypeVar("Entry", RiskEntry, NllRiskEntry)
"""A line of one of the two risk tables."""


@dataclass(frozen=True, slots=True)
class FileSize:
    """One file of a bundle, its kind and its size."""

    name: str
    kind: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Savings:
    """What a bundle's compressed forms take beside the full ones, in bytes.

    `linear_*` are the blocks' linear weights, `model_*` the whole model as served (embedding and norms stay full; a
    tied embedding stays beside its INT4 form as output matrix), both in the checkpoint's own dtype; None where the
    bundle has no INT4 weights. `kv_*` are one token's keys and values in all blocks; None for a format that the bundle
    does not offer. `dtype` is the checkpoint's.
    """

    dtype: str
    linear_full: int | None
    linear_int4: int | None
    model_full: int | None
    model_int4: int | None
    kv_full: int
    kv_int4: int | None


def file_sizes(bundle: Bundle) -> tuple[FileSize, ...]:
    """Every file that the bundle is made of, largest first."""
    sizes = {name: record.bytes for name, record in bundle.manifest.files.items()}
    sizes[MANIFEST] = (bundle.path / MANIFEST).stat().st_size
    files = [FileSize(name, _KINDS.get(name, _OTHER_KIND), size) for name, size in sizes.items()]
    return tuple(sorted(files, key=lambda file: (-file.bytes, file.name)))


def kind_sizes(bundle: Bundle) -> dict[str, int]:
    """Bytes of each kind of file, largest first."""
    sizes: dict[str, int] = {}
    for file in file_sizes(bundle):
        sizes[file.kind] = sizes.get(file.kind, 0) + file.bytes
    return dict(sorted(sizes.items(), key=lambda item: -item[1]))


def savings(bundle: Bundle) -> Savings:
    """What INT4 saves of this bundle's model; raises BundleError or ConfigError where its parts do not fit."""
    spec = bundle.architecture()
    weights = bundle.tensors(FULL_WEIGHTS if "full" in bundle.manifest.weights else INT4_WEIGHTS)
    dtype = max(
        (t for t in weights.values() if t.is_floating_point()), key=lambda tensor: tensor.nbytes
    ).dtype
    kv = {name: _kv_bytes(spec, name, dtype) for name in bundle.manifest.kv_cache}
    kv_full = _kv_bytes(spec, "full", dtype)
    if "int4" not in bundle.manifest.weights:
        return Savings(_name(dtype), None, None, None, None, kv_full, kv.get("int4"))
    int4 = bundle.tensors(INT4_WEIGHTS)
    packed = {name: t for name, t in int4.items() if name.endswith((".codes", ".scales", ".offsets"))}
    linears = {name: t for name, t in packed.items() if name.startswith("blocks.")}
    codes = sum(tensor.nbytes for name, tensor in linears.items() if name.endswith(".codes"))
    linear_full = 2 * codes * dtype.itemsize  # two weights to a byte of codes
    linear_int4, output_int4 = _bytes(linears), _bytes(packed) - _bytes(linears)
    output_full = 0 if spec.tied else spec.vocab_size * spec.hidden_size * dtype.itemsize
    if "full" in bundle.manifest.weights:
        rest = _bytes(weights) - linear_full - output_full
    else:
        rest = _bytes(weights) - _bytes(packed)
    return Savings(
        _name(dtype),
        linear_full,
        linear_int4,
        linear_full + output_full + rest,
        linear_int4 + output_int4 + rest,
        kv_full,
        kv.get("int4"),
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def _kv_bytes(spec: Architecture, format: KVFormat, dtype: torch.dtype) -> int:
    return kv_layout(spec, format, dtype, page_bytes_for(spec, dtype)).bytes_per_token


def describe(bundle: Bundle) -> dict[str, object]:
    """The bundle as JSON-ready data: its manifest, sizes by file and kind, and what it saves."""
    return {
        "path": str(bundle.path),
        "manifest": bundle.manifest.model_dump(mode="json"),
        "files": [asdict(file) for file in file_sizes(bundle)],
        "bytes_by_kind": kind_sizes(bundle),
        "bytes": sum(file.bytes for file in file_sizes(bundle)),
        "savings": asdict(savings(bundle)),
    }


def render(bundle: Bundle) -> RenderableType:
    """The bundle for a terminal."""
    manifest = bundle.manifest
    parts: list[RenderableType] = [
        _overview(bundle),
        _files_table(bundle),
        _savings_table(savings(bundle)),
    ]
    if manifest.exits:
        parts.append(_exits_table(manifest))
    parts += [_certificates(*kind) for kind in _kinds(manifest.risk_table)]
    parts += [_certificates(*kind) for kind in _kinds(manifest.nll_risk_table)]
    if manifest.evaluation:
        parts.append(_evaluation_table(manifest.evaluation))
    return Group(*(part for each in parts for part in (each, Text())))


def _overview(bundle: Bundle) -> Table:
    manifest = bundle.manifest
    base = manifest.base_model
    lines = {
        "bundle": str(bundle.path),
        "model": f"{base.name} ({base.architecture}, {base.blocks} blocks, {base.parameters:,} parameters)",
        "model SHA-256": base.sha256,
        "holds": _held(manifest),
        "made": f"{manifest.created.astimezone(UTC):%Y-%m-%d %H:%M} UTC by Exeunt {manifest.exeunt_version}",
        "versions": ", ".join(f"{name} {version}" for name, version in manifest.versions.items()),
    }
    if manifest.calibration is not None:
        data = manifest.calibration
        splits = ", ".join(f"{name} {tokens:,}" for name, tokens in data.splits.items())
        origin = f"; {data.origin}" if data.origin else ""
        lines["data"] = f"{data.data}, {data.tokens:,} tokens ({splits}), seed {data.seed}{origin}"
        lines["data SHA-256"] = data.sha256
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in lines.items():
        if value:
            table.add_row(name, _text(value))
    return table


def _held(manifest: Manifest) -> str:
    int4 = f" (groups of {manifest.int4_group_size})" if manifest.int4_group_size else ""
    alone = "" if "full" in manifest.weights else ", no full-precision copy of them"
    parts = [
        f"{' and '.join(manifest.weights)} weights{int4}{alone}",
        f"{' and '.join(manifest.kv_cache)} KV",
    ]
    if (block := manifest.linear_block) is not None:
        parts.append(
            f"block {block.index} as a linear map of rank {block.rank} (R² {block.r2:.3f}, {block.parameters:,} "
            f"for {block.replaced_parameters:,} parameters)"
        )
    parts.append(f"{len(manifest.exits) or 'no'} exit{'' if len(manifest.exits) == 1 else 's'}")
    return "; ".join(parts)


def _files_table(bundle: Bundle) -> Table:
    table = _table("Files", "file", "kind", right=("size",))
    files = file_sizes(bundle)
    for file in files:
        table.add_row(_text(file.name), file.kind, _size(file.bytes))
    table.add_section()
    for kind, size in kind_sizes(bundle).items():
        table.add_row("", kind, _size(size))
    table.add_section()
    table.add_row("", "all", _size(sum(file.bytes for file in files)))
    return table


def _savings_table(saved: Savings) -> RenderableType:
    table = _table("What INT4 saves", "part", right=("full", "INT4", "ratio"))
    rows = [
        ("linear weights of the blocks", saved.linear_full, saved.linear_int4),
        ("whole model", saved.model_full, saved.model_int4),
        ("KV cache, per token", saved.kv_full, saved.kv_int4),
    ]
    for name, full, int4 in rows:
        if full is not None:
            table.add_row(
                name,
                _size(full),
                "-" if int4 is None else _size(int4),
                f"{full / int4:.2f}×" if int4 else "-",
            )
    wide = ", twice as many bytes of each full weight, key and value" if saved.dtype != "float32" else ""
    held = f"Full ones in {saved.dtype}, the checkpoint's dtype; a CPU serves in float32 unless told otherwise{wide}."
    return Group(table, _text(held))


def _exits_table(manifest: Manifest) -> RenderableType:
    """One line an exit; below it what is expected of the one that drafts."""
    table = _table("Exits", "exit", "use", right=("depth", "agreement", "untrained", "gate AUC", "tokens"))
    any_certified = any(line.certified for entry in manifest.risk_table for line in entry.targets)
    may_leave = "certified" if any_certified else "tested, no target certified"
    for record in manifest.exits:
        uses = [*([may_leave] if record.certified else []), *(["drafts"] if record.drafting else [])]
        table.add_row(
            _text(record.name),
            ", ".join(uses) or "-",
            f"{record.block + 1} of {manifest.base_model.blocks}",
            _percent(record.agreement),
            _percent(record.untrained_agreement),
            _number(record.auc, 3),
            f"{record.tokens:,}",
        )
    expected = [_expected(record.name, record.draft) for record in manifest.exits if record.draft is not None]
    return Group(table, *(_text(each) for each in expected))


def _expected(name: str, draft: DraftRecord) -> str:
    return (
        f"{name} drafts up to {draft.length} in a row where its gate says {_number(draft.threshold, 4)}: "
        f"{_percent(draft.drafted)} of the tokens, {_percent(draft.acceptance)} of them rightly; expected "
        f"{draft.speed:.2f}× the speed without drafts, one stream, where it was calibrated"
    )


def _kinds(risk_table: Iterable[Entry]) -> list[tuple[float, str, list[Entry]]]:
    """The entries of each confidence and skipped-KV method; those of both methods once where they say the same."""
    kinds: dict[tuple[float, str], list[Entry]] = {}
    for entry in risk_table:
        kinds.setdefault((entry.confidence, entry.skipped_kv), []).append(entry)
    found: list[tuple[float, str, list[Entry]]] = []
    for (confidence, skipped_kv), entries in sorted(kinds.items(), key=lambda kind: kind[0]):
        said = [(entry.variant, entry.targets) for entry in entries]
        if found and found[-1][0] == confidence and said == [(e.variant, e.targets) for e in found[-1][2]]:
            found[-1] = (confidence, f"{found[-1][1]} or {skipped_kv}", entries)
        else:
            found.append((confidence, skipped_kv, entries))
    return found


def _certificates(confidence: float, skipped_kv: str, entries: Sequence[Entry]) -> RenderableType:
    """One line a variant: each target's threshold and the share of tokens that leave; below it what is missing."""
    targets = sorted({line.target for entry in entries for line in entry.targets})
    what, shown = "disagreement", _share
    if isinstance(entries[0], NllRiskEntry):
        what = f"rise of the mean NLL (a token's clipped at {entries[0].clip:g}), nats per token"
        shown = _nats
    title = (
        f"Thresholds certified at {100 * confidence:.4g}%, by {what}; in brackets what leaves ({skipped_kv})"
    )
    table = _table("", "weights/KV", right=tuple(shown(target) for target in targets))
    missing: dict[str, list[str]] = {}  # by reason
    for entry in entries:
        name = f"{entry.weights}/{entry.kv_cache}{' linear' if entry.linear_block else ''}"
        lines: dict[float, RiskTarget | NllRiskTarget] = {line.target: line for line in entry.targets}
        table.add_row(name, *(_certificate(lines.get(target)) for target in targets))
        for line in entry.targets:
            if not line.certified:
                reason = line.reason or "no threshold is safe"
                missing.setdefault(reason, []).append(f"{name}, {shown(line.target)}")
    told = (f"not certified: {'; '.join(rows)}: {reason}" for reason, rows in missing.items())
    return Group(_text(title, style="bold"), table, *map(_text, told))


def _certificate(line: RiskTarget | NllRiskTarget | None) -> str:
    if line is None or not line.certified:
        return "-"
    return f"{_number(line.threshold, 4)} ({_percent(line.exit_rate, 2)})"


def _evaluation_table(rows: Iterable[EvaluationRow]) -> Table:
    table = _table(
        "Evaluation on held-out text, teacher-forced",
        "mode",
        right=("perplexity", "KL", "agree", "depth", "leave", "tokens"),
    )
    for row in rows:
        table.add_row(
            _text(row.name),
            f"{row.perplexity:.3f}",
            _number(row.kl, 4),
            _percent(row.agreement),
            f"{row.mean_depth:.2f}",
            _percent(row.exit_rate),
            f"{row.tokens:,}",
        )
    return table


def _table(title: str, *left: str, right: tuple[str, ...]) -> Table:
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for name in left:
        table.add_column(name, overflow="fold", min_width=12)
    for name in right:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _text(words: str, style: str = "") -> Text:
    """`words` as they are, without markup; control characters, which a terminal would obey, as escapes."""
    shown = (each if each.isprintable() else each.encode("unicode_escape").decode() for each in words)
    return Text("".join(shown), style=style)


def _size(size: int) -> str:
    """Bytes as people read them, in powers of 1000."""
    value, unit = float(size), 0
    while value >= 1000 and unit < len(_UNITS) - 1:
        value, unit = value / 1000, unit + 1
    return f"{size} bytes" if unit == 0 else f"{value:.1f} {_UNITS[unit]}"


def _percent(share: float | None, digits: int = 3) -> str:
    if share is None:
        return "-"
    digits = max(digits, 3) if share >= _NEARLY_ALL else digits  # two digits have no room for 100
    return f"{100 * share:.{digits}g} %"


def _share(target: float) -> str:
    return _percent(target)


def _nats(target: float) -> str:
    return f"{target:g}"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
