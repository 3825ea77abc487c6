"""Trains one stage of the packaged model: the common trunk, the branch with exits, or its plain twin.

It knows nothing of text; it sees token windows, a recipe and a run's folder, and stops at a number of steps, after a
number of minutes, or at SIGTERM or SIGINT, each time leaving a checkpoint it can go on from.
"""

import json
import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.nn.utils import clip_grad_norm_

from scripts.packaged_model.checkpoint import Checkpoint, load_checkpoint
from scripts.packaged_model.decoder import Decoder, build_model
from scripts.packaged_model.recipe import (
    Recipe,
    Stage,
    block_dropout,
    decay_steps,
    learning_share,
    split_of,
    total_steps,
)
from scripts.packaged_model.tokens import SOURCES, Batches, held_out_rows


def choose_device(name: str) -> torch.device:
    """Return the device of a name; ``auto`` is the GPU where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Yield a list that SIGTERM and SIGINT append to instead of ending the process."""
    caught: list[int] = []

    def catch(number: int, _frame: FrameType | None) -> None:
        caught.append(number)

    previous = {number: signal.signal(number, catch) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield caught
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class Trainer:
    """One stage of training, from its start or from its last checkpoint."""

    def __init__(
        self, run: Path, recipe: Recipe, stage: Stage, steps: int | None, device: torch.device, compiled: bool
    ):
        """Build the model and go on from ``<stage>.pt``, or, for a branch, begin at ``trunk.pt``.

        ``steps`` is how many the stage has in all; None means as before, or the recipe's number at the start.
        """
        self.run, self.recipe, self.stage, self.device = run, recipe, stage, device
        self.model = build_model(recipe).to(device)
        self.decoder = Decoder(self.model, compiled)
        self._batches = Batches(run, recipe)
        matrices = [p for name, p in self.model.model.layers.named_parameters() if p.ndim == 2]
        others = [p for p in self.model.parameters() if all(p is not matrix for matrix in matrices)]
        self._muon = torch.optim.Muon(
            matrices, lr=recipe.muon_rate, momentum=0.95, nesterov=True, weight_decay=recipe.weight_decay
        )
        self._adam = torch.optim.AdamW(others, lr=recipe.adam_rate, betas=(0.9, 0.95), weight_decay=0.0)
        self.step = self.first = 0
        self._asked = steps
        self.steps = steps or (recipe.trunk_steps if stage == "trunk" else recipe.branch_steps)
        self.seconds = self.trunk_seconds = 0.0
        self._resume()

    @property
    def total(self) -> int:
        """The steps of the stage, a branch's long ones included."""
        return total_steps(self.recipe, self.stage, self.steps)

    def _resume(self) -> None:
        own, trunk = self.run / f"{self.stage}.pt", self.run / "trunk.pt"
        path = own if own.exists() else trunk
        if not path.exists():
            if self.stage != "trunk":
                raise FileNotFoundError(
                    f"{trunk} does not exist: train the trunk before the branch {self.stage}"
                )
            return
        saved = load_checkpoint(path, self.recipe, self.device)
        self.model.load_state_dict(saved.model)
        self._muon.load_state_dict(saved.muon)
        self._adam.load_state_dict(saved.adam)
        self.step = saved.step
        if saved.stage == self.stage:
            self.first, self.seconds, self.trunk_seconds = saved.first, saved.seconds, saved.trunk_seconds
            if self.stage != "trunk":
                self.steps = self._agreed_steps(saved)
        else:
            self.first, self.trunk_seconds = saved.step, saved.seconds

    def _agreed_steps(self, saved: Checkpoint) -> int:
        """Return the steps of a branch gone on with; raise ValueError if they change after the decay began."""
        asked, done = self._asked or saved.steps, saved.step - saved.first
        if asked != saved.steps and done > min(
            steps - decay_steps(self.recipe, steps) for steps in (asked, saved.steps)
        ):
            raise ValueError(
                f"the branch has {done} of {saved.steps} steps and its rate decays: {asked} is too late"
            )
        return asked

    def save(self) -> None:
        """Write ``<stage>.pt``."""
        Checkpoint(
            recipe=self.recipe.to_json(),
            stage=self.stage,
            step=self.step,
            first=self.first,
            steps=self.steps,
            seconds=self.seconds,
            trunk_seconds=self.trunk_seconds,
            model=self.model.state_dict(),
            muon=self._muon.state_dict(),
            adam=self._adam.state_dict(),
        ).save(self.run / f"{self.stage}.pt")

    def train(self, minutes: float = math.inf) -> bool:
        """Train until the stage's end, the minutes are over or a signal comes; return whether the end was reached."""
        begun = saved = time.monotonic()
        before = self.seconds
        first_step = self.step
        with stop_signals() as caught:
            while self.step - self.first < self.total:
                loss, exit_loss = self.train_step()
                now = time.monotonic()
                self.seconds = before + now - begun
                if self.step % self.recipe.report_steps == 0:
                    self._report(loss, exit_loss, (now - begun) / (self.step - first_step))
                if self.step % self.recipe.evaluate_steps == 0:
                    self._log({"held_out": {source: self.held_out_loss(source, 24) for source in SOURCES}})
                if now - saved > 60 * self.recipe.save_minutes:
                    self.save()
                    saved = now
                if caught or now - begun > 60 * minutes:
                    break
        self.save()
        return self.step - self.first >= self.total

    def train_step(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Make one optimizer step; return its loss at full depth and, on the exits branch, at the sampled depth.

        The losses are scalars on the device: reading one waits for the step, which a GPU is better off without.
        """
        recipe, done = self.recipe, self.step - self.first
        rate = learning_share(recipe, self.stage, done, self.steps)
        for optimizer, stable in ((self._muon, recipe.muon_rate), (self._adam, recipe.adam_rate)):
            for group in optimizer.param_groups:
                group["lr"] = stable * rate
            optimizer.zero_grad(set_to_none=True)
        branched = None if self.stage == "trunk" else self.first
        tokens, targets = self._batches.batch(
            self.step, split_of(recipe, self.stage, done, self.steps), branched
        )
        tokens, targets = self._sent(tokens), self._sent(targets)
        depth, keeps = self.sampled_exit(tokens.shape[0])
        with torch.autocast(self.device.type, torch.bfloat16):
            states = self.decoder.states(tokens, keeps)
            loss = self.decoder.loss(states[-1], targets)
            exit_loss = None if depth is None else self.decoder.distillation_loss(states[depth], states[-1])
        weight = recipe.exit_weight if done < self.steps else recipe.long_exit_weight
        total = loss if exit_loss is None else loss + weight * exit_loss
        total.backward()  # type: ignore[no-untyped-call]
        clip_grad_norm_(self.model.parameters(), recipe.clip)
        self._muon.step()  # type: ignore[no-untyped-call]
        self._adam.step()
        self.step += 1
        return loss.detach(), None if exit_loss is None else exit_loss.detach()

    def _sent(self, values: torch.Tensor) -> torch.Tensor:
        """Values on the training device, sent there without waiting for what runs on it."""
        if self.device.type != "cuda":
            return values.to(self.device)
        return values.pin_memory().to(self.device, non_blocking=True)

    def sampled_exit(self, rows: int) -> tuple[int | None, list[torch.Tensor] | None]:
        """Return this step's exit depth (blocks passed) and row-wise block factors; neither outside ``exits``.

        A kept block's contribution is scaled up by the share of rows that keep it, so that its mean stays.
        """
        if self.stage != "exits":
            return None, None
        recipe = self.recipe
        generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + self.step)
        shallowest, deepest = recipe.exit_depths
        depth = int(torch.randint(shallowest, deepest + 1, (1,), generator=generator))
        keeps = []
        dropping = self.step - self.first < self.steps
        for block in range(recipe.blocks):
            drop = block_dropout(recipe, block) if dropping else 0.0
            keeps.append((torch.rand(rows, 1, 1, generator=generator) >= drop).float() / (1.0 - drop))
        return depth, list(self._sent(torch.stack(keeps)).unbind())

    @torch.no_grad()
    def held_out_loss(self, source: str, limit: int) -> float:
        """Return the mean cross-entropy in nats over ``limit`` held-out windows of 256 tokens of a source."""
        length = min(256, self.recipe.context)
        rows = held_out_rows(self.run, source, length, limit).to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16):
            return float(self.decoder.loss(self.decoder.states(rows[:, :-1])[-1], rows[:, 1:]))

    def _report(self, loss: torch.Tensor, exit_loss: torch.Tensor | None, step_seconds: float) -> None:
        left = (self.total - (self.step - self.first)) * step_seconds
        tokens = self.recipe.windows * self.recipe.context / step_seconds
        self._log(
            {
                "loss": round(loss.item(), 4),
                "exit_loss": None if exit_loss is None else round(exit_loss.item(), 4),
                "tokens_per_second": round(tokens),
                "minutes_left": round(left / 60, 1),
            }
        )

    def _log(self, facts: dict[str, Any]) -> None:
        line = json.dumps({"stage": self.stage, "step": self.step, "of": self.first + self.total, **facts})
        with (self.run / f"{self.stage}.jsonl").open("a") as file:
            file.write(line + "\n")
        print(line, flush=True)
