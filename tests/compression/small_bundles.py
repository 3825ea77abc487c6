"""Small bundles of random models, made without calibration: what loading and serving need, none of the quality."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from exeunt.compression.bundle import Bundle, checkpoint_sha256
from exeunt.compression.bundle_weights import checkpoint_tensors, int4_tensors, tensors_beside_int4
from exeunt.compression.bundle_writer import BundleContents, write_bundle
from exeunt.compression.checkpoint import Checkpoint, open_checkpoint
from exeunt.compression.checkpoint_names import linear_names
from exeunt.compression.exit_output import Shortlist
from exeunt.compression.exits import ExitConfirmation, ExitHead, ExitJudge, ExitProbe
from exeunt.compression.linear_block import LinearBlock
from exeunt.compression.manifest import (
    BaseModelRecord,
    ExitRecord,
    LinearBlockRecord,
    Manifest,
    NllRiskEntry,
    NllRiskTarget,
    RiskEntry,
    RiskTarget,
)
from exeunt.compression.norm import Norm
from exeunt.compression.tokenizer import load_tokenizer, tokenizer_class
from exeunt.compression.variant import SkippedKV, WeightFormat
from exeunt.kernels.int4_linear import quantize
from tests.compression.reference_models import build_model, save

GROUP = 16
_THRESHOLDS: Final[dict[SkippedKV, dict[float, float]]] = {
    "backfill": {0.1: 0.79},
    "propagate": {0.05: 0.93, 0.1: 0.81},
}


def small_checkpoint(directory: Path, family: str = "llama", shard: str = "1GB", **changes: Any) -> Path:
    """A random model of `family` with a tokenizer of as many words."""
    model = build_model(family, **changes)
    save(model, directory, max_shard_size=shard)
    words = {f"w{i}": i for i in range(model.config.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(directory)
    return directory


def small_bundle(
    directory: Path,
    checkpoint_directory: Path,
    weights: Sequence[WeightFormat] = ("int4", "full"),
    shortlist: Sequence[int] = (),
    list_ratio: float | None = None,
) -> Bundle:
    """A bundle of the checkpoint with an exit after block 1, a linear block 2, and a risk table.

    Where tokens are given as its `shortlist` the exit decides by them and has a judge; where a `list_ratio` is too, all
    logits confirm it.
    """
    checkpoint = open_checkpoint(checkpoint_directory)
    spec, source = checkpoint.spec, checkpoint.weights()
    int4 = int4_tensors(
        {
            (index, name): quantize(source.block(index)[f"{name}.weight"], GROUP)
            for index in range(spec.blocks)
            for name in linear_names(spec)
        },
        quantize(source.shared()["embedding.tokens" if spec.tied else "output.weight"], GROUP),
    )
    full = checkpoint_tensors(checkpoint.files)
    hidden = spec.hidden_size
    contents = BundleContents(
        checkpoint=checkpoint_directory,
        manifest=_manifest(checkpoint, tuple(weights)),
        full=full if "full" in weights else None,
        int4=(int4 if "full" in weights else int4 | dict(tensors_beside_int4(spec, source)))
        if "int4" in weights
        else None,
        linear_block=LinearBlock(
            2, torch.randn(3, hidden) / 5, torch.randn(hidden, 3) / 5, torch.randn(hidden) / 5
        ),
        exits=[_exit(1, hidden, shortlist, list_ratio)],
        report_html="",
        report_json="{}",
    )
    return write_bundle(directory, contents)


def _exit(block: int, hidden: int, shortlist: Sequence[int], list_ratio: float | None) -> ExitHead:
    probe = ExitProbe(torch.randn(4, hidden), torch.randn(4), torch.randn(4), torch.tensor(0.0))
    norm = Norm("rms", torch.ones(hidden), None, 1e-6)
    head = ExitHead(block, norm, torch.randn(hidden, hidden) / 9, probe, torch.randn(4), 0.5)
    if not shortlist:
        return head
    judge = ExitJudge(torch.randn(3, 4), torch.randn(4), torch.randn(4), torch.tensor(0.0))
    last = None if list_ratio is None else ExitConfirmation(judge, torch.randn(4), list_ratio)
    return replace(head, judge=judge, shortlist=Shortlist(torch.tensor(shortlist)), confirmation=last)


_NLL_THRESHOLDS: Final[dict[SkippedKV, dict[float, float]]] = {"backfill": {0.05: 0.71}, "propagate": {}}


def _risk_target(target: float, certified: Mapping[float, float]) -> RiskTarget:
    if target in certified:
        return RiskTarget(target=target, certified=True, threshold=certified[target])
    return RiskTarget(target=target, certified=False, reason="only 12 tokens left")


def _manifest(checkpoint: Checkpoint, weights: tuple[WeightFormat, ...]) -> Manifest:
    sha256, hidden = checkpoint_sha256(checkpoint.files), checkpoint.spec.hidden_size
    table = tuple(
        RiskEntry(
            weights=weights[0],
            kv_cache="int4",
            linear_block=linear,
            skipped_kv=skipped_kv,
            targets=tuple(_risk_target(target, {} if linear else certified) for target in (0.01, 0.05, 0.1)),
        )
        for linear in (False, True)
        for skipped_kv, certified in _THRESHOLDS.items()
    )
    return Manifest(
        created=datetime(2026, 1, 2, tzinfo=UTC),
        exeunt_version="0.1.0",
        base_model=BaseModelRecord(name="small", architecture="llama", sha256=sha256, parameters=9, blocks=4),
        weights=weights,
        kv_cache=("int4", "full"),
        int4_group_size=GROUP if "int4" in weights else None,
        linear_block=LinearBlockRecord(
            index=2, rank=3, r2=0.9, parameters=7 * hidden, replaced_parameters=hidden * hidden
        ),
        exits=(ExitRecord(block=1, name="block_1", agreement=0.5),),
        risk_table=table,
        nll_risk_table=tuple(_nll_entry(weights[0], method) for method in ("backfill", "propagate")),
        architecture=checkpoint.spec,
        tokenizer_class=tokenizer_class(load_tokenizer(checkpoint.directory)),
    )


def _nll_entry(weights: WeightFormat, skipped_kv: SkippedKV) -> NllRiskEntry:
    certified = _NLL_THRESHOLDS[skipped_kv]
    targets = tuple(
        NllRiskTarget(
            target=target, certified=True, threshold=certified[target], increase=0.03, upper_bound=0.04
        )
        if target in certified
        else NllRiskTarget(target=target, certified=False, reason="only 12 tokens left")
        for target in (0.02, 0.05)
    )
    return NllRiskEntry(
        weights=weights, kv_cache="int4", linear_block=False, skipped_kv=skipped_kv, targets=targets, clip=3.0
    )
