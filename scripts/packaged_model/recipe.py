"""Every hyperparameter of the packaged model, in one frozen record per preset."""

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

Stage = Literal["trunk", "exits", "plain"]
STAGES: tuple[Stage, ...] = ("trunk", "exits", "plain")


@dataclass(frozen=True, slots=True)
class Recipe:
    """What is trained and how. Lengths are tokens, rates are per optimizer step.

    The ``trunk`` stage runs at the stable learning rate. The ``exits`` and ``plain`` stages both start from the
    trunk's end and see the same batches under the same schedule; only ``exit_weight`` and ``layer_dropout`` differ.
    """

    preset: str
    blocks: int
    hidden: int
    heads: int
    kv_heads: int
    mlp: int
    vocabulary: int = 4096
    context: int = 1024
    trunk_split: int = 4
    """The trunk trains on windows of ``context`` tokens cut in so many rows."""
    branch_split: int = 4
    """The same for a branch, except in its last, long phase, which trains on whole windows."""
    windows: int = 8
    """Windows of ``context`` tokens per step."""
    story_windows: int = 3
    """How many of them come from the stories in the trunk; the others come from the novels."""
    branch_story_windows: int = 6
    """The same in a branch: it ends on the simpler language, which a model this small can learn to write."""
    trunk_steps: int = 2000
    branch_steps: int = 1000
    warmup_steps: int = 60
    decay_share: float = 0.7
    """Share of a branch's steps over which the learning rate falls linearly to zero."""
    long_share: float = 0.15
    """Share of a branch's steps, at their end, trained on whole windows of ``context`` tokens."""
    long_steps: int = 60
    """Steps that follow a branch's decay, on whole windows: a second, small decay that teaches the far positions."""
    long_rate: float = 0.3
    """The learning rate at the start of those steps, as a share of the stable one."""
    long_exit_weight: float = 0.2
    """``exit_weight`` during those steps, in which no block is dropped."""
    muon_rate: float = 0.02
    adam_rate: float = 0.003
    weight_decay: float = 0.01
    clip: float = 1.0
    exit_weight: float = 0.3
    """Weight of the early-exit loss at the one depth sampled in a step (the full depth weighs 1).

    Its target is the full depth's own distribution, not the text: what counts at an exit is agreement with full depth.
    """
    exit_depths: tuple[int, int] = (3, 8)
    """The depths (blocks passed, both ends included) that are sampled.

    Shallower ones agree too seldom to be exits and cost the full depth most; deeper ones leave nothing to save.
    """
    layer_dropout: float = 0.05
    """Probability of skipping the last block for a row; earlier blocks grow exponentially towards it."""
    seed: int = 20260
    save_minutes: float = 3.0
    report_steps: int = 20
    evaluate_steps: int = 200

    def __post_init__(self) -> None:
        """Raise ValueError where sizes do not fit the INT4 kernels or each other."""
        if any(width % 64 for width in (self.hidden, self.mlp)):
            raise ValueError(f"hidden {self.hidden} and mlp {self.mlp} must be multiples of 64")
        if self.hidden % self.heads or self.heads % self.kv_heads:
            raise ValueError(
                f"{self.heads} heads do not fit hidden {self.hidden} or {self.kv_heads} KV heads"
            )
        if self.context % self.trunk_split or self.context % self.branch_split:
            raise ValueError(
                f"{self.context} tokens do not cut in {self.trunk_split} or {self.branch_split} rows"
            )
        if not all(0 <= count <= self.windows for count in (self.story_windows, self.branch_story_windows)):
            raise ValueError(f"a step's story windows must lie between 0 and {self.windows}")
        shallowest, deepest = self.exit_depths
        if not 1 <= shallowest <= deepest < self.blocks:
            raise ValueError(f"exit depths {self.exit_depths} must rise within 1 to {self.blocks - 1} blocks")

    def to_json(self) -> dict[str, Any]:
        """Return the record as plain values."""
        return asdict(self)


CPU = Recipe(preset="cpu", blocks=10, hidden=192, heads=6, kv_heads=2, mlp=512)
GPU = Recipe(
    preset="gpu",
    blocks=12,
    hidden=256,
    heads=8,
    kv_heads=4,
    mlp=704,
    trunk_split=2,
    branch_split=2,
    windows=64,
    story_windows=3,
    branch_story_windows=8,
    exit_depths=(3, 10),
    warmup_steps=100,
    long_steps=100,
    weight_decay=0.1,  # the stories are seen some twenty times: without it they would be learnt by heart
    trunk_steps=4000,
    branch_steps=1300,
    report_steps=50,
    evaluate_steps=500,
    save_minutes=1.0,
)
TINY = replace(
    CPU, preset="tiny", blocks=3, hidden=64, heads=2, kv_heads=1, mlp=64, vocabulary=320, context=64, windows=2,
    story_windows=1, branch_story_windows=2, exit_depths=(1, 2), long_steps=2,
    trunk_steps=6, branch_steps=6, warmup_steps=2,
)  # fmt: skip
PRESETS = {recipe.preset: recipe for recipe in (CPU, GPU, TINY)}


def learning_share(recipe: Recipe, stage: Stage, done: int, steps: int) -> float:
    """Return the learning rate of a step as a share of the stable one (warm-up, stable, linear decay).

    ``done`` counts the steps of this stage so far, ``steps`` is how many it has (a branch: before its long steps).
    """
    if stage == "trunk":
        return min(1.0, (done + 1) / max(1, recipe.warmup_steps))
    if done >= steps:
        return recipe.long_rate * (steps + recipe.long_steps - done) / (recipe.long_steps + 1)
    return min(1.0, (steps - done) / (decay_steps(recipe, steps) + 1))


def decay_steps(recipe: Recipe, steps: int) -> int:
    """Return over how many of a branch's steps, at its end, the learning rate falls."""
    return max(1, round(steps * recipe.decay_share))


def total_steps(recipe: Recipe, stage: Stage, steps: int) -> int:
    """Return the steps of a stage with the long ones that end a branch."""
    return steps if stage == "trunk" else steps + recipe.long_steps


def split_of(recipe: Recipe, stage: Stage, done: int, steps: int) -> int:
    """Return in how many rows a step cuts its windows of ``context`` tokens."""
    if stage == "trunk":
        return recipe.trunk_split
    return 1 if done >= steps - round(steps * recipe.long_share) else recipe.branch_split


def block_dropout(recipe: Recipe, block: int) -> float:
    """Return the probability that a row skips a block: 0 at the first, ``layer_dropout`` at the last.

    The growth is LayerSkip's, exp(block * ln 2 / (blocks - 1)) - 1 (arXiv 2404.16710, section 4.1).
    """
    if recipe.blocks < 2:
        return 0.0
    return float(recipe.layer_dropout * (2.0 ** (block / (recipe.blocks - 1)) - 1.0))
