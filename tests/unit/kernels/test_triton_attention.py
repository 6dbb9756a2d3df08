"""What attention on a GPU refuses, in one sentence, and prompts that the library attends for."""

from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch

from apportion.core.errors import Unsupported
from apportion.core.kv_spec import KVFormat, KVGroupSpec, kv_format
from apportion.kernels.ops import AttentionSpec
from apportion.kernels.reference.ops import ReferenceOps
from tests.conformance.test_attention import compare_paged

pytestmark = pytest.mark.skipif(not find_spec("triton") or torch.cuda.is_available(), reason="needs Triton and its interpreter")
GROUP = KVGroupSpec((2, 5), 2, 16, 16, kv_format("bfloat16"), 32)
SPEC = AttentionSpec(4, GROUP, 0.25, 16)


@pytest.fixture
def ops():
    from apportion.kernels.triton.ops import TritonOps

    return TritonOps(True, torch.device("cpu"), 1 << 20)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (
            replace(SPEC, kv=replace(GROUP, format=KVFormat("kv2", 1))),
            "KV in kv2 has no Triton kernel; kv_cache_dtype can be float32,",
        ),
        (replace(SPEC, kv=replace(GROUP, head_dim=512)), "heads of at most 256 channels .* got 512 and 16; take device=cpu"),
        (
            replace(SPEC, kv=replace(GROUP, head_dim=18, format=kv_format("fp8"))),
            "fp8_e4m3 .* multiple of 4 .* 18 and 16; take kv_cache_dtype=float32",
        ),
        (replace(SPEC, num_heads=5), "5 query heads cannot share 2 kv heads evenly"),
        (replace(SPEC, rotary_dim=18), "rotary_dim must be even and at most head_dim .16., got 18"),
    ],
)
def test_what_is_refused(ops, spec, said):
    with pytest.raises(Unsupported, match=said) as error:
        ops.paged_attention(spec, torch.zeros(1 << 16, dtype=torch.uint8))
    assert "\n" not in str(error.value)


def test_latents_have_no_unified_maximum(ops):
    latent = KVGroupSpec((0,), 1, 40, 32, kv_format("bfloat16"), 32, latent=True)
    attention = ops.latent_attention(AttentionSpec(4, latent, 0.2, 8), torch.zeros(1 << 16, dtype=torch.uint8))
    with pytest.raises(Unsupported, match="leave out softmax_table"):
        attention.unify(0, torch.zeros(4))


@pytest.mark.parametrize(
    ("change", "obstacle"),
    [
        ({}, ""),
        ({"format": kv_format("fp8")}, "over a cache in fp8_e4m3 its numbers would be others; it takes bfloat16 and float16"),
        ({"v_head_dim": 8}, "it takes keys and values of one width, a multiple of 8, not 16 and 8"),
    ],
)
def test_what_the_library_takes(change, obstacle):
    from apportion.kernels.triton.attention import library_obstacle

    assert library_obstacle(replace(SPEC, kv=replace(GROUP, **change))) == obstacle


@pytest.mark.parametrize("options", [{}, {"qk_norm_eps": 1e-6}], ids=["rotated", "normed"])
def test_whole_prompts_by_the_library(monkeypatch, ops, options):
    """Beside a decode step, a chunk with context and a prompt beyond the window, each attended for as the reference does."""
    from apportion.kernels.triton import attention

    spec, calls = replace(SPEC, kv=replace(GROUP, sliding_window=40), **options), []
    by_library = attention.PagedAttention._by_library
    monkeypatch.setattr(
        attention.PagedAttention, "_by_library", lambda self, qkv, out: calls.append(len(qkv)) or by_library(self, qkv, out)
    )
    tile = ops.tiles.decode[0], ops.tiles.prefill[0]
    norms = (torch.rand(16), torch.rand(16)) if options else (None, None)

    class Implementation:
        @staticmethod
        def paged_attention(spec, arena):
            return attention.PagedAttention(spec, arena, *tile, library=True)

    class Capability:
        rounds_activations = ("bfloat16",)

    compare_paged(lambda op: Implementation, ReferenceOps(), Capability, spec, ([1, 33, 0, 0], [7, 1, 12, 50]), norms)
    assert calls == [33, 12]
