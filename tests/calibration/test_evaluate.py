"""`exeunt eval` on a plain checkpoint: windows, what is refused, and figures that are a plain computation's."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from exeunt.calibration.errors import CalibrationError
from exeunt.calibration.evaluate import Evaluation, EvaluationOptions, evaluate
from exeunt.compression.model import LoadedModel, load_plain_model
from tests.calibration.conftest import EOS
from tests.calibration.silent_progress import SilentProgress


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> LoadedModel:
    return load_plain_model(checkpoint)


@pytest.fixture
def one_document(tmp_path: Path) -> Path:
    path = tmp_path / "one.txt"
    path.write_text("".join("abcdefgh ijk lm"[place * place % 15] for place in range(300)))
    return path


def evaluation(model: LoadedModel, path: Path, **how: Any) -> Evaluation:
    return evaluate(model, str(path), EvaluationOptions(batch_tokens=256, **how), SilentProgress())


@torch.inference_mode()
def losses(model: LoadedModel, ids: list[int], window: int, stride: int) -> list[float]:
    """Of every token of a text but the first, in the windows of the usual recipe, by `transformers` itself."""
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(model.files[0].parent, dtype=torch.float32)
    found, scored, begin = [], 0, 0
    while scored < len(ids):
        end = min(begin + window, len(ids))
        logits = plain(torch.tensor([ids[begin:end]])).logits[0]
        for place in range(scored, end):
            if place + 1 < len(ids):
                target = torch.tensor(ids[place + 1])
                found.append(float(F.cross_entropy(logits[place - begin], target)))
        scored, begin = end, end + stride - window
        begin = min(begin, max(0, len(ids) - window))
    return found


def test_windows_give_what_transformers_gives_in_the_same_windows(
    model: LoadedModel, one_document: Path
) -> None:
    ids = [*model.tokenizer(one_document.read_text(), add_special_tokens=False).input_ids, EOS]
    table = evaluation(model, one_document, window=64, stride=16).table
    wanted = losses(model, ids, 64, 16)
    assert len(wanted) == len(ids) - 1
    assert table.tokens == len(ids)
    assert table.results[0].perplexity.value == pytest.approx(math.exp(sum(wanted) / len(wanted)), rel=1e-4)


def test_a_stride_of_the_window_is_rows_side_by_side(model: LoadedModel, one_document: Path) -> None:
    rows = evaluation(model, one_document, window=64).table
    assert rows == evaluation(model, one_document, window=64, stride=64).table
    assert rows != evaluation(model, one_document, window=64, stride=32).table


def test_the_window_is_the_models_context_where_that_is_shorter(
    model: LoadedModel, one_document: Path
) -> None:
    context = model.spec.max_position_embeddings
    assert evaluation(model, one_document).table == evaluation(model, one_document, window=context).table


def test_without_exits_there_is_a_table_and_nothing_to_compare(model: LoadedModel, text_file: Path) -> None:
    found = evaluation(model, text_file, tokens=1000, generate=True)
    assert [result.mode.name for result in found.table.results] == ["full/full", "full/int4"]
    assert found.trade_off == ()
    assert [(each.mode.name, each.temperature) for each in found.written] == [
        (name, temperature) for temperature in (0.0, 1.0) for name in ("full/full", "full/int4")
    ]


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"tokens": 3}, "3 tokens are too few"),
        ({"window": 8}, "window of 8 tokens is too short"),
        ({"window": 64, "stride": 65}, "stride of 65 tokens is longer than the window of 64"),
        ({"stride": 513}, "stride of 513 tokens is longer than the window of 512"),
        ({"stride": 0}, "stride is 0 tokens"),
        ({"window": 97}, "window of 97 tokens is longer than the model's context; give at most 96"),
        ({"stride": 97}, "stride of 97 tokens is longer than the window of 96"),
    ],
)
def test_what_cannot_be_read_is_refused_in_a_sentence(
    model: LoadedModel, one_document: Path, how: dict[str, int], says: str
) -> None:
    with pytest.raises(CalibrationError, match=says) as caught:
        evaluation(model, one_document, **how)
    assert str(caught.value).endswith(".")


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"", "holds no text"), (b"ab\0cd", "not a text file: byte 2 is zero"), (b"\xff\xfe\xfa", "not UTF-8")],
)
@pytest.mark.parametrize("stride", [None, 16])
def test_what_is_no_text_is_refused_in_a_sentence(
    model: LoadedModel, tmp_path: Path, content: bytes, says: str, stride: int | None
) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(CalibrationError, match=says):
        evaluation(model, path, window=64, stride=stride)
