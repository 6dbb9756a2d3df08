"""The longest prefix that all layer groups hold, against the definition."""

from math import lcm

from hypothesis import given, settings
from hypothesis import strategies as st

from apportion.core.kv_spec import KV_FORMATS, KVGroupSpec
from apportion.core.request import Request
from apportion.core.sampling_params import SamplingParams
from apportion.kvcache.arena import Arena
from apportion.kvcache.kv_cache_manager import KVCacheManager
from apportion.kvcache.prefix_cache import extend_keys, first_live_block, longest_prefix, root_key


def spec(block_size=4, window=None):
    return KVGroupSpec((0,), 1, 8, 8, KV_FORMATS["float32"], block_size, sliding_window=window)


class Published:
    """Stands for a pool of which only the published keys matter."""

    def __init__(self, keys):
        self.keys = keys

    def find(self, key):
        return 0 if key in self.keys else None


def can_resume(spec, held, num_tokens):
    """By definition: the query at position `num_tokens` finds every key it sees."""
    seen = range(num_tokens) if spec.sliding_window is None else range(max(0, num_tokens - spec.sliding_window + 1), num_tokens)
    return all(position // spec.block_size in held for position in seen)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_the_longest_prefix_that_every_group_can_serve(data):
    any_spec = st.builds(spec, st.sampled_from([2, 4, 8]), st.sampled_from([None, 1, 3, 4, 9, 16]))
    specs = data.draw(st.lists(any_spec, min_size=1, max_size=3))
    tokens = list(range(48))
    keys = {s.block_size: [] for s in specs}
    for size, chain in keys.items():
        extend_keys(chain, b"root", tokens, size, len(tokens) // size)
    held = [data.draw(st.sets(st.integers(0, 48 // s.block_size - 1), min_size=48 // s.block_size // 2)) for s in specs]
    pools = [Published({keys[s.block_size][i] for i in h}) for s, h in zip(specs, held, strict=True)]
    limit = data.draw(st.integers(0, 47))
    step = lcm(*(s.block_size for s in specs))
    fits = [n for n in range(0, limit + 1, step) if all(can_resume(s, h, n) for s, h in zip(specs, held, strict=True))]
    assert longest_prefix(specs, pools, keys, limit) == max(fits)


def test_a_block_dies_when_the_last_query_that_sees_it_is_past():
    assert [first_live_block(spec(4, window=4), start) for start in (0, 6, 7, 10, 11)] == [0, 0, 1, 1, 2]
    assert first_live_block(spec(4), 100) == 0


def test_keys_tell_apart_whatever_decides_the_content():
    roots = {root_key(*args) for args in [("m", None, ""), ("n", None, ""), ("m", 0, ""), ("m", None, "t"), ("m", 1, "t")]}
    assert len(roots) == 5
    one, two = [], []
    extend_keys(one, b"r", [1, 2, 3, 4, 5, 6, 7, 8], 4, 2)
    extend_keys(two, b"r", [9, 2, 3, 4, 5, 6, 7, 8], 4, 2)
    assert one[0] != two[0] and one[1] != two[1], "a block's key depends on all before it"
    extend_keys(one, b"r", range(12), 4, 1)
    assert len(one) == 2


def manager(groups, num_slabs=8):
    return KVCacheManager(Arena(num_slabs * 2048, 2048), "m", groups, max_chunk=16)


def request(tokens, **sampling):
    return Request("r", "m", list(tokens), SamplingParams(**sampling))


def computed(kv, tokens):
    """A request whose tokens a finished step has stored."""
    one = request(tokens)
    assert kv.get_computed(one) == 0
    assert kv.allocate(one, 0, len(tokens), None) is not None
    one.num_computed_tokens = len(tokens)
    return one


def test_blocks_are_hit_once_published_and_full():
    kv = manager((spec(),))
    first = computed(kv, range(10))
    again = request(range(10))
    assert kv.get_computed(again) == 0
    kv.free(again, None)
    kv.publish(first)
    assert kv.get_computed(again) == 8
    kv.free(again, None)
    eight = request(range(8))
    assert kv.get_computed(eight) == 4, "the last token is always computed"
    kv.free(eight, None)
    bypass = request(range(10), prompt_logprobs=1)
    assert kv.get_computed(bypass) == 0
    kv.check_integrity()


def test_a_window_group_needs_its_last_window_only():
    kv = manager((spec(), spec(window=5)))
    first = computed(kv, range(24))
    kv.publish(first)
    first.token_ids.append(24)
    kv.allocate(first, 24, 1, None)
    assert kv.num_dead(first) == (0, 5) and kv.tables(first)[1][:5] == [-1] * 5
    later = request(range(24))
    assert kv.get_computed(later) == 20
    assert kv.num_dead(later) == (0, 4)
    kv.pools[1].drop_cached()
    shorter = request(range(24))
    assert kv.get_computed(shorter) == 20, "blocks 3 and 4 are still in the first one's or the later one's tables"
    kv.free(shorter, None)
    kv.free(later, None)
    kv.pools[1].drop_cached()
    assert kv.get_computed(shorter) == 0
    kv.check_integrity()


def test_a_failed_allocation_takes_nothing():
    kv = manager((spec(), spec(8)), num_slabs=3)  # 8 blocks of 4 tokens, 4 blocks of 8 tokens to a slab
    one = request(range(60))
    kv.get_computed(one)
    assert kv.allocate(one, 0, 32, None) is not None
    before = kv.tables(one)
    assert kv.allocate(one, 32, 28, None) is None
    assert kv.tables(one) == before and kv.arena.num_free_slabs == 1
    kv.check_integrity()
    kv.arena.check_integrity()


def test_the_longest_request_is_one_that_fits():
    for groups in ((spec(),), (spec(), spec(8)), (spec(), spec(4, window=9)), (spec(window=6),)):
        kv = manager(groups, num_slabs=5)
        most = kv.max_request_len()
        assert kv.slabs_for(most) <= 5 and (kv.slabs_for(most + 1) > 5 or most >= 2**31 - 1)
        one = request(range(min(most, 300)))
        kv.get_computed(one)
        for start in range(0, len(one.token_ids), 16):
            assert kv.allocate(one, start, min(16, len(one.token_ids) - start), None) is not None
