"""/tokenize and /detokenize."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from apportion.core.errors import InvalidParameter
from apportion.serving.protocol.openai import ChatCompletionRequest, DetokenizeRequest, TokenizeRequest
from apportion.serving.routes.chat import render
from apportion.serving.server import server_of

router = APIRouter(tags=["tokens"])


@router.post("/tokenize")
async def tokenize(body: TokenizeRequest, request: Request) -> dict[str, Any]:
    server = server_of(request)
    model = await server.loaded_model(body.model, request)
    if (body.prompt is None) == (body.messages is None):
        raise InvalidParameter("give either prompt or messages")
    server.require_trust(body.chat_template)
    if body.messages is not None:
        chat = ChatCompletionRequest(
            messages=body.messages,
            add_generation_prompt=body.add_generation_prompt,
            chat_template=body.chat_template,
            chat_template_kwargs=body.chat_template_kwargs,
        )
        tokens = await model.encode(render(chat, chat.conversation(), server.chat_format(model)), bool(body.add_special_tokens))
    else:
        tokens = await model.encode(body.prompt or "", body.add_special_tokens is not False)
    strings = [model.tokenizer.backend.id_to_token(token) for token in tokens] if body.return_token_strs else None
    return {"count": len(tokens), "max_model_len": model.info.max_model_len, "tokens": tokens, "token_strs": strings}


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, request: Request) -> dict[str, Any]:
    model = await server_of(request).loaded_model(body.model, request)
    for position, token in enumerate(body.tokens):
        if not 0 <= token < max(model.info.vocab_size, model.tokenizer.vocab_size):
            raise InvalidParameter(f"tokens holds {token} at place {position}, outside the vocabulary of {model.info.vocab_size} tokens")
    return {"prompt": model.tokenizer.decode(body.tokens, skip_special_tokens=False)}
