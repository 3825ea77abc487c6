"""The comparison of roundings: against whole models that hold the rounded weights, and its memory."""

import gc
import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from exeunt.calibration.activations import Scratch
from exeunt.calibration.block_runner import BlockRunner
from exeunt.calibration.gptq import weighted_error
from exeunt.calibration.journal import NoJournal
from exeunt.calibration.nf4 import nf4
from exeunt.calibration.sequence_batch import batches
from exeunt.calibration.streaming_pass import stream_model
from exeunt.calibration.teacher_forcing import ForcedModel
from exeunt.calibration.weight_study import WeightStudy, study_weights, study_work
from exeunt.calibration.weights_int4 import Int4Plan, Int4Weights
from exeunt.compression.checkpoint import Checkpoint, open_checkpoint
from exeunt.compression.checkpoint_names import linear_names
from exeunt.compression.decoder import Decoder
from exeunt.compression.linear import FullLinear
from exeunt.compression.weights import WeightSource
from exeunt.kernels.int4_linear import dequantize, quantize

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def opened(checkpoint: Path) -> Checkpoint:
    return open_checkpoint(checkpoint)


def some_rows(count: int, seed: int) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(0, 256, (40,), generator=g) for _ in range(count))


@pytest.fixture(scope="module")
def int4(opened: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Int4Weights:
    rows = some_rows(20, 1)
    passed = stream_model(
        opened.weights(),
        BlockRunner(opened.spec, "int4", CPU, torch.float32),
        rows,
        len(rows),
        Int4Plan(),
        [],
        Scratch(tmp_path_factory.mktemp("states")),
        NoJournal(),
        batch_tokens=400,
    )
    assert passed.int4 is not None
    return passed.int4


def studied(
    weights: WeightSource, opened: Checkpoint, int4: Int4Weights, counted: list[int] | None = None
) -> WeightStudy:
    return study_weights(
        weights,
        BlockRunner(opened.spec, "full", CPU, torch.float32),
        int4,
        some_rows(30, 2),
        tokens=1000,
        batch_tokens=300,
        seed=0,
        advance=(counted if counted is not None else []).append,
    )


class Rounded:
    """A checkpoint's weights, each linear and the output matrix replaced by what a form gives back."""

    def __init__(self, weights: WeightSource, form: str, int4: Int4Weights, names: tuple[str, ...]) -> None:
        self._weights, self._form, self._int4, self._names = weights, form, int4, names

    def shared(self) -> Mapping[str, Tensor]:
        tensors = dict(self._weights.shared())
        tensors["output.weight"] = self._restored(tensors["output.weight"], self._int4.output)
        return tensors

    def block(self, index: int) -> Mapping[str, Tensor]:
        tensors = dict(self._weights.block(index))
        for name in self._names:
            packed = self._int4.weights[index, name]
            tensors[f"{name}.weight"] = self._restored(tensors[f"{name}.weight"], packed)
        return tensors

    def _restored(self, weight: Tensor, packed: object) -> Tensor:
        if self._form == "nf4":
            return nf4(weight, 16)
        if self._form == "nearest":
            return dequantize(quantize(weight, 32), torch.float32)
        return dequantize(packed, torch.float32)  # type: ignore[arg-type]


def perplexity(decoder: Decoder, rows: tuple[Tensor, ...]) -> float:
    model, total, count = ForcedModel(decoder, "full", ()), 0.0, 0
    for batch in batches(rows, 300):
        logits = decoder.head(model.full_depth(batch)[1])
        total += float(F.cross_entropy(logits, batch.targets, ignore_index=-1, reduction="sum"))
        count += int((batch.targets >= 0).sum())
    return math.exp(total / count)


def test_perplexities_are_those_of_whole_models_with_the_rounded_weights(
    opened: Checkpoint, int4: Int4Weights
) -> None:
    counted: list[int] = []
    study = studied(opened.weights(), opened, int4, counted)
    rows = some_rows(30, 2)[:25]
    assert study.tokens == 1000
    assert sum(counted) == study_work(int4, some_rows(30, 2), opened.spec.blocks, 1000)
    full = perplexity(Decoder.from_weights(opened.spec, opened.weights(), dtype=torch.float32), rows)
    assert study.perplexity.value == pytest.approx(full, rel=1e-5)
    assert [form.name for form in study.forms] == ["nearest", "gptq", "nf4"]
    for form in study.forms:
        source = Rounded(opened.weights(), form.name, int4, linear_names(opened.spec))
        expected = perplexity(Decoder.from_weights(opened.spec, source, dtype=torch.float32), rows)
        assert form.perplexity.value == pytest.approx(expected, rel=1e-4)
        assert form.increase.value == pytest.approx(expected - full, abs=1e-3 * full)
        assert form.perplexity.low <= form.perplexity.value <= form.perplexity.high
        assert form.kl.value > 0
        assert form.bits == 5.0


def test_errors_are_by_kind_of_layer_and_on_the_study_s_text(opened: Checkpoint, int4: Int4Weights) -> None:
    study = studied(opened.weights(), opened, int4)
    kinds = {*linear_names(opened.spec), "output"}
    nearest, gptq = study.form("nearest"), study.form("gptq")
    assert nearest is not None
    assert gptq is not None
    assert set(nearest.weight_error) == set(gptq.output_error) == kinds
    errors = []
    for index in range(opened.spec.blocks):
        weight = opened.weights().block(index)["down.weight"]
        restored = dequantize(quantize(weight, 32), torch.float32)
        errors.append(float((weight - restored).square().sum() / weight.square().sum()))
        assert weighted_error(weight, quantize(weight, 32), torch.eye(weight.shape[1])) == pytest.approx(
            errors[-1]
        )
    assert nearest.weight_error["down"] == pytest.approx(sum(errors) / len(errors), rel=1e-4)
    assert sum(gptq.output_error.values()) < sum(
        nearest.output_error.values()
    )  # on text that GPTQ did not see


def test_rounding_to_nearest_has_no_second_name(opened: Checkpoint, int4: Int4Weights) -> None:
    nearest = Int4Weights(int4.weights, int4.output, 32, int4.relative_error)
    study = studied(opened.weights(), opened, nearest)
    assert [form.name for form in study.forms] == ["nearest", "nf4"]
    assert study.form("gptq") is None


def test_one_block_is_in_memory_at_a_time(opened: Checkpoint, int4: Int4Weights) -> None:
    weights = opened.weights()

    def full_linears() -> int:
        return sum(issubclass(type(each), FullLinear) for each in gc.get_objects())

    before, alive = full_linears(), list[int]()

    class Counted:
        def shared(self) -> Mapping[str, Tensor]:
            return weights.shared()

        def block(self, index: int) -> Mapping[str, Tensor]:
            alive.append(full_linears() - before)
            return weights.block(index)

    studied(Counted(), opened, int4)
    assert alive == [0] * opened.spec.blocks


def test_a_study_is_json_and_the_same_each_time(opened: Checkpoint, int4: Int4Weights) -> None:
    first, second = (studied(opened.weights(), opened, int4) for _ in range(2))
    assert first == second
    held = json.loads(json.dumps(first.as_json()))
    assert held["forms"][1]["name"] == "gptq"
    assert held["forms"][1]["kl"]["value"] == first.forms[1].kl.value
    assert replace(first, tokens=1) != first
