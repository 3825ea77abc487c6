"""`GET /info` and `GET /v1/models`: what is served, in which modes, under which limits."""

import platform
from dataclasses import asdict
from importlib.metadata import version
from typing import Annotated

from fastapi import APIRouter, Depends

from exeunt.compression.manifest import Manifest
from exeunt.server.api.answers import applied
from exeunt.server.api.compression import resolve
from exeunt.server.api.errors import documented
from exeunt.server.api.info_responses import (
    AuditInfo,
    BundleInfo,
    CertificateInfo,
    InfoResponse,
    LimitsInfo,
    ModelCard,
    ModelInfo,
    ModelList,
    ModesInfo,
    NllCertificateInfo,
    VariantInfo,
)
from exeunt.server.api.json_route import StrictRoute
from exeunt.server.api.offer import SKIPPED_KV
from exeunt.server.api.schemas import MAX_CHOICES, MAX_STOP_STRINGS
from exeunt.server.api.service import Service, loaded_service

router = APIRouter(route_class=StrictRoute)

ServiceLoaded = Annotated[Service, Depends(loaded_service)]


@router.get(
    "/info",
    summary="Model, bundle, modes, risk table, limits",
    response_model_exclude_unset=True,  # fields that a mode does not use are absent, as in answers
    responses=documented(400, 401, 503),
)
async def info(service: ServiceLoaded) -> InfoResponse:
    """What the server serves and what a request may ask for."""
    manifest = service.model.manifest
    return InfoResponse(
        model=_model(service),
        bundle=None if manifest is None else _bundle(manifest),
        modes=_modes(service),
        defaults=applied(resolve(None, service.defaults, service.offer)),
        risk_table=[] if manifest is None else _risk_table(manifest),
        nll_risk_table=[] if manifest is None else _nll_risk_table(manifest),
        exits=list(service.offer.exits),
        audits=AuditInfo(share=service.config.audit_share, **asdict(service.engine.audit_totals)),
        limits=_limits(service),
        versions={
            **{
                package: version(package)
                for package in ("exeunt", "torch", "transformers", "tokenizers", "fastapi")
            },
            "python": platform.python_version(),
        },
    )


@router.get("/v1/models", summary="The served model, in OpenAI's shape", responses=documented(400, 401, 503))
async def models(service: ServiceLoaded) -> ModelList:
    """A list of one."""
    card = ModelCard(id=service.name, created=service.created, max_model_len=service.config.max_model_len)
    return ModelList(data=[card])


def _model(service: Service) -> ModelInfo:
    spec = service.model.spec
    return ModelInfo(
        name=service.name,
        family=spec.family,
        blocks=spec.blocks,
        hidden_size=spec.hidden_size,
        vocab_size=spec.vocab_size,
        parameters=spec.parameters,
        device=str(service.model.device),
        dtype=str(service.model.dtype).removeprefix("torch."),
    )


def _bundle(manifest: Manifest) -> BundleInfo:
    fields = manifest.model_dump(mode="json")
    return BundleInfo.model_validate({name: fields[name] for name in BundleInfo.model_fields})


def _modes(service: Service) -> ModesInfo:
    variants = service.offer.variants
    return ModesInfo(
        variants=[
            VariantInfo(weights=v.weights, kv_cache=v.kv_cache, linear_block=v.linear_block) for v in variants
        ],
        weights=sorted({variant.weights for variant in variants}),
        kv_cache=sorted({variant.kv_cache for variant in variants}),
        linear_block=sorted({variant.linear_block for variant in variants}),
        early_exit=list(service.offer.modes),
        skipped_kv=list(SKIPPED_KV) if "approximate" in service.offer.modes else [],
    )


def _risk_table(manifest: Manifest) -> list[CertificateInfo]:
    return [
        CertificateInfo(
            **entry.model_dump(include={"weights", "kv_cache", "linear_block", "skipped_kv", "confidence"}),
            **target.model_dump(include=set(CertificateInfo.model_fields)),
        )
        for entry in manifest.risk_table
        for target in entry.targets
    ]


def _nll_risk_table(manifest: Manifest) -> list[NllCertificateInfo]:
    return [
        NllCertificateInfo(
            **entry.model_dump(
                include={"weights", "kv_cache", "linear_block", "skipped_kv", "clip", "confidence"}
            ),
            **target.model_dump(include=set(NllCertificateInfo.model_fields)),
        )
        for entry in manifest.nll_risk_table
        for target in entry.targets
    ]


def _most_tokens(service: Service) -> dict[str, int]:
    """By the format of keys and values, the tokens that every variant with it may have."""
    most: dict[str, int] = {}
    for variant in service.offer.variants:
        held = min(service.engine.capacity(variant), service.config.max_model_len)
        most[variant.kv_cache] = min(held, most.get(variant.kv_cache, held))
    return dict(sorted(most.items()))


def _limits(service: Service) -> LimitsInfo:
    config = service.config
    return LimitsInfo(
        max_model_len=config.max_model_len,
        max_tokens_by_kv_cache=_most_tokens(service),
        max_num_seqs=config.max_num_seqs,
        max_num_queued_reqs=config.max_num_queued_reqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        kv_cache_bytes=config.kv_cache_bytes,
        max_body_bytes=service.max_body_bytes,
        max_choices=min(MAX_CHOICES, config.max_num_seqs),
        max_stop_strings=MAX_STOP_STRINGS,
        request_timeout_s=service.request_timeout_s,
    )
