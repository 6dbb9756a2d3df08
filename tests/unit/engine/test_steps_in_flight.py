"""Two steps in flight on a device that is slow to answer: tokens are those of one step at a time, whatever ends, leaves or comes back."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from apportion import LLM, SamplingParams
from apportion.core.config import LaneConfig
from apportion.core.schedule import CachedRequest, SchedulerOutput
from apportion.engine.input_batch import InputBatch
from apportion.engine.model_runner import ModelRunner
from apportion.kernels.reference.ops import ReferenceOps
from apportion.platforms.cpu import CpuPlatform
from apportion.platforms.platform import Fetched
from tests.unit.engine.test_model_runner import TABLE, Bigram, new

GREEDY = {"temperature": 0.0, "detokenize": False}
PROMPTS = ["The river", "A long list: one, two, three,", "Once", "In the year 1900 the city", "She said", "The river bank was"]


class Slow:
    """CpuPlatform.fetch of a device that has a step only when it was asked three times, or is waited for."""

    def __init__(self):
        self.num_fed = 0

    def fetch(self, platform, tensor):
        asked = itertools.count()
        event = SimpleNamespace(query=lambda: next(asked) >= 3, synchronize=lambda: None)
        return Fetched(tensor.clone(), event)


@pytest.fixture
def slow(monkeypatch):
    device = Slow()
    monkeypatch.setattr(CpuPlatform, "fetch", lambda self, tensor: device.fetch(self, tensor))
    build = InputBatch.build

    def counting(self, num_scheduled):
        inputs = build(self, num_scheduled)
        device.num_fed += len(inputs.fed)
        return inputs

    monkeypatch.setattr(InputBatch, "build", counting)
    return device


def generate(model, params, prompts=PROMPTS, **config):
    with LLM(str(model), max_model_len=256, num_threads=1, **({"kv_cache_memory": 8 << 20} | config)) as llm:
        outputs = llm.generate(prompts, params)
        preemptions = sum(m.num_preemptions for m in llm.engine.metrics().values())
    return [
        (o.outputs[0].token_ids, o.outputs[0].text, o.outputs[0].finish_reason, o.outputs[0].stop_reason, o.outputs[0].logprobs)
        for o in outputs
    ], preemptions


CASES = {
    "lengths": [SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True) for n in (1, 2, 7, 12, 20, 3)],
    "seeds": [SamplingParams(temperature=1.0, top_p=0.9, seed=n, max_tokens=16) for n in range(6)],
    "stop strings": [SamplingParams(temperature=0.0, max_tokens=30, stop=[" the", "a"])] * 6,
    "stop tokens": [SamplingParams(temperature=0.9, seed=n, max_tokens=30, stop_token_ids=list(range(100, 900))) for n in range(6)],
    "rules": [
        SamplingParams(temperature=0.0, max_tokens=16, repetition_penalty=1.3, min_tokens=5),
        SamplingParams(temperature=0.0, max_tokens=16),
        SamplingParams(temperature=0.0, max_tokens=16, presence_penalty=1.0, logprobs=2),
        SamplingParams(temperature=0.8, seed=3, max_tokens=16, bad_words=[" the"]),
        SamplingParams(temperature=0.0, max_tokens=16, logprobs=1),
        SamplingParams(temperature=0.0, max_tokens=16, prompt_logprobs=1),
    ],
}


@pytest.mark.parametrize("depth", [2, 3])
@pytest.mark.parametrize("case", CASES)
def test_tokens_are_those_of_one_step_at_a_time(bundled_model, slow, case, depth):
    expected, _ = generate(bundled_model, CASES[case])
    before = slow.num_fed
    found, _ = generate(bundled_model, CASES[case], lanes=(LaneConfig(depth=depth),))
    assert found == expected
    assert before == 0 < slow.num_fed, "with one step at a time every token is known"


def test_preempted_and_found_in_the_prefix_cache(bundled_model, slow):
    params = [SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True)] * 6
    expected, _ = generate(bundled_model, params)
    found, preemptions = generate(bundled_model, params, lanes=(LaneConfig(depth=2),), kv_cache_memory=2 << 20)
    assert found == expected and preemptions > 0 and slow.num_fed > 100


def test_a_row_taken_over_while_its_step_is_in_flight(slow):
    """The request leaves and another takes its row before its token arrives: neither reads what is not its own."""
    platform = CpuPlatform()
    run = ModelRunner(Bigram(), [SimpleNamespace(plan=lambda metadata: metadata, recomputed=0)], ReferenceOps(), platform)
    first = run.launch(SchedulerOutput(0, "m", {"a": 2}, [new("a", [1, 2])]))
    second = run.launch(SchedulerOutput(1, "m", {"a": 1}, [], [CachedRequest("a", 2)]))
    third = run.launch(SchedulerOutput(2, "m", {"a": 3, "b": 1}, [new("a", [4, 5, 6]), new("b", [7])], finished_ids=["a"]))
    assert not first.is_ready and not third.is_ready
    greedy = TABLE.argmax(dim=1).tolist()
    assert third.result().token_ids == {"a": [greedy[6]], "b": [greedy[7]]}
    assert first.result().token_ids == {"a": [greedy[2]]} and second.result().token_ids == {"a": [greedy[greedy[2]]]}
    fourth = run.launch(SchedulerOutput(3, "m", {"a": 1}, [], [CachedRequest("a", 3)]))
    assert fourth.result().token_ids == {"a": [greedy[greedy[6]]]}, "its own token, not that of the step before it came"


def test_a_row_without_a_token_feeds_the_next_step_a_zero(slow):
    table = TABLE.clone()
    table[2] = torch.nan
    run = ModelRunner(Bigram(table), [SimpleNamespace(plan=lambda metadata: metadata, recomputed=0)], ReferenceOps(), CpuPlatform())
    first = run.launch(SchedulerOutput(0, "m", {"a": 2}, [new("a", [1, 2])]))
    second = run.launch(SchedulerOutput(1, "m", {"a": 1}, [], [CachedRequest("a", 2)]))
    assert second.result().token_ids == {"a": [int(table[0].argmax())]}
    assert first.result().token_ids == {"a": []} and "NaN or infinite" in first.result().errors["a"]
