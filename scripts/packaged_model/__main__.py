"""Train, export, measure and describe the packaged model.

``python -m scripts.packaged_model <command> <run folder>``: ``prepare`` → ``train`` (trunk, exits, plain) →
``export`` → ``calibration-text`` → ``measure`` → ``card``.
Training goes on from its last checkpoint when it is run again.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np

from scripts.packaged_model.calibration_text import write_calibration_text
from scripts.packaged_model.card import card
from scripts.packaged_model.certificates import certificate_section, read_evaluations
from scripts.packaged_model.export import export, stage_model
from scripts.packaged_model.facts import gather, write_facts
from scripts.packaged_model.recipe import PRESETS, STAGES
from scripts.packaged_model.tokenizer import load_tokenizer
from scripts.packaged_model.tokens import SOURCES, prepare
from scripts.packaged_model.trainer import Trainer, choose_device

PACKAGED = Path("deploy/packaged_model")
EVALUATIONS = Path("benchmarks/results")
PROGRAM = "python -m scripts.packaged_model"


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = argparse.ArgumentParser(prog=PROGRAM, description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, summary: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=summary, description=summary)
        sub.add_argument("run", type=Path, help="folder of tokens, checkpoints and logs")
        sub.add_argument("--preset", choices=sorted(PRESETS), default="cpu", help="default: cpu")
        return sub

    prepared = command("prepare", "train the tokenizer and encode the texts")
    prepared.add_argument("--data", type=Path, required=True, help="folder holding novels/ and tinystories/")

    train = command("train", "train one stage, or go on with it; exit status 75 if it stopped before its end")
    train.add_argument("--stage", choices=STAGES, required=True)
    train.add_argument("--steps", type=int, help="steps of the stage in all (default: as before)")
    train.add_argument("--minutes", type=float, default=math.inf, help="stop and save after so long")
    train.add_argument("--device", default="auto", help="auto, cpu or cuda")
    train.add_argument("--no-compile", action="store_true", help="do not use torch.compile")

    exported = command("export", "write a stage's model and the tokenizer as a Hugging Face folder")
    exported.add_argument("--stage", choices=STAGES, default="exits")
    exported.add_argument("--folder", type=Path, default=PACKAGED)

    text = command("calibration-text", "let the model write the text it is calibrated on")
    text.add_argument("--stage", choices=STAGES, default="exits")
    text.add_argument("--folder", type=Path, default=PACKAGED)
    text.add_argument("--tokens", type=int, default=400_000)
    text.add_argument("--length", type=int, default=384, help="tokens of a row")
    text.add_argument("--batch", type=int, default=384, help="rows at once")
    text.add_argument("--seed", type=int, default=1)

    measured = command("measure", "measure exits branch and plain twin on held-out text into measured.json")
    measured.add_argument("--folder", type=Path, default=PACKAGED)
    measured.add_argument("--windows", type=int, default=96, help="held-out windows per source")
    measured.add_argument("--hardware", default="two CPU cores", help="in general words, for the card")
    measured.add_argument("--remark", default="", help="added to the sentence on wall time in the card")

    described = command("card", "write MODEL_CARD.md from measured.json and the evaluations on held-out text")
    described.add_argument("--folder", type=Path, default=PACKAGED)
    described.add_argument("--evaluations", type=Path, default=EVALUATIONS)

    kept_back = command(
        "held-out-text", "write the texts that were never trained on, to recheck certificates on"
    )
    kept_back.add_argument("--folder", type=Path, required=True)
    kept_back.add_argument("--tokens", type=int, default=40_000, help="of each source")
    return parser


def run_training(options: argparse.Namespace) -> int:
    """Train a stage; return 0 at its end and 75 (try again) where it stopped before."""
    recipe, steps = PRESETS[options.preset], options.steps
    device = choose_device(options.device)
    trainer = Trainer(options.run, recipe, options.stage, steps, device, compiled=not options.no_compile)
    return 0 if trainer.train(options.minutes) else 75


def run_calibration_text(options: argparse.Namespace) -> int:
    """Write ``calibration.txt`` and, for the card, how many tokens it holds."""
    model = stage_model(options.run, PRESETS[options.preset], options.stage)
    written = write_calibration_text(
        model,
        load_tokenizer(options.run / "tokenizer"),
        options.run,
        options.folder / "calibration.txt",
        tokens=options.tokens,
        length=options.length,
        batch=options.batch,
        seed=options.seed,
    )
    drawn = {"tokens": written, "length": options.length, "batch": options.batch, "seed": options.seed}
    (options.run / "calibration.json").write_text(json.dumps(drawn))
    return 0


def run_measurement(options: argparse.Namespace) -> int:
    """Write ``measured.json``."""
    recipe = PRESETS[options.preset]
    facts = gather(
        options.run,
        recipe,
        windows=options.windows,
        calibration=json.loads((options.run / "calibration.json").read_text()),
        hardware=options.hardware,
        remark=options.remark,
        commands=[],
    )
    exits, preset = facts["exits"], f"--preset {recipe.preset}"
    sampling = " ".join(f"--{name} {value}" for name, value in facts["calibration"].items())
    facts["commands"] = [
        f"{PROGRAM} prepare RUN {preset} --data DATA",
        f"{PROGRAM} train RUN {preset} --stage trunk --steps {exits['trunk_steps']}",
        f"{PROGRAM} train RUN {preset} --stage exits --steps {exits['branch_steps_planned']}",
        f"{PROGRAM} train RUN {preset} --stage plain --steps {exits['branch_steps_planned']}",
        f"{PROGRAM} export RUN {preset} --stage exits",
        f"{PROGRAM} calibration-text RUN {preset} {sampling}",
        f"{PROGRAM} measure RUN {preset} --windows {options.windows}",
        f"{PROGRAM} card RUN {preset}",
    ]
    write_facts(facts, options.folder / "measured.json")
    return 0


def run_card(options: argparse.Namespace) -> int:
    """Write ``MODEL_CARD.md``."""
    facts = json.loads((options.folder / "measured.json").read_text(encoding="utf-8"))
    section = certificate_section(read_evaluations(options.evaluations))
    (options.folder / "MODEL_CARD.md").write_text(card(facts, section), encoding="utf-8")
    return 0


def run_held_out_text(options: argparse.Namespace) -> int:
    """Write ``stories.txt`` and ``novels.txt``."""
    tokenizer = load_tokenizer(options.run / "tokenizer")
    options.folder.mkdir(parents=True, exist_ok=True)
    for source in SOURCES:
        tokens = np.load(options.run / f"{source}.held_out.npy")[: options.tokens]
        text = tokenizer.decode(tokens.tolist(), skip_special_tokens=False)
        (options.folder / f"{source}.txt").write_text(text, encoding="utf-8")
    return 0


def main() -> int:
    """Run one command and return its exit status."""
    options = build_parser().parse_args()
    recipe = PRESETS[options.preset]
    if options.command == "prepare":
        prepare(options.data, options.run, recipe)
    elif options.command == "export":
        export(options.run, recipe, options.stage, options.folder)
    else:
        commands = {
            "train": run_training,
            "calibration-text": run_calibration_text,
            "measure": run_measurement,
            "card": run_card,
            "held-out-text": run_held_out_text,
        }
        return commands[options.command](options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
