"""How the GPU check times transformers: whole answers alone count, what it decided on is told, and loops beside it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from scripts.gpu_check import generate_batch, transformers_speeds
from scripts.gpu_check.generate_batch import check_whole, generate_batch_speed
from scripts.gpu_check.models import TOY
from scripts.gpu_check.sizes import Sizes
from tests.scripts.toy_gpu_check import toy_context

PROMPTS = [[1, 2, 3], [4, 5, 6]]


class _Manager:
    """Stands for transformers' manager: `answers` says what comes of a request."""

    def __init__(self, asked: Any, answers: Callable[[int], Any]) -> None:
        wanted = asked.use_cuda_graph
        self.continuous_batching_config = SimpleNamespace(
            use_cuda_graph=(bool(wanted), bool(wanted)), use_async_batching=False
        )
        self._answers, self._waiting = answers, list[Any]()
        self.dies = False

    def add_requests(self, inputs: Sequence[Sequence[int]], max_new_tokens: int) -> None:
        """Answer at once."""
        self._waiting += [self._answers(max_new_tokens) for _ in inputs]

    def get_result(self, timeout: float) -> Any:
        """The next answer."""
        found = self._waiting.pop(0) if self._waiting else None
        self.dies = self.dies or found is None
        return found

    def is_running(self) -> bool:
        """Whether its thread runs."""
        return not self.dies


class _Model:
    """Stands for a model of transformers, as far as managers go."""

    def __init__(self, answers: Callable[[int], Any], fails: bool | None = None) -> None:
        self.config = SimpleNamespace(_attn_implementation="sdpa")
        self._answers, self._fails = answers, fails
        self.asked: list[Any] = []

    def set_attn_implementation(self, name: str) -> None:
        """As a model has it."""
        self.config._attn_implementation = name

    @contextmanager
    def continuous_batching_context_manager(
        self, continuous_batching_config: Any, **rest: Any
    ) -> Iterator[_Manager]:
        """A manager for as long as it is entered."""
        self.asked.append(continuous_batching_config)
        self.set_attn_implementation("paged|sdpa")
        if self._fails is not None and bool(continuous_batching_config.use_cuda_graph) == self._fails:
            raise RuntimeError("no such graphs")
        yield _Manager(continuous_batching_config, self._answers)


def _whole(tokens: int, error: str | None = None) -> Any:
    return SimpleNamespace(generated_tokens=[0] * tokens, error=error, is_finished=lambda: True)


def test_both_tries_are_told_with_what_was_decided_and_the_better_one_is_compared(tmp_path: Path) -> None:
    model = _Model(_whole)
    found = generate_batch_speed(toy_context(tmp_path), model, PROMPTS, 5)
    assert [*found["tries"]] == ["its own choice", "graphs asked for"]
    assert found["tokens"] == 10
    assert found["tokens_per_s"] == max(each["tokens_per_s"] for each in found["tries"].values())
    assert found["tokens_per_s"] == found["tries"][found["chosen"]]["tokens_per_s"]
    own, asked = found["tries"].values()
    assert (own["attention"], own["use_async_batching"]) == ("paged|sdpa", False)
    assert (own["use_cuda_graph"], asked["use_cuda_graph"]) == ([False, False], [True, True])
    assert not any(each.allow_block_sharing for each in model.asked)  # every prompt is read each time
    assert model.config._attn_implementation == "sdpa"


def test_what_runs_in_graphs_by_itself_is_not_tried_twice(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tries = {"its own choice": {"use_cuda_graph": True}, "graphs asked for": {"use_cuda_graph": True}}
    monkeypatch.setattr(generate_batch, "TRIES", tries)
    assert [*generate_batch_speed(toy_context(tmp_path), _Model(_whole), PROMPTS, 5)["tries"]] == [
        "its own choice"
    ]


def test_one_try_that_fails_leaves_the_other(tmp_path: Path) -> None:
    found = generate_batch_speed(toy_context(tmp_path), _Model(_whole, fails=True), PROMPTS, 5)
    assert found["chosen"] == "its own choice"
    assert found["tries"]["graphs asked for"] == {"error": "RuntimeError: no such graphs"}


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        (lambda tokens: _whole(tokens - 1), "8 tokens came in 2 answers, not 10 in 2"),
        (lambda tokens: _whole(tokens, "out of pages"), "2 of 2 answers failed: out of pages"),
        (lambda tokens: None, "its thread ended with 0 of 2 answers"),
    ],
)
def test_a_load_that_is_not_answered_whole_is_no_speed(
    tmp_path: Path, answers: Callable[[int], Any], said: str
) -> None:
    with pytest.raises(RuntimeError, match=said):
        generate_batch_speed(toy_context(tmp_path), _Model(answers), PROMPTS, 5)


def test_answers_must_be_as_many_as_asked_for() -> None:
    check_whole([_whole(5), _whole(5)], 2, 5)
    with pytest.raises(RuntimeError, match="5 tokens came in 1 answers"):
        check_whole([_whole(5)], 2, 5)


def test_a_loop_of_forward_passes_goes_on_as_generate_does(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    context = toy_context(tmp_path)
    model = transformers_speeds.transformers_model(context, TOY)
    read: list[torch.Tensor] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(args[0] if args else kwargs["input_ids"]), with_kwargs=True
    )
    ids = torch.tensor([[3, 5, 8, 13], [1, 2, 3, 4]])
    found = transformers_speeds.forward_loop_speed(context, model, ids, 8)
    assert (found["tokens_run"], found["seconds"]) == (
        2,
        pytest.approx(found["prompt_seconds"] + 7 * found["seconds_a_token"]),
    )
    monkeypatch.setattr(transformers_speeds, "_PART", 1)
    read.clear()
    transformers_speeds.forward_loop_speed(context, model, ids, 8)
    made = torch.cat(read[-7:], dim=1)  # what the last run read behind its prompt
    wanted = model.generate(
        ids,
        max_new_tokens=8,
        min_new_tokens=8,
        do_sample=False,
        attention_mask=torch.ones_like(ids),
        pad_token_id=0,
    )
    assert made.tolist() == wanted[:, 4:-1].tolist()


def test_too_little_memory_for_a_load_is_named_and_other_errors_are_its_result(tmp_path: Path) -> None:
    errors = iter([torch.OutOfMemoryError("CUDA out of memory.\nMore"), ValueError("no such mode")])

    class Model:
        def generate(self, ids: torch.Tensor, **rest: Any) -> None:
            raise next(errors)

    found: dict[str, Any] = {}
    transformers_speeds.generate_speeds(toy_context(tmp_path), found, Model(), PROMPTS, Sizes((2, 1), 3, 4))
    assert found == {
        "skipped": ["transformers generate, 2 streams: CUDA out of memory."],
        "transformers generate, 1 streams": {"error": "ValueError: no such mode"},
    }
