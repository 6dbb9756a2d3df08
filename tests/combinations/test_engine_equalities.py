"""The same tokens, bit by bit, whoever else is in the batch and however the work was cut, cached, preempted, split or killed.

Every case runs the same requests (greedy, seeded, penalized) and must give what each of them gives alone, in one chunk, on one thread,
without a cache. Where the kernels promise it, log-probabilities must be the same bits too. Every case also shows that what it is about
did happen.
"""

import json
import os
import signal
from dataclasses import replace

import pytest
import torch

from apportion.core.config import LaneConfig, ModelConfig
from apportion.core.sampling_params import SamplingParams
from apportion.engine import scheduler
from apportion.kernels.dispatch import choose
from apportion.models.checkpoint import read_spec

from .harness import DECODE, NAME, PREFILL, Setup, generate, running

INVARIANT = choose("cpu")[0].capability.batch_invariant
NUM_TOKENS = 24
LENGTHS = (1, 5, 31, 32, 33, 64, 90, 130)  # around block and chunk borders
PROMPTS = [[1, *(3 + (i * 7 + j * 13) % 400 for j in range(length - 1))] for i, length in enumerate(LENGTHS)]
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=0)
SEEDED = replace(GREEDY, temperature=1.0, seed=7)
PARAMS = [
    GREEDY,
    SEEDED,
    replace(SEEDED, seed=8, top_p=0.9),
    GREEDY,
    replace(GREEDY, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.2),
    replace(SEEDED, top_k=20, min_p=0.02, frequency_penalty=0.5),
    GREEDY,
    replace(SEEDED, seed=-5, logit_bias={9: 3.0}, min_tokens=4),
]


def two_lanes(executor, depth=1):
    return (LaneConfig(name="p", phases=PREFILL, executor=executor), LaneConfig(name="d", phases=DECODE, executor=executor, depth=depth))


SMALL = {
    "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 4, "num_attention_heads": 6, "vocab_size": 512, "dtype": "bfloat16",
    "max_position_embeddings": 512, "eos_token_id": 2, "tie_word_embeddings": False,
}  # fmt: skip
RANDOM = {
    # two KV groups: two layers see everything, two a window of 40 tokens, so that blocks die while requests run
    "windows": SMALL | {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "num_key_value_heads": 2, "use_sliding_window": True,
        "sliding_window": 40, "max_window_layers": 2,
    },
    # a latent cache, and experts
    "latent": SMALL | {
        "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "num_key_value_heads": 6, "kv_lora_rank": 20,
        "q_lora_rank": None, "qk_nope_head_dim": 14, "qk_rope_head_dim": 6, "v_head_dim": 10, "first_k_dense_replace": 1,
        "moe_intermediate_size": 20, "n_routed_experts": 8, "num_experts_per_tok": 3, "n_shared_experts": 2,
    },
}  # fmt: skip


@pytest.fixture(scope="module", params=["bundled", "stories260K", *RANDOM])
def plain(request, bundled_model, shared_data, tmp_path_factory):
    """How a request runs alone: one chunk, one thread, no cache.

    Models run in bfloat16 where the kernels keep their bits in any batch. The reference does not promise that, and rounding K and V to
    bfloat16 would make a token of its last bits: it runs in float32.
    """
    dtype = "auto" if INVARIANT else "float32"
    if request.param in RANDOM:
        folder = tmp_path_factory.mktemp(request.param)
        (folder / "config.json").write_text(json.dumps(RANDOM[request.param]))
        return Setup(model=folder, dtype=dtype, load_format="dummy")
    return Setup(model=bundled_model if request.param == "bundled" else shared_data("stories260K/hf"), dtype=dtype)


@pytest.fixture(scope="module")
def alone(plain):
    """Every request on its own, one after another."""
    with running(plain) as run:
        return [run.generate([prompt], params)[0] for prompt, params in zip(PROMPTS, PARAMS, strict=True)]


@pytest.fixture
def eager(monkeypatch):
    """Admission that keeps no room for growth, so that preemption is common."""
    monkeypatch.setattr(scheduler, "GROWTH_START", 0.0)
    monkeypatch.setattr(scheduler, "GROWTH_STEP", 0.0)


def check(found, expected):
    """Equal tokens; equal bits of log-probabilities where the kernels in use promise them."""
    assert [result.error for result in found] == [None] * len(expected)
    assert [result.token_ids for result in found] == [result.token_ids for result in expected]
    if INVARIANT:
        assert [result.logprobs for result in found] == [result.logprobs for result in expected]


