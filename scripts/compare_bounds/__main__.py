"""Compares bounds on simulated texts, `python -m scripts.compare_bounds simulate`, minutes on one core; measures how
alike stretches of real documents are, `python -m scripts.compare_bounds correlation BUNDLE FOLDER`; tells what rare
documents hide from any bound, `python -m scripts.compare_bounds rare`, seconds.
"""

from itertools import product
from pathlib import Path
from typing import Annotated, Final

import numpy as np
import typer

from exeunt.compression.model import load_bundle
from scripts.compare_bounds.bounds import BOUNDS
from scripts.compare_bounds.distances import alike, document_rows
from scripts.compare_bounds.draws import Text
from scripts.compare_bounds.rare import RareDocuments, passing

TEXTS: Final[tuple[tuple[float, float], ...]] = ((12, 0.2), (30, 0.1), (30, 0.3), (60, 0.2), (100, 0.3))
"""Mean exits in a block of 256 tokens, and the share of them that costs: true increases of 0.010 to 0.126 nats."""
CORRELATIONS: Final = (0.01, 0.05, 0.1)
BLOCKS: Final = (25, 43, 96, 200)
ROOM: Final = 4 / 3
"""Power is the share of texts that are certified for a target so much above their true increase."""

app = typer.Typer(add_completion=False, help=__doc__)


@app.command()
def simulate(texts: int = 2000, seed: int = 5) -> None:
    """By bound: how often a text is certified for its own true increase, which should be at most 5 %, and power."""
    wrongly: dict[tuple[str, int], list[float]] = {}
    rightly: dict[tuple[str, int], list[float]] = {}
    for (exits, wrong), correlation, blocks in product(TEXTS, CORRELATIONS, BLOCKS):
        text = Text(exits, wrong, correlation)
        draws, truth = text.draw(np.random.default_rng(seed), texts, blocks), text.increase
        for name, certifies in BOUNDS.items():
            wrongly.setdefault((name, blocks), []).append(float(certifies(draws, truth).mean()))
            rightly.setdefault((name, blocks), []).append(float(certifies(draws, ROOM * truth).mean()))
    heads = [f"{blocks} blocks" for blocks in BLOCKS]
    for title, found in (
        ("Certified at the true increase: mean and most over texts", wrongly),
        (f"Certified at {ROOM:.2f} times the true increase: mean and least over texts", rightly),
    ):
        extreme = max if found is wrongly else min
        typer.echo(f"\n{title}\n\n| bound | {' | '.join(heads)} |\n| --- |{' ---: |' * len(heads)}")
        for name in BOUNDS:
            cells = [
                f"{100 * np.mean(found[name, blocks]):.1f}, {100 * extreme(found[name, blocks]):.1f}"
                for blocks in BLOCKS
            ]
            typer.echo(f"| {name} | {' | '.join(cells)} |")


@app.command()
def rare(draws: int = 10_000, seed: int = 5) -> None:
    """How often text is called safe at its own true risk, where that lies in a rare kind of document."""
    mixtures = (
        ("2 % of documents wrong throughout, target 2 %", RareDocuments(0.02), 0.02),
        ("3.3 % cost 0.3 nats a token, target 0.01", RareDocuments(1 / 30, nats=0.3), 0.01),
        ("8 % wrong in half their tokens, target 4 %", RareDocuments(0.08, 0.5), 0.04),
    )
    typer.echo("| documents | 43 | 77 |\n| --- | ---: | ---: |")
    for title, mixture, target in mixtures:
        cells = [f"{passing(mixture, documents, target, draws, seed):.1%}" for documents in (43, 77)]
        typer.echo(f"| {title} | {' | '.join(cells)} |")


@app.command()
def correlation(
    bundle: Path,
    folder: Annotated[Path, typer.Argument(help="A folder of long documents, one a .txt file.")],
    rows: int = 8,
    threshold: Annotated[
        list[float] | None, typer.Option(help="Of exits; several times for several.")
    ] = None,
) -> None:
    """The correlation of stretches of one document by the tokens between them."""
    model = load_bundle(bundle)
    texts = [file.read_text(encoding="utf-8") for file in sorted(folder.glob("*.txt"))]
    documents = document_rows(texts, model, rows)
    typer.echo(f"{len(documents)} documents of {rows} rows; by chance two stretches correlate at ±1/√pairs.")
    typer.echo(
        "\n| threshold | tokens apart | pairs | NLL increase | disagreement |\n| ---: | ---: | ---: | ---: | ---: |"
    )
    for each in alike(model, documents, threshold or [0.9, 0.7], 4096):
        typer.echo(
            f"| {each.threshold} | {each.apart} | {each.pairs} | {each.increase:.2f} | {each.disagreement:.2f} |"
        )


if __name__ == "__main__":
    app()
