"""The blocks of one owner: a layer group of one model in one format. Counts references, remembers what full blocks hold.

A block is named by its entry (256-byte units from the arena's start) and is in one of four states:

    free      nothing in it
    used      in a request's table (references > 0)
    draining  in no table, but a step in flight may still touch it: kept until that step has ended
    cached    in no table and no step, its content known by a key: a later request may take it up, or it is evicted, oldest first

It must not know requests, tokens or steps.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container, Iterable

from apportion.core.errors import InternalError, OutOfMemory
from apportion.core.kv_spec import UNIT_BYTES
from apportion.kvcache.arena import Arena, Quota


class BlockPool:
    """Allocates blocks of `block_bytes` from slabs of `arena`, always from the fullest slab that has room."""

    def __init__(self, arena: Arena, name: str, block_bytes: int, quota: Quota) -> None:
        if block_bytes > arena.slab_bytes:
            raise OutOfMemory(f"a KV block of {name} takes {block_bytes} bytes and a slab of the arena holds {arena.slab_bytes}")
        self.arena = arena
        self.name = name
        self.quota = quota
        self.block_bytes = block_bytes
        self.block_units = block_bytes // UNIT_BYTES
        self.blocks_per_slab = arena.slab_bytes // block_bytes
        self.num_free = 0
        self._free: dict[int, list[int]] = {}  # slab -> its free entries
        self._partial: set[int] = set()  # slabs with a free entry
        self._idle: dict[int, None] = {}  # slabs without a live block, oldest first
        self._num_live: dict[int, int] = {}  # slab -> used and draining blocks
        self._refs: dict[int, int] = {}
        self._drains: dict[int, int] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._key_of: dict[int, bytes] = {}
        self._entry_of: dict[bytes, int] = {}
        arena.add_owner(self)

    @property
    def slabs(self) -> Iterable[int]:
        return self._free

    @property
    def num_idle_slabs(self) -> int:
        return len(self._idle)

    @property
    def num_used(self) -> int:
        return len(self._refs)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_draining(self) -> int:
        return sum(1 for entry in self._drains if entry not in self._refs)

    @property
    def num_obtainable(self) -> int:
        """Blocks that `allocate` could return now, this owner alone asking."""
        return self.num_free + len(self._cached) + self.blocks_per_slab * self.arena.num_obtainable_slabs(self)

    def allocate(self, num_blocks: int) -> list[int] | None:
        """Entries of `num_blocks` blocks, each with one reference; None (and nothing changed but the cache) when there are not so many."""
        entries: list[int] = []
        while len(entries) < num_blocks:
            slab = self._slab_with_room()
            if slab is None:
                self._put_back(entries)
                return None
            free = self._free[slab]
            for _ in range(min(num_blocks - len(entries), len(free))):
                entry = self._take_from(slab)
                self._refs[entry] = 1
                entries.append(entry)
        return entries

    def acquire(self, entry: int) -> None:
        """One more reference to a block that holds something."""
        if entry in self._refs:
            self._refs[entry] += 1
            return
        if entry in self._cached:
            del self._cached[entry]
            self._enter_live(entry)
        elif entry not in self._drains:
            raise InternalError(f"{self.name}: block {entry} is free and cannot be shared")
        self._refs[entry] = 1

    def release(self, entries: Iterable[int]) -> None:
        """Drop one reference of each. Give a table's last block first: cached blocks are evicted in this order."""
        for entry in entries:
            if self._unref(entry) and entry not in self._drains:
                self._leave_live(entry)

    def drain(self, entries: Iterable[int]) -> None:
        """Drop one reference of each, but keep the blocks from reuse until `undrain`: a step in flight may touch them."""
        for entry in entries:
            self._unref(entry)
            self._drains[entry] = self._drains.get(entry, 0) + 1

    def undrain(self, entries: Iterable[int]) -> None:
        """The step for which these were drained has ended."""
        for entry in entries:
            count = self._drains[entry] - 1
            if count:
                self._drains[entry] = count
                continue
            del self._drains[entry]
            if entry not in self._refs:
                self._leave_live(entry)

    def publish(self, entry: int, key: bytes) -> None:
        """The block holds for good what `key` names. Of two blocks with the same content the first stays known."""
        if key not in self._entry_of and entry not in self._key_of:
            self._key_of[entry] = key
            self._entry_of[key] = entry

    def find(self, key: bytes) -> int | None:
        return self._entry_of.get(key)

    def slabs_by_load(self) -> list[int]:
        """Slabs, the one with the fewest live blocks first."""
        return sorted(self._free, key=lambda slab: (self._num_live[slab], slab))

    def evacuate(self, slab: int, pinned: Container[int]) -> list[tuple[int, int]] | None:
        """Move every live block of `slab` into room that other slabs of this owner have, and evict the others.

        Returns (source, destination) pairs for the caller to copy and to put into the tables; destinations take over the references,
        sources drain. None, and nothing moved, when a live block is pinned or draining, or the other slabs have too little room.
        """
        live = [entry for entry in self._entries_of(slab) if entry in self._refs or entry in self._drains]
        if any(entry in pinned or entry in self._drains for entry in live):
            return None
        elsewhere = [entry for entry in self._cached if entry // self.arena.slab_units != slab]
        if len(live) > self.num_free - len(self._free[slab]) + len(elsewhere):
            return None
        pairs = []
        for source in live:
            room = self._partial - {slab}
            if not room:
                entry = elsewhere.pop(0)
                self._forget(entry)
                self._add_free(entry)
                room = {entry // self.arena.slab_units}
            target = self._take_from(min(room, key=lambda s: (len(self._free[s]), s)))
            self._refs[target] = self._refs.pop(source)
            self._drains[source] = 1
            if source in self._key_of:
                del self._entry_of[self._key_of.pop(source)]
            pairs.append((source, target))
        for entry in self._entries_of(slab):
            if entry in self._cached:
                self._evict(entry)
        return pairs

    def references(self) -> dict[int, int]:
        """How many tables hold each used block."""
        return dict(self._refs)

    def drop_cached(self) -> None:
        """Evict every cached block."""
        while self._cached:
            self._evict(next(iter(self._cached)))

    def give_slab(self) -> bool:
        if not self._idle:
            return False
        slab = next(iter(self._idle))
        for entry in self._entries_of(slab):
            if entry in self._cached:
                self._evict(entry)
        return True

    def check_integrity(self) -> None:
        """Raises InternalError unless free + used + cached + draining = total, per slab and in all, and no block is two of them."""
        free = [entry for entries in self._free.values() for entry in entries]
        live = self._refs.keys() | self._drains.keys()
        total = [entry for slab in self._free for entry in self._entries_of(slab)]
        if sorted([*free, *live, *self._cached]) != sorted(total):
            raise InternalError(
                f"{self.name}: free {len(free)} + used {self.num_used} + cached {self.num_cached} + draining {self.num_draining}"
                f" blocks are not a partition of {len(total)}"
            )
        for slab, entries in self._free.items():
            num_live = sum(1 for entry in self._entries_of(slab) if entry in live)
            if num_live != self._num_live[slab] or (num_live == 0) != (slab in self._idle) or bool(entries) != (slab in self._partial):
                raise InternalError(f"{self.name}: slab {slab} counts {self._num_live[slab]} live blocks and has {num_live}")
        if self.num_free != len(free) or any(self._entry_of[key] != entry for entry, key in self._key_of.items()):
            raise InternalError(f"{self.name}: the free count or the keys do not match the blocks")
        if len(self._key_of) != len(self._entry_of) or any(entry not in self._key_of for entry in self._cached):
            raise InternalError(f"{self.name}: a cached block has no key")
        if min([*self._refs.values(), *self._drains.values()], default=1) < 1:
            raise InternalError(f"{self.name}: a reference count is below one")

    def _entries_of(self, slab: int) -> range:
        start = slab * self.arena.slab_units
        return range(start, start + self.blocks_per_slab * self.block_units, self.block_units)

    def _slab_with_room(self) -> int | None:
        if self._partial:
            return min(self._partial, key=lambda slab: (len(self._free[slab]), slab))
        slab = self.arena.take_slab(self)
        if slab is not None:
            self._free[slab] = list(reversed(self._entries_of(slab)))
            self._num_live[slab] = 0
            self._partial.add(slab)
            self.num_free += self.blocks_per_slab
            return slab
        if not self._cached:
            return None
        entry = next(iter(self._cached))
        self._forget(entry)
        self._add_free(entry)
        return entry // self.arena.slab_units

    def _take_from(self, slab: int) -> int:
        entry = self._free[slab].pop()
        if not self._free[slab]:
            self._partial.remove(slab)
        self.num_free -= 1
        self._idle.pop(slab, None)
        self._num_live[slab] += 1
        return entry

    def _put_back(self, entries: list[int]) -> None:
        for entry in reversed(entries):
            del self._refs[entry]
            self._leave_live(entry)

    def _unref(self, entry: int) -> bool:
        count = self._refs[entry] - 1
        if count:
            self._refs[entry] = count
            return False
        del self._refs[entry]
        return True

    def _enter_live(self, entry: int) -> None:
        slab = entry // self.arena.slab_units
        if self._num_live[slab] == 0:
            del self._idle[slab]
        self._num_live[slab] += 1

    def _leave_live(self, entry: int) -> None:
        slab = entry // self.arena.slab_units
        self.arena.num_releases += 1
        self._num_live[slab] -= 1
        if self._num_live[slab] == 0:
            self._idle[slab] = None
        if entry in self._key_of:
            self._cached[entry] = None
        else:
            self._add_free(entry)
            self._return_if_empty(slab)

    def _evict(self, entry: int) -> None:
        self._forget(entry)
        self._add_free(entry)
        self._return_if_empty(entry // self.arena.slab_units)

    def _forget(self, entry: int) -> None:
        del self._cached[entry]
        del self._entry_of[self._key_of.pop(entry)]

    def _add_free(self, entry: int) -> None:
        slab = entry // self.arena.slab_units
        self._free[slab].append(entry)
        self._partial.add(slab)
        self.num_free += 1

    def _return_if_empty(self, slab: int) -> None:
        if len(self._free[slab]) == self.blocks_per_slab:
            del self._free[slab], self._num_live[slab], self._idle[slab]
            self._partial.remove(slab)
            self.num_free -= self.blocks_per_slab
            self.arena.return_slab(self, slab)
