"""One answer in a conversation, as the APIs that write blocks need it: the engine's work, and what the model wrote as blocks."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Any

from fastapi import Request, Response

from apportion.core.outputs import SequenceDelta
from apportion.core.sampling_params import SamplingParams
from apportion.serving.blocks import Block, Blocks, Step
from apportion.serving.conversation import Conversation
from apportion.serving.protocol.errors import HttpError
from apportion.serving.routes.generation import Generation, raise_failure
from apportion.serving.server import ServedModel, Server
from apportion.serving.stream import Stream


class Turn:
    """Made by `begin`. blocks: so far. params: what the engine samples with. finish_reason, stop_reason: None while it is written."""

    def __init__(self, generation: Generation, params: SamplingParams, server: Server, model: ServedModel, chat: Conversation, prompt: str):
        self.params = params
        self._generation = generation
        self._format = server.chat_format(model)
        self._transform = self._format.make_transform(chat, prompt)
        self._blocks = Blocks()
        self._token_ids: list[int] = []
        self._stream: Stream | None = None
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None

    @classmethod
    async def begin(
        cls,
        server: Server,
        request: Request,
        model: ServedModel,
        chat: Conversation,
        params: SamplingParams,
        *,
        streamed: bool,
        continues: bool = False,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> Turn:
        """continues: the model goes on with the last message. Errors: InvalidInput."""
        chat_format = server.chat_format(model)
        prompt = chat_format.render(chat, continues=continues)
        params = chat_format.constrain(params, chat, prompt)
        prompts = await model.encode_prompts([prompt], False)
        generation = Generation(server, request, model, prompts, params, streamed=streamed, priority=priority, cache_salt=cache_salt)
        return cls(generation, params, server, model, chat, prompt)

    @property
    def blocks(self) -> list[Block]:
        return self._blocks.list

    @property
    def num_prompt_tokens(self) -> int:
        return self._generation.num_prompt_tokens

    @property
    def num_tokens(self) -> int:
        return len(self._token_ids)

    @property
    def num_cached_tokens(self) -> int:
        """Known once the turn has ended."""
        return sum(end.num_cached_tokens for end in self._stream.ends.values()) if self._stream else 0

    @property
    def num_thought_tokens(self) -> int:
        return self._format.num_thought_tokens(self._token_ids, "".join(b.text for b in self.blocks if b.kind == "thought"))

    async def answer(self, make: Callable[[], object]) -> Response:
        """Everything at once: what `make` makes of the turn when it has ended."""

        def whole(stream: Stream, deltas: list[SequenceDelta]) -> object:
            self._stream = stream
            for _ in self._feed(deltas[0]):
                pass  # the blocks are what is wanted of the steps
            return make()

        return await self._generation.answer(whole)

    async def events(
        self, pieces: Callable[[AsyncGenerator[Step, None]], AsyncGenerator[bytes, None]], failure: Callable[[HttpError], bytes]
    ) -> Response:
        """What `pieces` makes of the steps as they come. failure: the last event, when it cannot go on."""
        return await self._generation.events(lambda stream: pieces(self._steps(stream)), failure)

    async def _steps(self, stream: Stream) -> AsyncGenerator[Step, None]:
        self._stream = stream
        while news := await stream.get():
            for step in self._feed(news[0]):
                yield step

    def _feed(self, delta: SequenceDelta) -> Iterator[Step]:
        raise_failure(delta)
        self._token_ids += delta.token_ids
        self.finish_reason, self.stop_reason = delta.finish_reason, delta.stop_reason
        yield from self._blocks.feed(self._transform.feed(delta.text))
        if delta.finish_reason is not None:
            yield from self._blocks.feed(self._transform.finish())
            yield from self._blocks.close(is_cut=delta.finish_reason != "stop")


def defaults_of(server: Server, model: ServedModel) -> dict[str, Any]:
    """What the model's authors would sample with, unless the server was told to pass over it."""
    return model.info.default_sampling if server.config.generation_config == "auto" else {}
