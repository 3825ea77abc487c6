"""`POST /tokenize`, `POST /detokenize`, `GET /tokenizer_info`: the loaded model's tokenizer."""

from typing import Annotated

from fastapi import APIRouter, Depends

from exeunt.server.api.errors import documented
from exeunt.server.api.json_route import StrictJSONRoute
from exeunt.server.api.responses import DetokenizeResponse, TokenizeResponse, TokenizerInfo
from exeunt.server.api.schemas import DetokenizeBody, TokenizeBody
from exeunt.server.api.service import Service, loaded_service
from exeunt.server.api.token_limits import check_ids

router = APIRouter(route_class=StrictJSONRoute)

ServiceLoaded = Annotated[Service, Depends(loaded_service)]


@router.post("/tokenize", summary="Cut a text into tokens", responses=documented(400, 401, 413, 503))
async def tokenize(body: TokenizeBody, service: ServiceLoaded) -> TokenizeResponse:
    """The token ids of a text, as a prompt would be cut."""
    ids = await service.tokenizer.encode(body.prompt, add_special_tokens=body.add_special_tokens)
    return TokenizeResponse(
        count=len(ids),
        max_model_len=service.config.max_model_len,
        tokens=ids,
        token_strs=await service.tokenizer.names(ids),
    )


@router.post("/detokenize", summary="Join tokens to a text", responses=documented(400, 401, 413, 503))
async def detokenize(body: DetokenizeBody, service: ServiceLoaded) -> DetokenizeResponse:
    """The text of token ids."""
    check_ids(body.tokens, service.model.spec.vocab_size, "tokens")
    return DetokenizeResponse(prompt=await service.tokenizer.decode(body.tokens))


@router.get("/tokenizer_info", summary="The tokenizer", responses=documented(401, 503))
async def tokenizer_info(service: ServiceLoaded) -> TokenizerInfo:
    """What the tokenizer is and which special tokens it has."""
    facts = service.tokenizer.facts
    return TokenizerInfo(
        tokenizer_class=facts.kind,
        vocab_size=facts.vocab_size,
        special_tokens=facts.special_tokens,
        has_chat_template=facts.has_chat_template,
    )
