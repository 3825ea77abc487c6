"""How the bundle was made: text, splits, seeds, versions, and the costs that were measured on the way."""

from exeunt.calibration.drafting_choice import DEEP_TOKENS
from exeunt.calibration.options import CalibrationOptions
from exeunt.calibration.report.asked import option_lines
from exeunt.calibration.report.content import ReportContent, TextSource
from exeunt.calibration.report.parts import Cell, Details, Section, Table
from exeunt.calibration.report.words import count


def made_section(content: ReportContent) -> Section:
    """The section; every calibration has one."""
    manifest = content.manifest
    parts: list[Table | Details] = [_facts(content)]
    if content.options is not None:
        parts.append(Details("Options", (_options(content.options),)))
    if costs := _costs(content):
        parts.append(Details("Costs measured on the machine that calibrated", costs))
    versions = [[name, version] for name, version in manifest.versions.items()]
    parts.append(
        Details(
            "Versions",
            (Table(("package", "version"), [["exeunt", manifest.exeunt_version], *versions], words=2),),
        )
    )
    return Section(
        "made",
        "How it was made",
        "What it takes to make this bundle again: on one machine's CPU, with one number of threads, the same seed, "
        "model and text give the same bundle to the byte, but for its date, and for what times measured on the machine "
        "decide: which exits are kept and how drafts are made, unless they were named.",
        "On a GPU sums that PyTorch adds in no fixed order may differ in their last digits, and with them what is "
        "rounded and chosen.",
        tuple(parts),
    )


def _facts(content: ReportContent) -> Table:
    manifest, data = content.manifest, content.manifest.calibration
    rows = [["model", f"{manifest.base_model.name}, weights SHA-256 {manifest.base_model.sha256[:16]}…"]]
    if data is not None:
        splits = ", ".join(f"{count(tokens)} to {name}" for name, tokens in data.splits.items())
        rows += [
            ["text", f"{data.data}, SHA-256 {data.sha256[:16]}…"],
            *([["text's source", data.origin]] if data.origin else []),
            *([["documents", _documents(content.text)]] if content.text is not None else []),
            ["tokens", splits],
            ["seed", f"{data.seed}"],
        ]
    rows.append(
        [
            "formats held",
            f"weights {', '.join(manifest.weights)}; keys and values {', '.join(manifest.kv_cache)}",
        ]
    )
    if content.machine:
        rows.append(["machine", content.machine])
    if manifest.int4_group_size is not None:
        rows.append(["INT4 group", f"{manifest.int4_group_size} inputs"])
    return Table(("", ""), rows, words=2)


def _documents(text: TextSource) -> str:
    repeats = f"; {count(text.repeats)} repeats of one were left out" if text.repeats else ""
    if text.rows:
        return (
            f"{count(text.rows)} short rows, joined with their neighbours to {count(text.documents)} passages, which "
            f"were dealt whole: passages of one article may have come to several splits{repeats}"
        )
    return f"{count(text.documents)}, dealt whole{repeats}"


def _options(options: CalibrationOptions) -> Table:
    return Table(("option", "value"), [[name, value] for name, value in option_lines(options)], words=2)


def _costs(content: ReportContent) -> tuple[Table, ...]:
    tables: list[Table] = []
    costs, drafting = content.selection.costs, content.selection.drafting
    if costs is not None:
        rows = [
            ["gate", f"{costs.gate:.3f}"],
            ["first look at logits (a shortlist's, where there is one), in vain", f"{costs.projection:.3f}"],
            ["first look, of a token that leaves, beside all logits, which it owes", f"{costs.leaving:.3f}"],
            ["confirmation by all logits, in vain", f"{costs.whole:.3f}"],
            *([f"look at {count(size)} tokens", f"{look:.3f}"] for size, look in costs.looks),
            ["keys and values of a skipped block", f"{costs.skipped_kv:.3f}"],
        ]
        tables.append(
            Table(("part", "time, in blocks"), rows, caption="A decode batch, in units of one block's time")
        )
    if drafting is not None:
        deep = [f"deep, {tokens} tokens" for tokens in DEEP_TOKENS]
        lines = [
            [Cell(f"after {depth} blocks"), Cell(f"{shallow:.3f}")]
            + [Cell(f"{value:.3f}") for value in drafting.costs.deep[depth]]
            for depth, shallow in drafting.costs.shallow.items()
        ]
        caption = "One stream, in units of the time of a token without drafts"
        tables.append(Table(("exit", "shallow", *deep), lines, caption=caption))
    return tuple(tables)
