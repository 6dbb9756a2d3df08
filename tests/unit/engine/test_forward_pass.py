"""Short steps are recorded and replayed: the same bits, the model's Python called once; and what keeps steps from being recorded."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from apportion import assets
from apportion.core.config import ModelConfig
from apportion.core.errors import Unsupported
from apportion.engine.forward_pass import MAX_RECORDED_TOKENS, ForwardPass
from apportion.engine.input_batch import StepInputs
from apportion.kernels.dispatch import select_ops
from apportion.layers.attention import bind_paged_attention
from apportion.models.checkpoint import read_spec
from apportion.models.loader import load_model
from apportion.platforms.platform import select_platform

MAX_LEN, BLOCK_SIZE, MAX_REQUESTS = 256, 32, 4
FOLDER = Path(assets.__path__[0]) / "dense"


def start(kernels="cpu"):
    """A model, its forward passes over an arena of zeros, and the list of the sizes of the steps that reached the model's Python."""
    try:
        ops = select_ops(select_platform("cpu"), prefer=kernels)
    except Unsupported as error:
        pytest.skip(str(error))
    spec = read_spec(FOLDER)
    model = load_model(ModelConfig(model=str(FOLDER), dtype="float32"), spec, ops).model
    (group,) = spec.kv_groups("float32", BLOCK_SIZE, 1)
    blocks = MAX_LEN // BLOCK_SIZE
    arena = torch.zeros(MAX_REQUESTS * blocks * group.block_bytes, dtype=torch.uint8)
    entries = torch.arange(0, len(arena), group.block_bytes) // 256
    seen, forward = [], model.forward
    model.forward = lambda token_ids_T, context: seen.append(len(token_ids_T)) or forward(token_ids_T, context)
    passes = ForwardPass(model, tuple(bind_paged_attention(model, model.site, (group,), arena, MAX_LEN)), ops)
    return SimpleNamespace(run=passes, seen=seen, tables=entries.int().view(MAX_REQUESTS, blocks), model=model)


def inputs(house, tokens, computed, requests=None):
    """Rows of tokens, one per request, after `computed` ones each."""
    counts = [len(row) for row in tokens]
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    lens = (np.array(counts) + computed).astype(np.int32)
    positions = torch.cat([torch.arange(c, c + n) for c, n in zip(computed, counts, strict=True)]).int()
    rows = np.arange(len(tokens)) if requests is None else np.array(requests)
    flat = torch.tensor([token for row in tokens for token in row], dtype=torch.int32)
    empty = np.zeros(0, np.int32)
    tables = (house.tables[torch.from_numpy(rows)].contiguous(),)
    return StepInputs([], rows, lens, empty, empty, starts, flat, positions, tables, rows, empty)


STEPS = [  # (tokens of each request, computed before, rows of the requests)
    ([[5, 6, 7], [8, 9, 10, 11]], [0, 0], [0, 1]),
    ([[12], [13]], [3, 4], [0, 1]),
    ([[14], [15]], [4, 5], [0, 1]),
    ([[16], [17]], [5, 6], [1, 0]),  # others' places
    ([[18, 19]], [6], [2]),  # as many tokens, of one request
    ([[20] * 100], [0], [3]),  # buffers grow: what was recorded is stale
    ([[21], [22]], [7, 6], [1, 0]),
    ([[23], [24]], [8, 7], [1, 0]),
]


def test_a_replayed_step_has_the_bits_of_any_other():
    replaying, plain = start(), start()
    plain.run.obstacle = "told so"
    for tokens, computed, requests in STEPS:
        found, expected = (house.run(inputs(house, tokens, computed, requests)).clone() for house in (replaying, plain))
        assert torch.equal(found, expected)
    assert not replaying.run.obstacle and len(plain.seen) == len(STEPS)
    assert replaying.seen == [7, 2, 100, 2]  # buffers grew under 7 tokens and under 100


def test_steps_that_torch_takes_part_in_are_not_recorded():
    house, plain = start(), start()
    forward = house.model.forward
    house.model.forward = lambda token_ids_T, context: forward(token_ids_T, context).add(1.0)
    for step in range(4):
        added, expected = (h.run(inputs(h, [[step + 3]], [step])) for h in (house, plain))
        assert torch.equal(added, expected + 1.0)
    assert "aten.add" in house.run.obstacle and house.seen == [1] * 4 and plain.seen == [1, 1]  # buffers grew under the first


def test_long_steps_and_kernels_without_a_recorder():
    house = start()
    for _ in range(3):
        house.run(inputs(house, [[3] * (MAX_RECORDED_TOKENS + 1)], [0]))
    assert len(house.seen) == 3 and not house.run.obstacle
    reference = start("reference")
    reference.run(inputs(reference, [[3]], [0]))
    assert reference.run.obstacle == "reference kernels cannot be recorded"


def test_recording_does_not_load_torchs_compiler():
    """Which takes longer than all else that the first token of a small model waits for."""
    script = """
import sys
from apportion import LLM, SamplingParams
with LLM() as llm:
    llm.generate("Once", SamplingParams(max_tokens=3), use_tqdm=False)
sys.exit("torch._dynamo was loaded" if "torch._dynamo" in sys.modules else 0)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
