"""Checks that a request fits the loaded model, and hands it to the engine."""

import secrets
from collections.abc import Callable, Sequence
from dataclasses import replace

from fastapi import Request

from exeunt.compression.variant import Variant
from exeunt.server.api.arrival import arrival_of
from exeunt.server.api.compression import AppliedCompression, NotOfferedError, resolve
from exeunt.server.api.errors import ApiError, bad_request, draining
from exeunt.server.api.schemas import MAX_SEED, CompressionOptions, GenerateBody, ScoreBody
from exeunt.server.api.service import Service
from exeunt.server.api.token_limits import check_bytes, check_ids, check_prompt, check_text, check_together
from exeunt.server.api.tokenizer import INLINE_CHARACTERS
from exeunt.server.api.turn import in_turn
from exeunt.server.engine import EngineStoppedError, QueueFullError, RequestTooLargeError
from exeunt.server.request import FailureEvent, GenerationRequest, SamplingParams, ScoreRequest


async def generation_request(body: GenerateBody, service: Service, http: Request) -> GenerationRequest:
    """The engine's request for the body of `http`; raises ApiError 400 where it does not fit the loaded model."""
    arrival = arrival_of(http.scope)
    _check_sampling(body, service)
    compression = applied_compression(body.compression, service)
    prompt = await _tokens(http, service, body.prompt, body.prompt_token_ids, "prompt", "prompt_token_ids")
    limit = service.config.max_model_len
    check_prompt(len(prompt), limit, _prompt_field(body))
    check_together(len(prompt), body.max_new_tokens, limit)
    return GenerationRequest(
        id=f"gen-{secrets.token_hex(12)}",
        prompt_token_ids=tuple(prompt),
        sampling=SamplingParams(
            max_new_tokens=body.max_new_tokens,
            min_new_tokens=body.min_new_tokens,
            temperature=body.temperature,
            top_p=body.top_p,
            top_k=body.top_k,
            repetition_penalty=body.repetition_penalty,
            seed=secrets.randbelow(MAX_SEED) if body.seed is None else body.seed,
            stop=tuple(body.stop),
            ignore_eos=body.ignore_eos,
        ),
        variant=compression.variant,
        exits=compression.exits,
        n=body.n,
        arrival=arrival,
        deadline=arrival + service.request_timeout_s,
    )


async def score_request(body: ScoreBody, service: Service, http: Request) -> ScoreRequest:
    """The engine's request for a text to be scored; raises ApiError 400 where it does not fit."""
    deadline = arrival_of(http.scope) + service.request_timeout_s
    compression = applied_compression(body.compression, service)
    tokens = await _tokens(http, service, body.text, body.token_ids, "text", "token_ids")
    check_text(len(tokens), service.config.max_model_len, text_field(body))
    return ScoreRequest(
        f"score-{secrets.token_hex(12)}", tuple(tokens), compression.variant, compression.exits, deadline
    )


def applied_compression(options: CompressionOptions | None, service: Service) -> AppliedCompression:
    """What compression applies; raises ApiError 400 where the loaded model does not have it."""
    try:
        found = resolve(options, service.defaults, service.offer)
    except NotOfferedError as error:
        raise bad_request(str(error), code="not_offered", param=error.param) from error
    return AppliedCompression(found.variant, service.engine.guarded(found.exits))


async def encoded(
    http: Request, service: Service, text: str, *, add_special_tokens: bool = True
) -> list[int]:
    """The token ids of a text; raises ApiError as `in_turn` does."""
    work = service.tokenizer.encode(text, add_special_tokens=add_special_tokens)
    return await in_turn(http, service, work, brief=len(text) <= INLINE_CHARACTERS)


def text_field(body: ScoreBody) -> str:
    """The name of the field that holds the text to score."""
    return "text" if body.token_ids is None else "token_ids"


def admit(submit: Callable[[], None], service: Service, variant: Variant, *, param: str) -> None:
    """Hand a request to the engine; its refusals become 429, 503 and 400.

    `param` names the field to blame for a request of `variant` that needs more memory than there is.
    """
    try:
        submit()
    except QueueFullError as error:
        raise ApiError(429, str(error), code="queue_full", headers={"Retry-After": "1"}) from error
    except EngineStoppedError as error:
        raise draining() from error
    except RequestTooLargeError as error:
        message = f"{str(error).rstrip('.')}{_roomier(error.tokens, service, variant)}."
        raise bad_request(message, code="too_long", param=param) from error


def _roomier(tokens: int, service: Service, variant: Variant) -> str:
    """What else to ask for where another format of keys and values would hold so many tokens; empty otherwise."""
    for other in service.offer.variants:
        fits = other.kv_cache != variant.kv_cache and service.engine.capacity(other) >= tokens
        if fits and replace(variant, kv_cache=other.kv_cache) == other:
            return (
                f", or ask for kv_cache {other.kv_cache}, in which it holds {service.engine.capacity(other)}"
            )
    return ""


def failure(event: FailureEvent, timeout_s: float) -> ApiError:
    """The error response of a request that failed after admission; it had `timeout_s` seconds."""
    if event.kind == "timeout":
        return timed_out(timeout_s)
    if event.kind == "internal":
        message = f"{event.message} The log has the details under error id {event.error_id}."
        return ApiError(500, message, code="internal_error", admitted=True)
    return ApiError(
        503,
        "The server was stopped before this answer was complete; send the request again.",
        code="shutdown",
        headers={"Retry-After": "5"},
        admitted=True,
    )


def timed_out(timeout_s: float) -> ApiError:
    """The error of a request that saw no token in time."""
    message = (
        f"The request timed out before its first token, after the {timeout_s:g} s that it may take; "
        "try again later or raise --request-timeout."
    )
    return ApiError(504, message, code="timeout", admitted=True)


async def _tokens(
    http: Request,
    service: Service,
    text: str | None,
    ids: Sequence[int] | None,
    text_name: str,
    ids_name: str,
) -> Sequence[int]:
    """The token ids of whichever of the two fields was given."""
    if text is not None and ids is not None:
        raise bad_request(f"Both {text_name} and {ids_name} are given; give one of them.", param=text_name)
    if ids is not None:
        check_ids(ids, service.model.spec.vocab_size, ids_name)
        return ids
    if text is None:
        raise bad_request(
            f"Neither {text_name} nor {ids_name} is given; give one of them.",
            code="missing_field",
            param=text_name,
        )
    check_bytes(text, service.config.max_model_len, service.tokenizer.facts.longest_token_bytes, text_name)
    tokens = await encoded(http, service, text)
    if not tokens:
        raise bad_request(f"{text_name} holds no token of this model; give a longer text.", param=text_name)
    vocab_size = service.model.spec.vocab_size
    if max(tokens) >= vocab_size:  # a tokenizer may know more tokens than the model it came with
        raise bad_request(
            f"{text_name} holds the token {max(tokens)}, which the vocabulary of {vocab_size} lacks; reword it.",
            param=text_name,
        )
    return tokens


def _prompt_field(body: GenerateBody) -> str:
    """The name of the field that holds the prompt."""
    return "prompt" if body.prompt_token_ids is None else "prompt_token_ids"


def _check_sampling(body: GenerateBody, service: Service) -> None:
    if body.min_new_tokens > body.max_new_tokens:
        raise bad_request(
            f"min_new_tokens is {body.min_new_tokens}; it must not exceed max_new_tokens, {body.max_new_tokens}.",
            param="min_new_tokens",
        )
    if body.n > service.config.max_num_seqs:
        raise bad_request(
            f"n is {body.n}; this server runs at most {service.config.max_num_seqs} sequences at once.",
            param="n",
        )
