"""The card's section on certified exits: what they promise on the model's own text, and what real text says of it."""

import json
from collections.abc import Mapping
from pathlib import Path
from textwrap import fill
from typing import Any

SECTION = """## Certificates, rechecked on real text

Exits (here under INT4 weights and KV cache) are certified on the calibration text above. Here the same thresholds meet
text that people wrote and the model never saw: of the tokens that leave, the share whose top token differs from that
of full depth, with 95 % intervals.

{bundle}

| target | {heads} |
| --- |{rules}
{rows}

{verdict}

`python -m scripts.packaged_model held-out-text RUN --folder TEXTS` writes the texts,
`exeunt eval BUNDLE --data TEXTS/stories.txt --tokens 12000 --no-speed --json FILE` measures them.

"""


def read_evaluations(folder: Path) -> dict[str, Any]:
    """The evaluations on held-out text that `exeunt eval` wrote, by source; empty where there are none."""
    files = {source: folder / f"packaged-held-out-{source}.json" for source in ("stories", "novels")}
    return {
        source: json.loads(file.read_text(encoding="utf-8"))
        for source, file in files.items()
        if file.exists()
    }


def certificate_section(evaluations: Mapping[str, Any]) -> str:
    """The section for evaluations by source; empty without any."""
    if not evaluations:
        return ""
    found = {source: _by_target(evaluation) for source, evaluation in evaluations.items()}
    targets = sorted({target for modes in found.values() for target in modes})
    rows, broken = [], []
    for target in targets:
        cells = []
        for source, modes in found.items():
            mode = modes[target]
            differ = mode["disagreement"]
            leave = mode["exit_rate"]["value"]
            cells.append(
                f"{differ['value']:.1%} ({differ['low']:.1%} to {differ['high']:.1%}), {leave:.0%} leave"
            )
            if differ["value"] > target:
                broken.append(f"{target:.0%} on {source}")
        rows.append(f"| {target:.0%} | {' | '.join(cells)} |")
    heads = [
        f"held-out {source}, {evaluation['tokens']:,} tokens" for source, evaluation in evaluations.items()
    ]
    everywhere = set.intersection(*({*modes} for modes in found.values()))
    thresholds = ", ".join(
        f"{next(iter(found.values()))[target]['mode']['threshold']} for {target:.0%}"
        for target in targets
        if target in everywhere
    )
    model, machine = (next(iter(evaluations.values()))[key] for key in ("model", "machine"))
    verdict = (
        f"NOT kept: {', '.join(broken)}." if broken else "Every target that is certified is kept on both."
    )
    return SECTION.format(
        bundle=_bundle(model["exits"][-1], machine["cpu"], thresholds),
        heads=" | ".join(heads),
        rules=" --- |" * len(heads),
        rows="\n".join(rows),
        verdict=verdict,
    )


def _bundle(deepest: str, cpu: str, thresholds: str) -> str:
    """Which calibration the evaluations are of. Its deepest exit is the one that approximate requests leave at."""
    said = (
        "**Of one calibration, not of every one.** Which exits a bundle keeps is decided by times measured on the "
        "machine that makes it, and with the exits "
        f"thresholds and certified targets change. This bundle was made on a machine that calls its processor {cpu}; "
        f"its tokens leave at `{deepest}`, at the thresholds {thresholds}. A bundle made elsewhere, the one that the "
        "[README](../../README.md#a-first-request) shows among them, may keep another exit with other thresholds, and "
        "certify fewer targets: `exeunt inspect` says which, and the commands below check that bundle's own."
    )
    return fill(said, 120, break_long_words=False, break_on_hyphens=False)


def _by_target(evaluation: Mapping[str, Any]) -> dict[float, Any]:
    """The certified modes of the deployed variant with propagated keys and values, by target."""
    deployed = {"weights": "int4", "kv_cache": "int4", "linear_block": False}
    return {
        mode["mode"]["target"]: mode
        for mode in evaluation["modes"]
        if mode["mode"]["variant"] == deployed
        and mode["mode"]["target"] is not None
        and mode["mode"].get("skipped_kv", "propagate") == "propagate"
    }
