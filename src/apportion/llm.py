"""`LLM`: a model in this process, asked in batches. Names, defaults and result shapes are vLLM's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from apportion.assets import DEFAULT_MODEL
from apportion.core.config import EngineConfig, ModelConfig
from apportion.core.errors import InvalidParameter, InvalidRequest, Unsupported
from apportion.core.grammar import Grammar
from apportion.core.keywords import resolve_keywords
from apportion.core.outputs import EmbeddingOutput, EmbeddingRequestOutput, RequestOutput
from apportion.core.pooling_params import PoolingParams
from apportion.core.request import Request
from apportion.core.sampling_params import SamplingParams
from apportion.engine.build import Blueprint, build_engine, plan_engine
from apportion.engine.input_processor import InputProcessor
from apportion.engine.memory_plan import MemoryPlan
from apportion.engine.output_processor import OutputProcessor
from apportion.models.checkpoint import read_generation_defaults, resolve_folder
from apportion.processor.tokenizer import Tokenizer

if TYPE_CHECKING:
    from apportion.serving.structured.compiler import GrammarCompiler

Prompt = str | Sequence[int] | Mapping[str, Any]
Conversation = Sequence[Mapping[str, Any]]  # of messages: {'role', 'content'}


class LLM:
    """One model, loaded, with an engine of its own. Not for several threads at once. Close it, or use it in a `with` statement.

    model: a checkpoint folder or a hub id; None is the bundled default. tokenizer: folder, file or hub id, None for the model's own.
    Engine keywords, with vLLM's meaning where it has them: revision, dtype, max_model_len (prompt and output together), load_format
    ("auto", "dummy"), device, kernels ("auto", "cpu", "reference"), num_threads, tensor_parallel_size, max_num_seqs,
    max_num_batched_tokens, scheduling_policy ("fcfs", "priority"), enable_chunked_prefill, long_prefill_token_threshold,
    kv_cache_memory (bytes), kv_cache_dtype, block_size, enable_prefix_caching, seed. lanes: LaneConfig for each executor, such as one for
    prefill and one for decode; one for everything unless given.
    progress: called with (bytes loaded, bytes in all) while weights load.

    Errors: CheckpointError, Unsupported (an architecture), OutOfMemory (naming what would fit), InvalidParameter.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        tokenizer: str | Path | None = None,
        progress: Callable[[int, int], None] | None = None,
        **engine: Any,
    ) -> None:
        blueprint = plan_engine(engine_config(model, **engine))
        self._start(blueprint, tokenizer, progress)

    @classmethod
    def from_blueprint(
        cls, blueprint: Blueprint, *, tokenizer: str | Path | None = None, progress: Callable[[int, int], None] | None = None
    ) -> LLM:
        """Build what `plan_engine` decided (so that the plan can be shown first)."""
        llm = cls.__new__(cls)
        llm._start(blueprint, tokenizer, progress)
        return llm

    def _start(self, blueprint: Blueprint, tokenizer: str | Path | None, progress: Callable[[int, int], None] | None) -> None:
        self.config = blueprint.config
        self.memory_plan: MemoryPlan = blueprint.memory
        model = self.config.models[0]
        self.tokenizer = Tokenizer.from_folder(_tokenizer_folder(tokenizer) if tokenizer else model.model)
        self._default_sampling_params = read_generation_defaults(Path(model.model))
        self._outputs = OutputProcessor({model.name: self.tokenizer})
        self._request_ids = count()
        self._is_running = False
        self._grammars: GrammarCompiler | None = None  # started with the first request that needs it
        spec = blueprint.specs[model.name]
        self.engine = build_engine(blueprint, self._outputs, progress)
        max_model_len = self.engine.models[model.name].scheduler.max_model_len
        self._inputs = InputProcessor(model.name, spec, max_model_len, self.tokenizer, self.config.seed)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = False,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Complete prompts, all at once, and return their outputs in order.

        prompts: text, token ids, {"prompt": text}, {"prompt_token_ids": ids}, or a list of these. sampling_params: one for all or one
        each; None takes the model's own defaults. use_tqdm: show a progress bar on stderr. priority: one each, smaller runs earlier
        (with scheduling_policy="priority").

        Errors: InvalidRequest and InvalidParameter before anything has run. What fails later fails alone: its output has
        finish_reason "error" and says why in `error`.
        """
        requests = self._add(_prompt_list(prompts), sampling_params, priority, add_special_tokens=True)
        return self._finish(requests, use_tqdm)

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = False,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation (a list of {"role", "content"}) or several. chat_template: jinja2 text instead of the model's own."""
        conversations: Any = [messages] if not messages or not _is_list(messages) or isinstance(messages[0], Mapping) else messages
        prompts = [
            self.render_chat(c, chat_template, add_generation_prompt=add_generation_prompt, tools=tools, **(chat_template_kwargs or {}))
            for c in conversations
        ]
        return self._finish(self._add(prompts, sampling_params, None, add_special_tokens=False), use_tqdm)

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, *, add_special_tokens: bool = True
    ) -> Iterator[RequestOutput]:
        """Complete one prompt and yield its output so far after every step; the text only grows. Ending the loop early aborts it."""
        yield from self._run(self._add([prompt], sampling_params, None, add_special_tokens=add_special_tokens), finished_only=False)

    def embed(
        self, prompts: Prompt | Sequence[Prompt], pooling_params: PoolingParams | None = None, *, use_tqdm: bool = False
    ) -> list[EmbeddingRequestOutput]:
        """A vector for each prompt, in order. pooling_params None: that of the last token, normalized."""
        params = pooling_params or PoolingParams()
        added: dict[str, list[Request]] = {}
        with self._all_or_none(added):
            for prompt in _prompt_list(prompts):
                text, content = _text_and_content(prompt)
                request_id = str(next(self._request_ids))
                self._queue(request_id, text, [self._inputs.make_pooling_request(request_id, content, params)], added)
        return [_embedding_output(output) for output in self._finish(added, use_tqdm)]

    def render_chat(self, messages: Conversation, chat_template: str | None = None, **variables: Any) -> str:
        """The prompt of a conversation. Errors: InvalidRequest when there is no template or it refuses the messages."""
        if not _is_list(messages):
            raise InvalidRequest(f"a chat is a list of messages, got {type(messages).__name__}")
        template = self.tokenizer.chat_template if chat_template is None else self.tokenizer.compile_template(chat_template)
        return template.render(messages, **variables)

    def get_tokenizer(self) -> Tokenizer:
        return self.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What generation_config.json of the model recommends, over SamplingParams' defaults."""
        return SamplingParams(**self._default_sampling_params)

    def close(self) -> None:
        """End the workers and give back memory. Idempotent."""
        self.engine.shutdown()
        if self._grammars is not None:
            self._grammars.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _add(
        self,
        prompts: Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        priority: Sequence[int] | None,
        *,
        add_special_tokens: bool,
    ) -> dict[str, list[Request]]:
        """Queue all prompts or, when one cannot be served, none."""
        params = _one_each("sampling_params", sampling_params, len(prompts)) if _is_list(sampling_params) else None
        ranks = _one_each("priority", priority, len(prompts)) if priority is not None else None
        ordered = self.config.scheduler.policy == "priority"
        added: dict[str, list[Request]] = {}
        with self._all_or_none(added):
            for i, prompt in enumerate(prompts):
                own = params[i] if params else sampling_params or self.get_default_sampling_params()
                if not isinstance(own, SamplingParams):
                    raise InvalidParameter(f"sampling_params must be SamplingParams, got {type(own).__name__}")
                if not ordered and (ranks or own.priority):
                    raise InvalidParameter('priority needs scheduling_policy="priority"')
                text, content = _text_and_content(prompt)
                request_id = str(next(self._request_ids))
                requests = self._inputs.make_requests(
                    request_id,
                    content,
                    own,
                    priority=ranks[i] if ranks else None,
                    add_special_tokens=add_special_tokens,
                    start_grammar=self._grammar(own),
                )
                self._queue(request_id, text, requests, added)
        return added

    @contextmanager
    def _all_or_none(self, added: dict[str, list[Request]]) -> Iterator[None]:
        if self._is_running:
            raise InvalidRequest("this LLM is in the middle of another call; finish or close that one first")
        try:
            yield
        except BaseException:
            self._abort(added)
            raise

    def _queue(self, request_id: str, text: str | None, requests: list[Request], added: dict[str, list[Request]]) -> None:
        added[request_id] = []
        self._outputs.add(request_id, text, requests)
        for request in requests:
            self.engine.add_request(request)
            added[request_id].append(request)

    def _grammar(self, params: SamplingParams) -> Callable[[], Grammar] | None:
        if params.structured_outputs is None:
            return None
        if self._grammars is None:
            try:
                from apportion.serving.structured.compiler import GrammarCompiler
            except ImportError as error:
                raise Unsupported("structured outputs need llguidance: pip install '.[serve]'") from error
            self._grammars = GrammarCompiler()
            self._grammars.add_model(self._inputs.model, self.tokenizer, self._inputs.spec.vocab, sorted(self._inputs.eos_token_ids))
        return self._grammars.compile(self._inputs.model, params.structured_outputs).start

    def _finish(self, requests: dict[str, list[Request]], use_tqdm: bool) -> list[RequestOutput]:
        order = list(requests)
        if use_tqdm:
            from rich.console import Console
            from rich.progress import track

            steps = track(self._run(requests, True), "generating", total=len(order), console=Console(stderr=True))
        else:
            steps = self._run(requests, True)
        done = {output.request_id: output for output in steps}
        return [done[request_id] for request_id in order]

    def _run(self, requests: dict[str, list[Request]], finished_only: bool) -> Iterator[RequestOutput]:
        """Step until all of `requests` are finished. However it ends, none of them is left in the engine."""
        self._is_running = True
        open_ids = set(requests)
        try:
            while open_ids:
                for output in self._outputs.outputs(self.engine.step(), finished_only=finished_only):
                    if output.finished:
                        open_ids.discard(output.request_id)
                    yield output
        finally:
            self._is_running = False
            self._abort({request_id: requests[request_id] for request_id in open_ids})

    def _abort(self, requests: dict[str, list[Request]]) -> None:
        for sequences in requests.values():
            self._outputs.forget(sequences)
            for request in sequences:
                self.engine.abort(request.request_id)


