"""Blocks of several owners on one arena, against a model that is a plain dictionary."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from apportion.core.errors import InternalError
from apportion.kvcache.arena import Arena, Quota
from apportion.kvcache.block_pool import BlockPool

SLAB = 2048


class Pools(RuleBasedStateMachine):
    """held: (pool, entry) -> references. draining: (pool, entry) -> drains. content: what each block was last published as."""

    @initialize(num_slabs=st.integers(1, 6), sizes=st.lists(st.sampled_from([256, 512, 768, 2048]), min_size=1, max_size=3))
    def start(self, num_slabs, sizes):
        self.arena = Arena(num_slabs * SLAB, SLAB)
        self.pools = [BlockPool(self.arena, f"p{i}", size, Quota()) for i, size in enumerate(sizes)]
        self.held, self.draining, self.content = {}, {}, {}
        self.num_keys = 0

    def pick(self, data, among):
        return data.draw(st.sampled_from(sorted(among))) if among else None

    @rule(data=st.data(), count=st.integers(0, 9))
    def allocate(self, data, count):
        index = data.draw(st.sampled_from(range(len(self.pools))))
        obtainable = self.pools[index].num_obtainable
        entries = self.pools[index].allocate(count)
        assert (entries is not None) == (count <= obtainable)
        for entry in entries or []:
            assert (index, entry) not in self.held and (index, entry) not in self.draining
            self.held[index, entry] = 1
            self.content.pop((index, entry), None)

    @rule(data=st.data(), drain=st.booleans())
    def give_up(self, data, drain):
        block = self.pick(data, self.held)
        if block:
            index, entry = block
            (self.pools[index].drain if drain else self.pools[index].release)([entry])
            self.held[block] -= 1
            if drain:
                self.draining[block] = self.draining.get(block, 0) + 1
            self.forget_zeros()

    @rule(data=st.data())
    def undrain(self, data):
        block = self.pick(data, self.draining)
        if block:
            self.pools[block[0]].undrain([block[1]])
            self.draining[block] -= 1
            self.forget_zeros()

    @rule(data=st.data())
    def publish(self, data):
        block = self.pick(data, self.held)
        if block and block not in self.content:
            self.num_keys += 1
            key = b"%d" % self.num_keys
            self.pools[block[0]].publish(block[1], key)
            self.content[block] = key

    @rule(data=st.data())
    def hit(self, data):
        block = self.pick(data, self.content)
        if block:
            index, entry = block
            found = self.pools[index].find(self.content[block])
            assert found in (None, entry)
            if found is None:
                assert block not in self.held and block not in self.draining, "live blocks are not evicted"
                del self.content[block]
            else:
                self.pools[index].acquire(entry)
                self.held[block] = self.held.get(block, 0) + 1

    @rule(data=st.data())
    def evacuate(self, data):
        index = data.draw(st.sampled_from(range(len(self.pools))))
        pool = self.pools[index]
        if pool.num_idle_slabs == 0 and list(pool.slabs):
            slab = pool.slabs_by_load()[0]
            before = self.arena.num_free_slabs
            for source, target in pool.evacuate(slab, set()) or []:
                assert source // self.arena.slab_units == slab != target // self.arena.slab_units
                self.held[index, target] = self.held.pop((index, source))
                self.draining[index, source] = 1
                self.content.pop((index, source), None)
                self.content.pop((index, target), None)
            assert self.arena.num_free_slabs >= before

    @rule(data=st.data())
    def give_slab(self, data):
        pool = data.draw(st.sampled_from(self.pools))
        idle, free = pool.num_idle_slabs, self.arena.num_free_slabs
        assert pool.give_slab() == (idle > 0)
        assert self.arena.num_free_slabs == free + (idle > 0)

    @invariant()
    def adds_up(self):
        if hasattr(self, "pools"):
            self.arena.check_integrity()
            for index, pool in enumerate(self.pools):
                pool.check_integrity()
                assert pool.references() == {entry: n for (i, entry), n in self.held.items() if i == index}

    def forget_zeros(self):
        self.held = {block: n for block, n in self.held.items() if n}
        self.draining = {block: n for block, n in self.draining.items() if n}


Pools.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestPools = Pools.TestCase


def pool_of(num_slabs=4, block=512):
    return BlockPool(Arena(num_slabs * SLAB, SLAB), "m", block, Quota())


def test_the_fullest_slab_is_filled_first():
    pool = pool_of()
    blocks = pool.allocate(12)
    pool.release([blocks[0], *blocks[4:7]])  # slab 0 has one free block, slab 1 has three
    assert pool.allocate(1) == [blocks[0]]
    assert set(pool.allocate(3)) == set(blocks[4:7])


def test_an_empty_slab_goes_back_at_once():
    pool = pool_of()
    blocks = pool.allocate(5)
    pool.release(blocks[4:])
    assert pool.arena.num_free_slabs == 3
    pool.release(blocks[:4])
    assert pool.arena.num_free_slabs == 4


def test_the_least_recently_used_is_evicted_first():
    pool = pool_of(num_slabs=1)
    blocks = pool.allocate(4)
    for index, entry in enumerate(blocks):
        pool.publish(entry, bytes([index]))
    pool.release([blocks[2], blocks[0], blocks[3], blocks[1]])
    pool.acquire(blocks[2])
    pool.release([blocks[2]])
    pool.allocate(2)
    assert [pool.find(bytes([index])) is not None for index in range(4)] == [False, True, True, False]


def test_a_draining_block_may_be_hit_but_not_reused():
    pool = pool_of(num_slabs=1, block=2048)
    (entry,) = pool.allocate(1)
    pool.publish(entry, b"k")
    pool.drain([entry])
    assert (pool.num_draining, pool.num_used, pool.allocate(1)) == (1, 0, None)
    pool.acquire(entry)
    assert (pool.num_draining, pool.num_used) == (0, 1)
    pool.undrain([entry])
    pool.release([entry])
    assert pool.num_cached == 1 and pool.allocate(1) == [entry]


def test_a_free_block_cannot_be_shared():
    pool = pool_of()
    blocks = pool.allocate(2)
    pool.release(blocks[:1])
    with pytest.raises(InternalError, match="is free"):
        pool.acquire(blocks[0])


@pytest.mark.parametrize("damage", [lambda p: p._refs.pop(0), lambda p: p._free[0].append(0), lambda p: p._num_live.update({0: 3})])
def test_integrity_sees_damage(damage):
    pool = pool_of()
    assert pool.allocate(2)[0] == 0
    pool.check_integrity()
    damage(pool)
    with pytest.raises(InternalError):
        pool.check_integrity()
