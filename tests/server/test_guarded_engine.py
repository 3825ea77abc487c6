"""The guard in a running engine: on text that an exit has not learned it acts, on text that it has it relaxes.

The tiny model is made to have two languages: what follows tokens of one half of the bytes is of that half. Its last
blocks have little to say, so an exit before them is nearly always right, but for one half it is made to say something
else. A calibration on the other half would have seen nothing of that.
"""

import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from exeunt.compression.exits import ExitHead, ExitNorm, ExitProbe
from exeunt.compression.model import LoadedModel, load_plain_model
from exeunt.compression.variant import SkippedKV
from exeunt.server.exit_guard import ExitGuard, threshold_at
from exeunt.server.request import ExitPolicy
from tests.server.conftest import EOS, HIDDEN, byte_tokenizer
from tests.server.engine_bench import Bench, Heard, running

TARGET = 0.1
LEARNED, FOREIGN = range(128), range(128, 256)
_LANGUAGE, _ALWAYS = (
    0,
    1,
)  # entries of the state: the sign of the half that the last token is of, and a constant


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = tmp_path_factory.mktemp("guarded")
    network = LlamaForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    half = torch.where(torch.arange(network.config.vocab_size) < FOREIGN.start, -1.0, 1.0)
    with torch.no_grad():
        network.model.embed_tokens.weight[:, _LANGUAGE] = 3 * half
        network.model.embed_tokens.weight[:, _ALWAYS] = 3.0
        network.lm_head.weight[:, _LANGUAGE] = 12 * half
        network.lm_head.weight[EOS:] = 0.0
        for number, layer in enumerate(network.model.layers):
            for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
                linear.weight *= 1.0 if number < 4 else 0.02
                linear.weight[[_LANGUAGE, _ALWAYS]] = 0.0
    network.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    loaded = load_plain_model(folder, device="cpu", dtype=torch.float32)
    return replace(loaded, exits=(misled_exit(loaded),))


def misled_exit(model: LoadedModel) -> ExitHead:
    """An exit after block 3 that says what the model does, plus something in the foreign language alone.

    Its gate believes in the distance between the two best tokens.
    """
    g = torch.Generator().manual_seed(1)
    adapter = torch.zeros(HIDDEN, HIDDEN)
    astray = torch.randn(HIDDEN, generator=g) * 1.5
    astray[[_LANGUAGE, _ALWAYS]] = 0.0
    adapter[:, _LANGUAGE] = adapter[:, _ALWAYS] = astray
    probe = ExitProbe(torch.zeros(8, HIDDEN), torch.zeros(8), torch.zeros(8), torch.tensor(0.0))
    norm = ExitNorm("rms", torch.ones(HIDDEN), None, model.spec.norm_eps)
    return ExitHead(3, norm, adapter, probe, torch.tensor([0.0, 0.0, 2.0, 0.0]), 0.0)


def speak(bench: Bench, language: range, policy: ExitPolicy, seed: int) -> list[Heard]:
    """Eight answers in a language, each admitted as the API would."""
    dice = random.Random(seed)
    asked = [
        bench.ask(
            prompt=tuple(dice.choice(language) for _ in range(6)),
            exits=bench.engine.guarded(policy),
            max_new_tokens=40,
            seed=seed,
            temperature=0.5,
        )
        for _ in range(8)
    ]
    return [heard.wait() for heard in asked]


@pytest.mark.parametrize("skipped_kv", ["backfill", "propagate"])
def test_the_guard_acts_on_foreign_text_and_relaxes_on_the_text_it_knows(
    model: LoadedModel, skipped_kv: SkippedKV
) -> None:
    policy = ExitPolicy("approximate", threshold=0.55, target=TARGET, skipped_kv=skipped_kv)
    exported: list[float | None] = []

    def export(thresholds: Mapping[float, float | None]) -> None:
        exported.append(thresholds[TARGET])

    guard = ExitGuard({TARGET: policy.threshold}, export)
    steps = [threshold_at(0.55, step) for step in range(4)]
    with running(model, audit_share=1.0, max_num_seqs=8, guard=guard) as bench:
        for seed in range(3):
            speak(bench, LEARNED, policy, seed)
        totals = bench.engine.audit_totals
        assert totals.audit_agreements > 0.97 * totals.audited_tokens > 300
        assert exported == []
        for seed in range(3):
            for heard in speak(bench, FOREIGN, policy, seed):
                assert min(heard.ids()) >= FOREIGN.start
        assert exported == steps[1:]
        early = [share_early(speak(bench, LEARNED, policy, seed=7))]
        rounds = 0
        while bench.engine.guarded(policy) != policy:
            speak(bench, LEARNED, policy, rounds)
            rounds += 1
            assert rounds < 30, "the guard never relaxed"
        assert exported == [*steps[1:], *reversed(steps[:3])]
        early.append(share_early(speak(bench, LEARNED, policy, seed=7)))
    assert early[0] < early[1] / 2


def share_early(answers: list[Heard]) -> float:
    names = [name for heard in answers for name in heard.exits()]
    return sum(name != "final" for name in names) / len(names)


def test_without_a_guard_thresholds_stay_and_audits_tell(model: LoadedModel) -> None:
    policy = ExitPolicy("approximate", threshold=0.55, target=TARGET, skipped_kv="backfill")
    with running(model, audit_share=1.0, max_num_seqs=8) as bench:
        for seed in range(3):
            speak(bench, FOREIGN, policy, seed)
            assert bench.engine.guarded(policy) is policy
        totals = bench.engine.audit_totals
    assert totals.audit_agreements < 0.2 * totals.audited_tokens
    assert totals.audit_kl > 0.5 * totals.audited_tokens
    assert totals.audit_nll_full > totals.audit_nll_exit
