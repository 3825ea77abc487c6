"""The model card, written from measured numbers."""

from pathlib import Path
from typing import Any

from scripts.packaged_model.corpus import HELD_OUT_NOVELS, HELD_OUT_STORIES

_UNFINISHED = " A branch was measured before its end."
_TEMPLATE = Path(__file__).with_name("card_template.md")


def verdict(ratios: dict[str, float], limit: float = 1.03) -> str:
    """Return one sentence on whether training for exits cost quality at full depth, from exits / plain ratios."""
    told = ", ".join(f"{100 * (ratio - 1):+.1f} % on {source}" for source, ratio in ratios.items())
    kept = all(ratio <= limit for ratio in ratios.values())
    outcome = "kept" if kept else "NOT kept everywhere"
    return (
        f"perplexity against the plain twin is {told}: the limit of +{100 * (limit - 1):.0f} % is {outcome}."
    )


def card(facts: dict[str, Any], certificates: str = "") -> str:
    """Return the model card for the facts that ``measured.json`` holds, with the section on certificates."""
    recipe, exits, plain = facts["recipe"], facts["exits"], facts["plain"]
    lengths = {"held_out": recipe["context"], "held_out_short": recipe["context"] // recipe["trunk_split"]}
    perplexity_rows = "\n".join(
        _perplexity_row(f"{source}, windows of {length:,}", exits[kind][source], plain[kind][source])
        for kind, length in lengths.items()
        for source in exits[kind]
    )
    ratios = {
        f"{source} in windows of {length:,}": _ratio(exits[kind][source], plain[kind][source])
        for kind, length in lengths.items()
        for source in exits[kind]
    }
    seen = exits["tokens_seen"]
    branched = exits["branch_steps"] * recipe["branch_story_windows"]
    stories_seen = recipe["context"] * (exits["trunk_steps"] * recipe["story_windows"] + branched)
    return _TEMPLATE.read_text(encoding="utf-8").format(
        **{
            **recipe,
            **{
                name: exits[name]
                for name in ("parameters", "trunk_steps", "branch_steps", "tokens_seen", "trunk_minutes")
            },
        },
        head_size=recipe["hidden"] // recipe["heads"],
        train_novels=facts["train_tokens"]["novels"],
        train_stories=facts["train_tokens"]["stories"],
        held_out_count=len(HELD_OUT_NOVELS),
        held_out_novels=", ".join(sorted(name.replace("_", " ") for name in HELD_OUT_NOVELS)),
        held_out_stories=HELD_OUT_STORIES,
        trunk_story_share=recipe["story_windows"] / recipe["windows"],
        branch_story_share=recipe["branch_story_windows"] / recipe["windows"],
        story_epochs=stories_seen / facts["train_tokens"]["stories"],
        novel_epochs=(seen - stories_seen) / facts["train_tokens"]["novels"],
        planned=exits["branch_steps_planned"],
        unfinished="" if exits["finished"] and plain["finished"] else _UNFINISHED,
        step_tokens=recipe["windows"] * recipe["context"],
        trunk_length=recipe["context"] // recipe["trunk_split"],
        branch_length=recipe["context"] // recipe["branch_split"],
        exits_minutes=exits["branch_minutes"],
        plain_minutes=plain["branch_minutes"],
        hardware=facts["hardware"],
        contention=facts["remark"],
        perplexity_rows=perplexity_rows,
        verdict=verdict(ratios),
        certificates=certificates,
        depth_rows="\n".join(_depth_row(exits, plain, depth) for depth in range(recipe["blocks"])),
        calibration_tokens=facts["calibration"]["tokens"],
        calibration_seed=facts["calibration"]["seed"],
        sample_temperature=facts["samples"]["temperature"],
        sample_seed=facts["samples"]["seed"],
        samples="\n\n".join(_quoted(sample) for sample in facts["samples"]["texts"]),
        commands="\n".join(facts["commands"]),
    )


def _ratio(exits: dict[str, Any], plain: dict[str, Any]) -> float:
    return float(exits["perplexity"][-1] / plain["perplexity"][-1])


def _perplexity_row(name: str, exits: dict[str, Any], plain: dict[str, Any]) -> str:
    values = f"{exits['perplexity'][-1]:.2f} | {plain['perplexity'][-1]:.2f} | {_ratio(exits, plain):.3f}"
    return f"| {name} | {exits['tokens']:,} | {values} |"


def _depth_row(exits: dict[str, Any], plain: dict[str, Any], depth: int) -> str:
    agreements = (
        f"{exits['held_out'][source]['agreement'][depth]:.3f} / {plain['held_out'][source]['agreement'][depth]:.3f}"
        for source in ("stories", "novels")
    )
    perplexities = (
        f"{exits['held_out'][source]['perplexity'][depth]:.1f}" for source in ("stories", "novels")
    )
    return f"| {depth + 1} | {' | '.join(agreements)} | {' / '.join(perplexities)} |"


def _quoted(sample: dict[str, str]) -> str:
    given = f"*given: {sample['prompt']!r}*" if sample["prompt"] else "*given: nothing*"
    lines = "\n>\n".join(f"> {line}" for line in sample["text"].split("\n"))
    return f"{given}\n\n{lines}"
