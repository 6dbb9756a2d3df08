"""An engine over fake executors, all on one fake memory; and what its requests should say."""

from __future__ import annotations

import random

from apportion.core.config import LaneConfig, ModelConfig, SchedulerConfig
from apportion.core.kv_spec import KV_FORMATS, KVGroupSpec
from apportion.core.model_spec import ModelSpec, RopeSpec
from apportion.core.request import Request
from apportion.core.sampling_params import SamplingParams
from apportion.engine.engine import Engine
from apportion.kvcache.arena import Arena

from .fake_executor import FakeExecutor, sequential_run

ONE_LANE = (LaneConfig(),)
TWO_LANES = (LaneConfig(name="p", phases=frozenset({"prefill"})), LaneConfig(name="d", phases=frozenset({"decode"})))


def group(block_size=4, window=None, layers=1):
    """64 bytes a token and layer, of which the fake model uses 8."""
    return KVGroupSpec(tuple(range(layers)), 1, 8, 8, KV_FORMATS["float32"], block_size, sliding_window=window)


def model_spec(max_position=256):
    return ModelSpec("Fake", 1, 8, 1, 1, 8, 8, 1000, max_position, "float32", RopeSpec(), 1e-5, False, (None,))


def prompts(count, seed=0, longest=40):
    """Prompts that often share a beginning."""
    rng = random.Random(seed)
    shared = [rng.randrange(1000) for _ in range(longest)]
    lengths = [(rng.randint(0, longest // 2), rng.randint(1, longest // 2)) for _ in range(count)]
    return [shared[:common] + [rng.randrange(1000) for _ in range(own)] for common, own in lengths]


class House:
    """models: name -> layer groups. die_at: lane name -> for each life of its executor, the submits at which it dies."""

    def __init__(self, models, num_slabs=8, slab_bytes=2048, lanes=ONE_LANE, rng=None, die_at=None, max_position=256, **scheduler):
        self.arena = Arena(num_slabs * slab_bytes, slab_bytes)
        self.memory = bytearray(self.arena.num_bytes)
        self.executors = []
        self.rng = rng

        def make_executor(config):
            lives = (die_at or {}).get(config.name, [])
            life = sum(name == config.name for name, _ in self.executors)
            executor = FakeExecutor(self.memory, rng, lives[life] if life < len(lives) else ())
            self.executors.append((config.name, executor))
            return executor

        self.engine = Engine(lanes, make_executor, self.arena, SchedulerConfig(**scheduler))
        self.groups = {}
        for name, groups in models.items():
            self.load(name, groups, max_position)

    def load(self, name, groups, max_position=256):
        self.groups[name] = groups
        return self.engine.add_model(ModelConfig(model=name), model_spec(max_position), groups)

    def add(self, request_id, prompt, max_tokens=8, model="m", sampling=None, **fields):
        request = Request(request_id, model, list(prompt), SamplingParams(max_tokens=max_tokens, **(sampling or {})), **fields)
        self.engine.add_request(request)
        return request

    def run(self, max_steps=5000, before_step=lambda index: None):
        """Step until there is nothing left, accounting for every block after each step; returns the updates."""
        updates = []
        for index in range(max_steps):
            before_step(index)
            if not self.engine.has_unfinished:
                break
            updates += self.engine.step(0.0)
            self.engine.check_integrity()
        assert not self.engine.has_unfinished, "the engine stands still"
        return updates

    def expected(self, request):
        count = request.max_total_tokens - request.num_prompt_tokens
        return sequential_run(request.model, self.groups[request.model], request.prompt_token_ids, count, request.stop_ids)
