"""Decode steps from a graph, with a graph that is replayed by running it again: what it reads must be where it was captured."""

import json
import shutil
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from apportion import LLM, SamplingParams
from apportion.core.config import LaneConfig
from apportion.engine.decode_graphs import DecodeGraphs
from apportion.engine.input_batch import StepInputs
from apportion.platforms.cpu import CpuPlatform
from apportion.platforms.platform import Captured
from tests.unit.engine.test_steps_in_flight import Slow

interpreted = pytest.mark.skipif(not find_spec("triton") or torch.cuda.is_available(), reason="needs Triton and its interpreter")
PROMPTS = [[5, 9, 12, 7, 3], [40, 41], [17] * 9]


class Recorder:
    """platforms/platform.Platform.capture: the outputs of a replay land where the first run left them, as a graph's do."""

    def __init__(self):
        self.captured, self.replays = 0, 0

    def __call__(self, run):
        outputs = run()
        self.captured += 1

        def replay():
            self.replays += 1
            for place, value in zip(outputs, run(), strict=True):
                place.copy_(value)

        return Captured(replay, outputs)


CONFIG = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 200,
    "max_position_embeddings": 128,
    "sliding_window": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "torch_dtype": "float32",
    "tie_word_embeddings": True,
    "eos_token_id": 0,
}


@pytest.fixture
def folder(tmp_path, bundled_model):
    """A model of two layers with a sliding window, its weights random."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bundled_model / name, tmp_path)
    return tmp_path


def tokens_of(folder, kernels, **engine):
    params = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)
    with LLM(folder, kernels=kernels, device="cpu", load_format="dummy", kv_cache_memory=1 << 22, max_model_len=64, **engine) as llm:
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], params)
    return [list(output.outputs[0].token_ids) for output in outputs]


@interpreted
def test_the_engine_over_triton_and_graphs_gives_the_reference_tokens(folder, monkeypatch):
    """Three requests padded to four, whose contexts outgrow the window and a block table's first width."""
    expected = tokens_of(folder, "reference")
    recorder = Recorder()
    monkeypatch.setattr(CpuPlatform, "capture", recorder)
    assert tokens_of(folder, "triton") == expected
    assert recorder.captured == 1 and recorder.replays == 4
    slow = Slow()
    monkeypatch.setattr(CpuPlatform, "fetch", lambda self, tensor: slow.fetch(self, tensor))
    assert tokens_of(folder, "triton", lanes=(LaneConfig(depth=2),)) == expected, "each step fed by the one in flight before it"


@interpreted
def test_eight_bits_in_cache_and_weights_over_triton(folder):
    """Rounded by norms and gates, multiplied as bytes, cached as bytes: the tokens are the reference's."""
    options = {"kv_cache_dtype": "fp8", "quantization": "fp8"}
    assert tokens_of(folder, "triton", **options) == tokens_of(folder, "reference", **options)


def test_a_graph_is_made_again_when_metadata_moves():
    """Sizes in turn: every replay reads the metadata of its own step."""
    seen = []
    backend = SimpleNamespace(generation=0)

    def plan(metadata):
        metadata.handle = metadata.seq_lens.clone()
        backend.last = metadata.handle
        return metadata

    backend.plan = plan
    model = SimpleNamespace(
        site=SimpleNamespace(ops=SimpleNamespace(device=torch.device("cpu")), activations=SimpleNamespace(held=list)),
        forward=lambda tokens, context: (seen.append(len(tokens)), tokens[:, None].float())[1],
        compute_logits=lambda hidden: hidden * 2,
    )
    recorder = Recorder()
    graphs = DecodeGraphs(recorder, model, [backend])

    def step(num_requests, num_tokens=None):
        tokens = torch.arange(num_tokens or num_requests, dtype=torch.int32)
        lens, starts = np.ones(num_requests, np.int32), np.arange(num_requests + 1, dtype=np.int32)
        tables, rows = (torch.zeros(num_requests, 3).int(),), np.arange(num_requests)
        return StepInputs([], rows, lens, lens, lens, starts, tokens, tokens, tables, rows, rows[:0])

    assert graphs.run(step(3, 7)) is None, "prefill has no graph"
    assert graphs.run(step(300)) is None, "nor has a batch beyond the largest size"
    for num_requests in (3, 4, 3):
        hidden, logits = graphs.run(step(num_requests))
        assert hidden[:, 0].tolist() == list(range(num_requests)) and torch.equal(logits, 2 * hidden)
        assert backend.last.tolist() == [1] * num_requests + [0] * (4 - num_requests)
    assert recorder.captured == 1 and recorder.replays == 3 and set(seen) == {4}
    backend.generation = 1
    graphs.run(step(2))
    graphs.run(step(4))
    assert recorder.captured == 3, "graphs over the old memory are gone"
