"""/v1/embeddings."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from apportion.core.errors import InternalError
from apportion.core.outputs import SequenceDelta
from apportion.core.sampling_params import SamplingParams
from apportion.serving.protocol.embeddings import EmbeddingRequest, answer
from apportion.serving.routes.generation import Generation
from apportion.serving.server import log_fields, server_of
from apportion.serving.stream import Stream

router = APIRouter()


@router.post("/v1/embeddings", response_class=Response, tags=["generation"])
async def create_embeddings(body: EmbeddingRequest, request: Request) -> Response:
    server = server_of(request)
    log_fields(request, user=body.user)
    model = await server.loaded_model(body.model, request)
    body.check_dimensions(model.info.hidden_size)
    prompts = await model.encode_prompts(body.inputs(), body.add_special_tokens)
    generation = Generation(
        server,
        request,
        model,
        prompts,
        SamplingParams(temperature=0.0, max_tokens=1),
        streamed=False,
        priority=body.priority,
        cache_salt=body.cache_salt,
        pooling_params=body.pooling_params(),
    )

    def whole(stream: Stream, deltas: list[SequenceDelta]) -> object:
        vectors = [stream.ends[r.request_id].embedding for r in stream.requests]
        if any(vector is None for vector in vectors):
            raise InternalError("the engine ended a request for an embedding without one")
        num_tokens = sum(len(r.prompt_token_ids) for r in stream.requests)
        return answer(body.model or model.name, [v for v in vectors if v], num_tokens, base64=body.encoding_format == "base64")

    return await generation.answer(whole)
