"""A second process maps the packed weights: equal logits, one copy in memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from apportion.core.config import ModelConfig
from apportion.core.errors import InternalError, Unsupported
from apportion.kernels.dispatch import select_ops
from apportion.kernels.reference.ops import ReferenceOps
from apportion.models.checkpoint import read_spec
from apportion.models.loader import attach_model, load_model
from apportion.platforms.platform import select_platform

TOKENS = [3, 1, 4, 1, 5, 92, 6]


@pytest.mark.parametrize("kernels", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_attached_model_is_bitwise_equal(tiny, logits_of, kernels, dtype):
    """Two sets of operators, as two processes have them, over the same bytes."""
    try:
        ops, others = (select_ops(select_platform("cpu"), prefer=kernels) for _ in range(2))
    except Unsupported as error:
        pytest.skip(str(error))
    folder = tiny.write()
    loaded = load_model(ModelConfig(model=str(folder), dtype=dtype), read_spec(folder), ops)
    manifest = json.loads(json.dumps(loaded.manifest))
    attached = attach_model(manifest, loaded.arena, others)
    assert torch.equal(logits_of(attached.model, TOKENS), logits_of(loaded.model, TOKENS))
    assert attached.manifest == loaded.manifest


@pytest.mark.parametrize(
    ("change", "said"),
    [({"kernels": "other"}, "kernels differs"), ({"rank": 1}, "rank differs"), ({"format": 0}, "format differs")],
)  # fmt: skip
def test_other_layouts_are_refused(tiny, load, change, said):
    loaded = load(tiny.write())
    with pytest.raises(InternalError, match=said):
        attach_model(loaded.manifest | change, loaded.arena, ReferenceOps())


CHILD = """
import json, runpy, sys, torch
from apportion.kernels.reference.ops import ReferenceOps
from apportion.models.loader import attach_model
from apportion.platforms.arena import Arena

shared = runpy.run_path(sys.argv[1])
manifest = json.load(sys.stdin)
arena = Arena.attach(int(sys.argv[2]), manifest["nbytes"])
torch.set_num_threads(1)
attached = attach_model(manifest, arena, ReferenceOps())
logits = shared["dense_logits"](attached.model, json.loads(sys.argv[3]))
print(json.dumps({"logits": logits.numpy().tobytes().hex(), "pss": shared["mapped_share"](arena.nbytes)}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_second_process_shares_the_bytes(tiny, logits_of, shared_pages):
    """The child measures while the parent holds every page: what both have touched counts half in each."""
    tiny.config |= {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 4, "vocab_size": 4096}
    (tiny.folder / "config.json").write_text(json.dumps(tiny.config))
    torch.set_num_threads(1)
    config = ModelConfig(model=str(tiny.folder), load_format="dummy")
    loaded = load_model(config, read_spec(tiny.folder), ReferenceOps())
    nbytes = loaded.manifest["nbytes"]
    assert nbytes > 40e6
    own, alone = logits_of(loaded.model, TOKENS), shared_pages(nbytes)
    conftest = str(Path(__file__).with_name("conftest.py"))
    fd = loaded.arena.fd
    command = [sys.executable, "-c", CHILD, conftest, str(fd), json.dumps(TOKENS)]
    run = subprocess.run(command, input=json.dumps(loaded.manifest), pass_fds=[fd], capture_output=True, text=True, check=True)
    theirs = json.loads(run.stdout)
    assert theirs["logits"] == own.numpy().tobytes().hex()
    assert 0.95 * nbytes < alone < 1.05 * nbytes
    assert 0.8 * nbytes < 2 * theirs["pss"] < 1.2 * nbytes  # only the rows of its tokens are touched in the embeddings