def engine_config(model: str | Path | None = None, **engine: Any) -> EngineConfig:
    """LLM's keywords as the frozen tree; no model is the bundled one. Errors: InvalidParameter naming a keyword that does not exist."""
    return resolve_keywords([ModelConfig(model=str(DEFAULT_MODEL if model is None else model))], **engine)


def _embedding_output(output: RequestOutput) -> EmbeddingRequestOutput:
    return EmbeddingRequestOutput(
        request_id=output.request_id,
        outputs=EmbeddingOutput(output.embedding or []),
        prompt_token_ids=output.prompt_token_ids,
        num_cached_tokens=output.num_cached_tokens,
        error=output.outputs[0].error,
    )


def _tokenizer_folder(tokenizer: str | Path) -> Path:
    path = Path(tokenizer)
    return path if path.is_file() else resolve_folder(str(tokenizer))


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _one_each(name: str, values: Any, num_prompts: int) -> Sequence[Any]:
    if len(values) != num_prompts:
        raise InvalidParameter(f"{name} has {len(values)} entries for {num_prompts} prompts")
    return list(values)


def _prompt_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or many; a flat list of integers is one."""
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if isinstance(prompts, bytes) or not isinstance(prompts, Iterable):
        raise InvalidRequest(f"prompts are text, token ids, mappings or a list of these, got {type(prompts).__name__}")
    listed: list[Any] = list(prompts)
    if listed and all(isinstance(p, int) for p in listed):
        return [listed]
    return listed


def _text_and_content(prompt: Prompt) -> tuple[str | None, str | Sequence[int]]:
    """(the text to show in the output, what to compute on)."""
    if isinstance(prompt, str):
        return prompt, prompt
    if isinstance(prompt, Mapping):
        if "prompt_token_ids" in prompt:
            return prompt.get("prompt"), prompt["prompt_token_ids"]
        if isinstance(prompt.get("prompt"), str):
            return prompt["prompt"], prompt["prompt"]
        raise InvalidRequest(f"a prompt mapping needs 'prompt' or 'prompt_token_ids', got {', '.join(map(repr, prompt)) or 'nothing'}")
    if isinstance(prompt, bytes) or not isinstance(prompt, Sequence):
        raise InvalidRequest(f"a prompt is text, token ids or a mapping, got {type(prompt).__name__}")
    return None, prompt
