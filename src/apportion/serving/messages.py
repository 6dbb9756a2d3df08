"""What the API process and the engine process say to each other: msgspec structs over ZeroMQ. Plain data, no torch.

The API process sends `Command`s; the engine process answers with `Event`s. A request is answered by `Refused`, or by `Accepted`, any number
of `Deltas` and, with the last delta of its last sequence, `Finished`. Nothing comes after a `Refused` or a `Finished`.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Any

import msgspec

from apportion.core.config import EngineConfig
from apportion.core.metrics import EngineMetrics
from apportion.core.outputs import SequenceDelta
from apportion.core.pooling_params import PoolingParams
from apportion.core.request import Request
from apportion.core.sampling_params import SamplingParams


class ModelState(StrEnum):
    UNLOADED = "unloaded"
    LOADING = "loading"
    LOADED = "loaded"
    FAILED = "failed"


class EngineSetup(msgspec.Struct, frozen=True):
    """The first line on the engine process's standard input, as JSON. config: the engine with every model that may be loaded.

    address: of the API process's socket. folder: private to this pair of processes. preload: names to load at once, in order.
    model_memory: bytes that the weights of loaded models may take together; None is what memory leaves.
    heartbeat_s: how often `Status` is sent when nothing else happens. tokenizers: by model name, where one is not beside its model.
    """

    address: str
    folder: str
    config: EngineConfig
    preload: tuple[str, ...]
    tokenizers: dict[str, str] = {}
    model_memory: int | None = None
    heartbeat_s: float = 0.5
    log_format: str = "text"


class ModelInfo(msgspec.Struct, frozen=True):
    """What the API process knows of a model. tokenizer_folder: readable without transformers; "" when the model has no tokenizer.

    weight_bytes: what loading takes; 0 until the checkpoint was looked at. error: why state is "failed".
    """

    name: str
    folder: str
    state: ModelState
    max_model_len: int = 0
    vocab_size: int = 0
    hidden_size: int = 0
    weight_bytes: int = 0
    tokenizer_folder: str = ""
    default_sampling: dict[str, Any] = {}
    error: str = ""


# Commands: API process -> engine process


class Generate(msgspec.Struct, tag=True):
    """One prompt and its params.n sequences.

    stream: tell what is new after every step; otherwise each sequence once, when it is finished. arrival_s: time.monotonic() of the
    request's arrival, which both processes share. cache_salt: separates prefix caches. pooling_params: an embedding is wanted
    instead of text.
    """

    request_id: str
    model: str
    prompt_token_ids: list[int]
    params: SamplingParams
    stream: bool
    arrival_s: float
    prompt: str | None = None
    priority: int = 0
    cache_salt: str = ""
    pooling_params: PoolingParams | None = None


class Abort(msgspec.Struct, tag=True):
    request_ids: list[str]


class LoadModel(msgspec.Struct, tag=True):
    """Answered by `Answer` with the same call_id; least recently used idle models make room."""

    call_id: int
    name: str


class UnloadModel(msgspec.Struct, tag=True):
    """Answered by `Answer`. Requests of the model are aborted."""

    call_id: int
    name: str


class CheckIntegrity(msgspec.Struct, tag=True):
    """Account for every KV block; answered by `Answer`."""

    call_id: int


Command = Generate | Abort | LoadModel | UnloadModel | CheckIntegrity


# Events: engine process -> API process


class Accepted(msgspec.Struct, tag=True):
    request_id: str


class Refused(msgspec.Struct, tag=True):
    """kind: the name of the class in core.errors."""

    request_id: str
    kind: str
    message: str


class Finished(msgspec.Struct, tag=True):
    """All sequences of a request have ended. Durations in seconds; None where the request never got that far.

    queue_s: arrival to first scheduled; prefill_s: to the first token; decode_s: first to last token.
    """

    request_id: str
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    queue_s: float | None = None
    prefill_s: float | None = None
    decode_s: float | None = None
    embedding: list[float] | None = None

    @classmethod
    def of(cls, request_id: str, requests: Sequence[Request]) -> Finished:
        first = requests[0]
        times = first.times
        scheduled, token, last = times.first_scheduled_s, times.first_token_s, times.last_token_s
        return cls(
            request_id=request_id,
            num_cached_tokens=first.num_cached_tokens,
            num_preemptions=sum(request.num_preemptions for request in requests),
            queue_s=None if scheduled is None else scheduled - times.arrival_s,
            prefill_s=None if scheduled is None or token is None else token - scheduled,
            decode_s=None if token is None or last is None else last - token,
            embedding=first.embedding,
        )


class Deltas(msgspec.Struct, tag=True):
    """News of one step, of every request that is concerned; finished: those that ended with it."""

    deltas: list[SequenceDelta]
    finished: list[Finished] = []


class LaneStatus(msgspec.Struct):
    """num_threads: its compute share; 0 on a device that has no threads to share."""

    name: str
    phases: list[str]
    models: list[str]
    num_threads: int
    num_deaths: int
    in_flight: int

    @classmethod
    def of(cls, lane: Any) -> LaneStatus:
        config = lane.config
        return cls(config.name, sorted(config.phases), list(config.models), config.num_threads or 0, lane.num_deaths, len(lane.tickets))


class CacheStatus(msgspec.Struct):
    """How the KV memory serves one model. num_blocks: of block_size tokens, if it had all of the memory."""

    block_size: int
    cache_dtype: str
    enable_prefix_caching: bool
    num_blocks: int


class Status(msgspec.Struct, tag=True):
    """The heartbeat. busy: requests are unfinished. since_step_s: how long ago a step ended while there was work; 0 when idle.

    caches, metrics: by model. kv_bytes: what its blocks hold of kv_total_bytes. steps: model and tokens of the steps since the last Status.
    """

    busy: bool
    since_step_s: float
    metrics: dict[str, EngineMetrics] = {}
    lanes: list[LaneStatus] = []
    caches: dict[str, CacheStatus] = {}
    kv_bytes: dict[str, int] = {}
    kv_total_bytes: int = 0
    steps: list[tuple[str, int]] = []
    rss_bytes: int = 0


class Models(msgspec.Struct, tag=True):
    """Every model, whenever the state of one has changed. The first one says that the engine is ready."""

    models: list[ModelInfo]


class Answer(msgspec.Struct, tag=True):
    """To a command with a call_id. kind, message: of the error, "" when there was none."""

    call_id: int
    kind: str = ""
    message: str = ""


Event = Accepted | Refused | Deltas | Status | Models | Answer


class LastWords(msgspec.Struct):
    """What the engine process writes to its report pipe before it dies of an exception. frames: the last ones, innermost last."""

    type: str
    message: str
    frames: list[str] = []

    def __str__(self) -> str:
        where = f" (at {self.frames[-1]})" if self.frames else ""
        return f"{self.type}: {self.message}{where}"