def check_twins(run, alone):
    """Every request and its twin at once, in memory that holds few of them."""
    check(run.generate([p for p in PROMPTS for _ in "ab"], [p for p in PARAMS for _ in "ab"]), [r for r in alone for _ in "ab"])


@pytest.mark.parametrize("model", ["bundled", "stories260K"])
def test_greedy_tokens_are_those_of_transformers(model, bundled_model, shared_data):
    path = bundled_model if model == "bundled" else shared_data("stories260K/hf")
    transformers = pytest.importorskip("transformers")
    reference = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    for prompt, result in zip(PROMPTS, generate(Setup(model=path), PROMPTS, GREEDY), strict=True):
        with torch.no_grad():
            logits = reference(torch.tensor([[*prompt, *result.token_ids]])).logits[0]
        # by induction over the positions: each token is the most likely one after those before it
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == list(result.token_ids)


@pytest.mark.combination("continuous batching", "seeded sampling", "token-equal")
@pytest.mark.combination("continuous batching", "penalties and biases", "token-equal")
def test_together_in_any_order(plain, alone):
    check(generate(plain, PROMPTS, PARAMS), alone)
    check(generate(replace(plain, max_num_seqs=3), PROMPTS[::-1], PARAMS[::-1]), alone[::-1])


@pytest.mark.combination("chunked prefill", "continuous batching", "token-equal")
@pytest.mark.parametrize("budget", [8, 50])
def test_chunked_prefill(plain, alone, budget):
    check(generate(replace(plain, budget=budget), PROMPTS, PARAMS), alone)


@pytest.mark.combination("prefix cache", "chunked prefill", "token-equal")
@pytest.mark.parametrize("budget", [2048, 50])
def test_prefix_cache_hits(plain, alone, budget):
    with running(replace(plain, prefix_caching=True, budget=budget)) as run:
        check(run.generate(PROMPTS, PARAMS), alone)
        cold = run.metrics.prefix_cache_hits
        check(run.generate(PROMPTS, PARAMS), alone)
        assert run.metrics.prefix_cache_hits - cold >= 32 + 32 + 64 + 128


@pytest.mark.combination("preemption", "prefix cache", "token-equal")
@pytest.mark.combination("preemption", "chunked prefill", "token-equal")
@pytest.mark.parametrize(("caching", "budget"), [(False, 2048), (True, 40)])
def test_preempted(plain, alone, eager, caching, budget):
    with running(replace(plain, kv_blocks=8, prefix_caching=caching, budget=budget)) as run:
        check_twins(run, alone)
        assert run.metrics.num_preemptions > 0


@pytest.mark.combination("threads", "continuous batching", "token-equal")
def test_two_threads(plain, alone):
    check(generate(replace(plain, num_threads=2), PROMPTS, PARAMS), alone)


@pytest.mark.combination("asynchronous scheduling", "preemption", "token-equal")
@pytest.mark.combination("asynchronous scheduling", "chunked prefill", "token-equal")
def test_steps_in_flight(plain, alone, eager):
    lanes = (LaneConfig(depth=2),)
    check(generate(replace(plain, lanes=lanes), PROMPTS, PARAMS), alone)
    with running(replace(plain, lanes=lanes, kv_blocks=8, budget=40, prefix_caching=True)) as run:
        check_twins(run, alone)
        assert run.metrics.num_preemptions > 0 and run.metrics.prefix_cache_hits > 0


@pytest.mark.combination("two lanes (semi-PD)", "chunked prefill", "token-equal")
@pytest.mark.combination("two lanes (semi-PD)", "prefix cache", "token-equal")
@pytest.mark.combination("two lanes (semi-PD)", "preemption", "token-equal")
@pytest.mark.combination("two lanes (semi-PD)", "asynchronous scheduling", "token-equal")
def test_two_lanes_in_threads(plain, alone, eager):
    check(generate(replace(plain, num_threads=2, lanes=two_lanes("uniproc")), PROMPTS, PARAMS), alone)
    crowded = replace(plain, num_threads=2, lanes=two_lanes("uniproc", depth=2), kv_blocks=8, budget=40, prefix_caching=True)
    with running(crowded) as run:
        check_twins(run, alone)
        assert run.metrics.num_preemptions > 0 and run.metrics.prefix_cache_hits > 0


