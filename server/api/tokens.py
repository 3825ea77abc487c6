"""`POST /tokenize`, `POST /detokenize`, `GET /tokenizer_info`: the loaded model's tokenizer."""

from typing import Annotated

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from exeunt.server.api.admission import encoded
from exeunt.server.api.errors import documented
from exeunt.server.api.json_route import StrictRoute
from exeunt.server.api.responses import DetokenizeResponse, TokenizeResponse, TokenizerInfo
from exeunt.server.api.schemas import DetokenizeBody, TokenizeBody
from exeunt.server.api.service import Service, loaded_service
from exeunt.server.api.token_limits import check_ids
from exeunt.server.api.tokenizer import INLINE_TOKENS, LONG_TOKENS
from exeunt.server.api.turn import in_turn

router = APIRouter(route_class=StrictRoute)

ServiceLoaded = Annotated[Service, Depends(loaded_service)]


@router.post(
    "/tokenize",
    summary="Cut a text into tokens",
    response_model=TokenizeResponse,
    responses=documented(400, 401, 408, 413, 415, 503, 504),
)
async def tokenize(body: TokenizeBody, http: Request, service: ServiceLoaded) -> Response:
    """The token ids of a text, as a prompt would be cut."""
    ids = await encoded(http, service, body.prompt, add_special_tokens=body.add_special_tokens)
    answer = TokenizeResponse.model_construct(
        count=len(ids),
        max_model_len=service.config.max_model_len,
        tokens=ids,
        token_strs=await in_turn(
            http, service, service.tokenizer.names(ids), brief=len(ids) <= INLINE_TOKENS
        ),
    )
    large = len(ids) > LONG_TOKENS
    writing = service.beside(answer.model_dump_json, large=large)
    written = await in_turn(http, service, writing, brief=not large, where="while its answer was written")
    return Response(written, media_type="application/json")


@router.post(
    "/detokenize", summary="Join tokens to a text", responses=documented(400, 401, 408, 413, 415, 503, 504)
)
async def detokenize(body: DetokenizeBody, http: Request, service: ServiceLoaded) -> DetokenizeResponse:
    """The text of token ids."""
    check_ids(body.tokens, service.model.spec.vocab_size, "tokens")
    work = service.tokenizer.decode(body.tokens)
    text = await in_turn(http, service, work, brief=len(body.tokens) <= INLINE_TOKENS)
    return DetokenizeResponse(prompt=text)


@router.get("/tokenizer_info", summary="The tokenizer", responses=documented(400, 401, 503))
async def tokenizer_info(service: ServiceLoaded) -> TokenizerInfo:
    """What the tokenizer is and which special tokens it has."""
    facts = service.tokenizer.facts
    return TokenizerInfo(
        tokenizer_class=facts.kind,
        vocab_size=facts.vocab_size,
        special_tokens=facts.special_tokens,
        has_chat_template=facts.has_chat_template,
    )
