import random

import pytest

from apportion.core.config import LaneConfig, ModelConfig, SchedulerConfig
from apportion.core.errors import InvalidRequest
from apportion.core.kv_spec import KV_FORMATS, KVGroupSpec
from apportion.core.model_spec import ModelSpec, RopeSpec
from apportion.core.request import Request
from apportion.core.sampling_params import SamplingParams
from apportion.engine.engine import Engine
from apportion.kvcache.arena import Arena

from .fake_executor import FakeExecutor, sequential_run


def group(block_size=4, window=None, layers=1):
    # float32, one head of 64: 512 bytes a token and layer, far more than the 8 that the fake model uses
    return KVGroupSpec(tuple(range(layers)), 1, 8, 8, KV_FORMATS["float32"], block_size, sliding_window=window)


def spec(max_position=256):
    return ModelSpec("Fake", 1, 8, 1, 1, 8, 8, 1000, max_position, "float32", RopeSpec(), 1e-5, False, (None,))


class House:
    """An engine over fake executors, with one shared memory."""

    def __init__(self, models, num_slabs=8, slab_bytes=2048, lanes=(LaneConfig(),), rng=None, die_at=None, max_position=256, **scheduler):
        self.memory = bytearray(num_slabs * slab_bytes)
        self.executors = []
        die_at = die_at or {}

        def make_executor(config):
            first = not any(name == config.name for name, _ in self.executors)
            executor = FakeExecutor(self.memory, rng, die_at.get(config.name, ()) if first else ())
            self.executors.append((config.name, executor))
            return executor

        self.engine = Engine(lanes, make_executor, Arena(len(self.memory), slab_bytes), SchedulerConfig(**scheduler))
        self.groups = models
        for name, groups in models.items():
            self.engine.add_model(ModelConfig(model=name), spec(max_position), groups)

    def add(self, request_id, prompt, max_tokens=8, model="m", **fields):
        request = Request(request_id, model, list(prompt), SamplingParams(max_tokens=max_tokens, ignore_eos=True), **fields)
        self.engine.add_request(request)
        return request

    def run(self, max_steps=20000):
        for _ in range(max_steps):
            if not self.engine.has_unfinished:
                break
            self.engine.step(0.0)
            self.engine.check_integrity()
        assert not self.engine.has_unfinished, "the engine stands still"
        self.engine.check_integrity()

    def expected(self, request):
        return sequential_run(request.model, self.groups[request.model], request.prompt_token_ids, request.max_total_tokens - request.num_prompt_tokens)


def prompts(count, seed=0, low=1, high=40):
    rng = random.Random(seed)
    shared = [rng.randrange(1000) for _ in range(high)]
    return [shared[: rng.randrange(0, high // 2)] + [rng.randrange(1000) for _ in range(rng.randrange(low, high // 2))] for _ in range(count)]


def test_tokens_are_those_of_a_sequential_run():
    house = House({"m": (group(),)}, num_slabs=32, max_num_batched_tokens=16, max_num_seqs=4)
    requests = [house.add(str(i), p) for i, p in enumerate(prompts(10))]
    house.run()
    for request in requests:
        assert request.output_token_ids == house.expected(request)
        assert request.finish_reason == "length"


def test_a_request_that_never_fits_is_refused():
    house = House({"m": (group(),)}, num_slabs=2)
    with pytest.raises(InvalidRequest, match="kv_cache_memory|max_model_len"):
        house.add("x", range(300))
    with pytest.raises(InvalidRequest, match="empty"):
        house.add("y", [])