@pytest.mark.combination("worker processes", "two lanes (semi-PD)", "token-equal")
@pytest.mark.combination("lane death", "two lanes (semi-PD)", "token-equal")
@pytest.mark.combination("lane death", "seeded sampling", "token-equal")
@pytest.mark.combination("lane death", "prefix cache", "token-equal")
def test_two_lanes_in_processes_both_killed_once(plain, alone):
    with running(replace(plain, num_threads=2, lanes=two_lanes("multiproc"), budget=40, prefix_caching=True)) as run:
        before = [lane.executor.pids for lane in run.engine.lanes]
        for (pid,), moment in zip(before, (10, 90), strict=True):
            run.on_step.append(kill_at(pid, moment))
        check(run.generate(PROMPTS, PARAMS), alone)
        after = [lane.executor.pids for lane in run.engine.lanes]
        assert not set(before) & set(after), "a lane was not started again"
        check(run.generate(PROMPTS, PARAMS), alone)


def kill_at(pid, num_output_tokens):
    """A hook that kills process `pid` once so many tokens have been generated."""

    def hook(engine):
        if engine.metrics()["model"].generation_tokens >= num_output_tokens and hook.armed:
            hook.armed = False
            os.kill(pid, signal.SIGKILL)

    hook.armed = True
    return hook


@pytest.mark.combination("several models", "continuous batching", "token-equal")
@pytest.mark.combination("several models", "prefix cache", "token-equal")
@pytest.mark.combination("several models", "two lanes (semi-PD)", "token-equal")
def test_two_models_in_one_memory(plain, alone, bundled_model):
    """Another model with other block sizes takes and gives slabs of the same arena while this one runs."""
    other = Setup(model=bundled_model, dtype="auto" if INVARIANT else "float32")
    expected = generate(other, PROMPTS, PARAMS)
    lanes = two_lanes("uniproc")
    with running(replace(plain, num_threads=2, lanes=lanes, budget=50, prefix_caching=True, kv_blocks=2048)) as run:
        spec = read_spec(bundled_model)
        config = ModelConfig(model=str(bundled_model), name="other", dtype=other.dtype)
        run.engine.add_model(config, spec, spec.kv_groups(other.dtype, 32))
        for _ in range(2):
            requests = [*run.add(PROMPTS, PARAMS), *run.add(PROMPTS, PARAMS, "other", frozenset(spec.eos_token_ids))]
            check(run.finish(requests), alone + expected)
        assert all(metrics.prefix_cache_hits > 0 for metrics in run.engine.metrics().values())


@pytest.mark.combination("tensor parallel", "chunked prefill", "token-equal")
@pytest.mark.combination("tensor parallel", "prefix cache", "token-equal")
@pytest.mark.combination("tensor parallel", "seeded sampling", "token-equal")
@pytest.mark.parametrize("model", ["bundled", "stories260K"])
def test_two_ranks(model, bundled_model, shared_data):
    """In float32: ranks sum in another order, which moves log-probabilities by rounding and, on these models, no token."""
    path = bundled_model if model == "bundled" else shared_data("stories260K/hf")
    one = generate(Setup(model=path), PROMPTS, PARAMS)
    lanes = (LaneConfig(executor="multiproc"),)
    with running(Setup(model=path, tensor_parallel_size=2, num_threads=2, lanes=lanes, budget=50, prefix_caching=True)) as run:
        for _ in range(2):
            two = run.generate(PROMPTS, PARAMS)
            assert [result.token_ids for result in two] == [result.token_ids for result in one]
            for a, b in zip(one, two, strict=True):
                assert torch.allclose(torch.tensor(a.logprobs), torch.tensor(b.logprobs), atol=2e-3)


@pytest.mark.combination("continuous batching", "KV reclaim with moves", "token-equal")
@pytest.mark.combination("prefix caching", "KV reclaim with moves", "token-equal")
def test_blocks_moved_under_running_requests(plain, alone):
    """After every step all memory is asked back, so that live blocks move into fuller slabs again and again."""
    with running(replace(plain, kv_blocks=96, slab_factor=8, budget=40, prefix_caching=True)) as run:
        num_moves = []

        def reclaim(engine):
            engine.reclaim(NAME, engine.arena.num_bytes)
            num_moves.append(len(engine.models[NAME].scheduler._moves.ops))

        run.on_step.append(reclaim)
        check_twins(run, alone)
        assert sum(num_moves) > 3
