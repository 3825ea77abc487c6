"""Bodies to try: for each route that takes one, a body that the server at hand answers."""

from typing import Any, Final

from exeunt.server.api.compression import NotOfferedError, resolve
from exeunt.server.api.offer import SKIPPED_KV
from exeunt.server.api.schemas import CompressionOptions
from exeunt.server.api.service import Service

_TEXT: Final = "It was a dark night"
_NEW_TOKENS: Final = 32
_TOKEN_IDS: Final = 3


def body_examples(service: Service | None) -> dict[str, dict[str, Any]]:
    """By path, a body for the loaded model; None: none is loaded yet, and what every model takes is shown."""
    generate: dict[str, Any] = {"prompt": _TEXT, "max_new_tokens": _NEW_TOKENS}
    tokens = [0]
    if service is not None:
        generate["max_new_tokens"] = max(1, min(_NEW_TOKENS, service.config.max_model_len // 4))
        generate["compression"] = _compression(service)
        tokens = list(range(min(_TOKEN_IDS, service.model.spec.vocab_size)))
    return {
        "/generate": generate,
        "/score": {"text": _TEXT},
        "/tokenize": {"prompt": _TEXT},
        "/detokenize": {"tokens": tokens},
    }


def _compression(service: Service) -> dict[str, Any]:
    """The early exits that show most of what there is: at the loosest certified target, else verified, else off."""
    offer, defaults = service.offer, service.defaults
    variant = resolve(CompressionOptions.model_validate({"early_exit": False}), defaults, offer).variant
    targets = {target for method in SKIPPED_KV for target in offer.certified(variant, method)}
    asked: list[dict[str, Any]] = [
        {"mode": "approximate", "max_disagreement": target} for target in sorted(targets, reverse=True)
    ]
    for early_exit in [*asked, {"mode": "verified"}]:
        compression = {"early_exit": early_exit}
        try:
            resolve(CompressionOptions.model_validate(compression), defaults, offer)
        except (
            NotOfferedError
        ):  # the server's defaults may ask for another way to fill skipped keys and values
            continue
        return compression
    return {"early_exit": False}
