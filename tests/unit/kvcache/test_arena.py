"""Slabs: what they waste over the shapes of known models, and who holds them."""

from itertools import combinations

import pytest

from apportion.core.errors import InternalError, InvalidParameter, OutOfMemory
from apportion.core.kv_spec import KV_FORMATS, KVGroupSpec
from apportion.kvcache.arena import MAX_WASTE, PAGE_BYTES, Arena, Quota, choose_slab_bytes
from apportion.kvcache.block_pool import BlockPool

GB = 2**30

# name: (layers, kv heads, head_dim), or several such groups where layers differ in window; latent models: (layers, latent width)
MODELS = {
    "TinyLlama-1.1B": [(22, 4, 64)],
    "Llama-2-7B": [(32, 32, 128)],
    "Llama-2-13B": [(40, 40, 128)],
    "Llama-2-70B": [(80, 8, 128)],
    "Llama-3.2-1B": [(16, 8, 64)],
    "Llama-3.2-3B": [(28, 8, 128)],
    "Llama-3.1-8B": [(32, 8, 128)],
    "Llama-3.1-405B": [(126, 8, 128)],
    "Mistral-7B": [(32, 8, 128)],
    "Mistral-Nemo-12B": [(40, 8, 128)],
    "Mixtral-8x7B": [(32, 8, 128)],
    "Mixtral-8x22B": [(56, 8, 128)],
    "Qwen2-0.5B": [(24, 2, 64)],
    "Qwen2-1.5B": [(28, 2, 128)],
    "Qwen2-7B": [(28, 4, 128)],
    "Qwen2.5-14B": [(48, 8, 128)],
    "Qwen2.5-32B": [(64, 8, 128)],
    "Qwen2-57B-A14B": [(28, 4, 128)],
    "Qwen3-0.6B": [(28, 8, 128)],
    "Qwen3-4B": [(36, 8, 128)],
    "Qwen3-30B-A3B": [(48, 4, 128)],
    "Qwen3-235B-A22B": [(94, 4, 128)],
    "DeepSeek-V2-Lite": [(27, 576)],
    "DeepSeek-V2": [(60, 576)],
    "DeepSeek-V3": [(61, 576)],
    "Phi-2": [(32, 32, 80)],
    "Phi-3-mini": [(32, 32, 96)],
    "Gemma-2-2B": [(13, 4, 256), (13, 4, 256)],
    "Gemma-2-9B": [(21, 8, 256), (21, 8, 256)],
    "Gemma-3-4B": [(5, 4, 256), (29, 4, 256)],
    "Gemma-3-27B": [(10, 16, 128), (52, 16, 128)],
    "gpt-oss-20b": [(12, 8, 64), (12, 8, 64)],
    "OPT-125M": [(12, 12, 64)],
    "SmolLM2-135M": [(30, 3, 64)],
    "stories260K": [(5, 4, 8)],
}


def block_bytes(name, dtype="bfloat16", block_size=32):
    sizes = []
    for layers, heads, *head_dim in MODELS[name]:
        # a latent group has one row of `width` channels, values being the first 512 of them
        heads, width, v_width, latent = (heads, head_dim[0], head_dim[0], False) if head_dim else (1, heads, 512, True)
        sizes.append(KVGroupSpec(tuple(range(layers)), heads, width, v_width, KV_FORMATS[dtype], block_size, latent=latent).block_bytes)
    return sizes


def waste(slab, block):
    return slab % block / slab


def test_known_shapes_give_known_bytes():
    assert len(MODELS) >= 30
    assert block_bytes("Llama-3.1-8B") == [32 * 131072]  # 128 KiB a token
    assert block_bytes("Llama-2-7B") == [32 * 524288]
    assert block_bytes("DeepSeek-V3") == [-(-32 * 61 * 576 * 2 // 256) * 256]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("block_size", [32, 128])
def test_a_slab_wastes_little_for_one_model(dtype, block_size):
    for name in MODELS:
        blocks = block_bytes(name, dtype, block_size)
        slab = choose_slab_bytes(blocks, 64 * GB)
        assert slab % PAGE_BYTES == 0
        assert max(waste(slab, b) for b in blocks) <= MAX_WASTE, name


def test_a_slab_wastes_little_for_pairs_and_stays_small():
    for pair in combinations(MODELS, 2):
        blocks = [b for name in pair for b in block_bytes(name)]
        slab = choose_slab_bytes(blocks, 64 * GB)
        assert max(waste(slab, b) for b in blocks) <= MAX_WASTE, pair
        assert slab <= max(17 * max(blocks), 2**21), pair


def test_mixed_dtypes_share_a_slab():
    blocks = [*block_bytes("Llama-2-7B", "float32"), *block_bytes("Qwen2-0.5B", "float16"), *block_bytes("DeepSeek-V2", "float32")]
    assert max(waste(choose_slab_bytes(blocks, 64 * GB), b) for b in blocks) <= MAX_WASTE


def test_too_little_memory_says_how_much_would_do():
    with pytest.raises(OutOfMemory, match="kv_cache_memory of at least 16777216"):
        choose_slab_bytes(block_bytes("Llama-2-7B"), 2**20)
    with pytest.raises(OutOfMemory, match="give at least 8192"):
        Arena(4096, 8192)
    with pytest.raises(InvalidParameter, match="multiple of 256"):
        Arena(4096, 1000)
    with pytest.raises(OutOfMemory, match="8192 bytes and a slab of the arena holds 4096"):
        BlockPool(Arena(8192, 4096), "m", 8192, Quota())


def test_an_owner_takes_idle_slabs_of_the_one_furthest_above_its_quota():
    arena = Arena(8 * 1024, 1024)
    rich, poor, asker = (BlockPool(arena, name, 512, Quota(limit)) for name, limit in (("rich", 2048), ("poor", 4096), ("asker", 4096)))
    rich.quota.limit_bytes = None
    for pool in (poor, rich):
        entries = pool.allocate(8)
        for index, entry in enumerate(entries):
            pool.publish(entry, bytes([index]))
        pool.release(entries)
    rich.quota.limit_bytes = 2048
    assert arena.num_free_slabs == 0
    assert asker.allocate(4) is not None
    assert (len(list(rich.slabs)), len(list(poor.slabs)), len(list(asker.slabs))) == (2, 4, 2)
    arena.check_integrity()


def test_a_quota_holds_for_its_owners_together():
    arena = Arena(8 * 1024, 1024)
    quota = Quota(3 * 1024)
    one, two = BlockPool(arena, "one", 512, quota), BlockPool(arena, "two", 1024, quota)
    first = one.allocate(4)
    assert two.allocate(2) is None and two.num_obtainable == 1
    assert two.allocate(1) is not None and quota.held_bytes == 3072
    one.publish(first[0], b"k")
    one.release(first)
    assert two.allocate(2) is not None, "a sibling's idle slab counts for the quota"
    quota.limit_bytes = 1024
    assert one.allocate(1) is None
    with quota.lifted():
        assert one.allocate(1) is not None
    assert quota.limit_bytes == 1024
    arena.check_integrity()


def test_integrity_sees_a_lost_slab():
    arena = Arena(8 * 1024, 1024)
    pool = BlockPool(arena, "m", 512, Quota())
    pool.allocate(1)
    arena._free.pop()
    with pytest.raises(InternalError, match="not a partition"):
        arena.check_integrity()
    with pytest.raises(InternalError, match="live blocks"):
        arena.remove_owner(pool)
