"""The scheduler's only view of KV memory: one block table per request and layer group of one model.

It knows tokens, windows and which blocks are full; it must not know lanes or policies. Where a step in flight may still touch
blocks that are given up, the caller passes that step's `Drains` and hands it back to `ended` when the step has ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from apportion.core.errors import InternalError
from apportion.core.kv_spec import KVGroupSpec
from apportion.core.request import Request
from apportion.core.schedule import KVOp, KVOpKind
from apportion.kvcache.arena import Arena, Quota
from apportion.kvcache.block_pool import BlockPool
from apportion.kvcache.prefix_cache import extend_keys, first_live_block, longest_prefix, root_key

DEAD = -1  # a table entry wholly behind the window

Drains = list[tuple[BlockPool, list[int]]]
NewBlocks = tuple[list[int], ...]
NOTHING_NEW: NewBlocks = ()


@dataclass(slots=True, eq=False)
class Moves:
    """Copies that a coming step must do before it computes. requests: whose tables name the destinations: no other step may run them
    before that one has ended. drains: the sources, for that step to hand to `ended`."""

    ops: list[KVOp] = field(default_factory=list)
    requests: set[Request] = field(default_factory=set)
    drains: Drains = field(default_factory=list)


class _Tables:
    """One request's blocks. capacity: tokens that fit without a new block. next_death: the first start position that frees one."""

    __slots__ = ("capacity", "dead", "keys", "next_death", "num_published", "published_to", "root", "tables")

    def __init__(self, num_groups: int, root: bytes, block_sizes: set[int]) -> None:
        self.tables: tuple[list[int], ...] = tuple([] for _ in range(num_groups))
        self.dead = [0] * num_groups
        self.num_published = [0] * num_groups
        self.published_to = 0  # tokens; below the next full block there is nothing to publish
        self.capacity = 0
        self.next_death = 0
        self.root = root
        self.keys: dict[int, list[bytes]] = {size: [] for size in block_sizes}


class KVCacheManager:
    """Blocks of one model on one arena.

    groups: its layer groups. version: names the weights for the prefix cache. max_chunk: the most tokens of one request in a step, which
    bounds what a window group holds at once.
    """

    def __init__(
        self,
        arena: Arena,
        model: str,
        groups: Sequence[KVGroupSpec],
        *,
        version: str = "",
        quota: Quota | None = None,
        enable_prefix_caching: bool = True,
        max_chunk: int = 2048,
    ) -> None:
        self.arena = arena
        self.groups = tuple(groups)
        self.quota = quota or Quota()
        self.enable_prefix_caching = enable_prefix_caching
        self.max_chunk = max_chunk
        self.pools = tuple(BlockPool(arena, f"{model}/{i}/{g.format.name}", g.block_bytes, self.quota) for i, g in enumerate(self.groups))
        self.num_queried_tokens = 0
        self.num_hit_tokens = 0
        self._version = repr((model, version, self.groups))
        self._sizes = {g.block_size for g in self.groups}
        self._requests: dict[Request, _Tables] = {}

    def get_computed(self, request: Request) -> int:
        """Take up what the prefix cache holds of the request; returns how many tokens. At least one token is left to compute."""
        if request in self._requests:
            raise InternalError(f"request {request.request_id} already holds blocks")
        root = root_key(self._version, request.adapter_id, request.tenant)
        state = self._requests[request] = _Tables(len(self.groups), root, self._sizes)
        if not self._may_share(request):
            return 0
        limit = len(request.token_ids) - 1
        for size, keys in state.keys.items():
            extend_keys(keys, root, request.token_ids, size, limit // size)
        found = longest_prefix(self.groups, self.pools, state.keys, limit)
        self.num_queried_tokens += len(request.token_ids)
        self.num_hit_tokens += found
        for i, (spec, pool, table) in enumerate(zip(self.groups, self.pools, state.tables, strict=True)):
            first, end = first_live_block(spec, found), found // spec.block_size
            keys = state.keys[spec.block_size]
            table += [DEAD] * first
            for key in keys[first:end]:
                entry = pool.find(key)
                if entry is None:
                    raise InternalError(f"{pool.name}: a block of the prefix just found is gone")
                pool.acquire(entry)
                table.append(entry)
            state.dead[i], state.num_published[i] = first, end
        self._refresh(state)
        return found

    def could_hold(self, request: Request, num_tokens: int) -> bool:
        """Whether the first `num_tokens` of the request would fit beside what is live now, as far as one can tell without trying."""
        state = self._requests[request]
        for spec, pool, table, dead in zip(self.groups, self.pools, state.tables, state.dead, strict=True):
            if self._peak_blocks(spec, num_tokens) - (len(table) - dead) > pool.num_obtainable:
                return False
        return True

    def allocate(self, request: Request, start: int, num_new_tokens: int, fence: Drains | None) -> NewBlocks | None:
        """Make room for tokens start .. start + num_new_tokens - 1 and give up what lies behind the windows at `start`.

        fence: drains of the last step in flight that has this request, None when there is none. Returns the entries appended to each
        group's table, NOTHING_NEW when nothing was, or None when memory is short (no block is then held that was not before).
        """
        state = self._requests[request]
        end = start + num_new_tokens
        if end <= state.capacity and start < state.next_death:
            return NOTHING_NEW
        for i, spec in enumerate(self.groups):
            self._give_up_behind(state, i, first_live_block(spec, start), fence)
        new: list[list[int]] = []
        for spec, pool, table in zip(self.groups, self.pools, state.tables, strict=True):
            entries = pool.allocate(max(0, -(-end // spec.block_size) - len(table)))
            if entries is None:
                for other, taken in zip(self.pools, new, strict=False):
                    other.release(reversed(taken))
                return None
            new.append(entries)
        for table, entries in zip(state.tables, new, strict=True):
            table += entries
        self._refresh(state)
        return tuple(new)

    def publish(self, request: Request) -> None:
        """Let later requests hit the blocks that steps which have ended have filled (`request.num_computed_tokens`)."""
        state = self._requests[request]
        computed = request.num_computed_tokens
        if computed < state.published_to or not self.enable_prefix_caching:
            return
        for i, (spec, pool, table) in enumerate(zip(self.groups, self.pools, state.tables, strict=True)):
            keys, end = state.keys[spec.block_size], computed // spec.block_size
            extend_keys(keys, state.root, request.token_ids, spec.block_size, end)
            for index in range(max(state.num_published[i], state.dead[i]), end):
                pool.publish(table[index], keys[index])
            state.num_published[i] = end
        state.published_to = min((n + 1) * g.block_size for n, g in zip(state.num_published, self.groups, strict=True))

    def rewind(self, request: Request) -> bool:
        """Forget blocks past `request.num_computed_tokens` after a step that will never end; False when earlier ones are gone already."""
        state = self._requests[request]
        computed = request.num_computed_tokens
        if any(dead > first_live_block(spec, computed) for spec, dead in zip(self.groups, state.dead, strict=True)):
            return False
        for spec, pool, table in zip(self.groups, self.pools, state.tables, strict=True):
            keep = -(-computed // spec.block_size)
            pool.release(reversed(table[keep:]))
            del table[keep:]
        self._refresh(state)
        return True

    def free(self, request: Request, fence: Drains | None) -> None:
        """Give up all blocks of the request; published ones stay cached."""
        state = self._requests.pop(request, None)
        if state is None:
            return
        for pool, table, dead in zip(self.pools, state.tables, state.dead, strict=True):
            self._give_up(pool, table[dead:][::-1], fence)

    def reclaim(self, num_bytes: int, moves: Moves) -> int:
        """Give slabs of together at least `num_bytes` back to the arena, as far as possible; returns the bytes.

        Slabs without a live block go at once. Of the others the emptiest are evacuated: live blocks move into room in fuller slabs of
        the same group, tables change, and `moves` collects the copies, whose sources come back when the step that does them has ended.
        Blocks that a step in flight may touch stay where they are.
        """
        freed = 0
        for i, pool in enumerate(self.pools):
            while freed < num_bytes and pool.give_slab():
                freed += self.arena.slab_bytes
            if freed >= num_bytes:
                break
            busy = [s for r, s in self._requests.items() if r.num_in_flight_steps or r in moves.requests]
            pinned = {entry for state in busy for entry in state.tables[i][state.dead[i] :]}
            for slab in pool.slabs_by_load():
                pairs = pool.evacuate(slab, pinned) if freed < num_bytes else None
                if pairs is None:
                    continue
                freed += self.arena.slab_bytes
                pinned.update(target for _, target in pairs)
                moves.drains.append((pool, [source for source, _ in pairs]))
                moves.ops += [KVOp(KVOpKind.MOVE, i, source, target, pool.block_bytes) for source, target in pairs]
                self._rewrite(i, dict(pairs), moves.requests)
        return freed

    def ended(self, drains: Drains) -> None:
        """The step that `drains` belongs to touches nothing any more."""
        for pool, entries in drains:
            pool.undrain(entries)
        drains.clear()

    def tables(self, request: Request) -> tuple[list[int], ...]:
        """A copy of the request's block tables."""
        return tuple(list(table) for table in self._requests[request].tables)

    def num_dead(self, request: Request) -> tuple[int, ...]:
        """Per group, how many leading table entries are dead."""
        return tuple(self._requests[request].dead)

    def drop_cached(self) -> None:
        """Evict every cached block of the model."""
        for pool in self.pools:
            pool.drop_cached()

    def holds(self, request: Request) -> bool:
        return request in self._requests

    @property
    def num_draining(self) -> int:
        return sum(pool.num_draining for pool in self.pools)

    @property
    def num_live(self) -> int:
        return sum(pool.num_used + pool.num_draining for pool in self.pools)

    @property
    def usage(self) -> float:
        """Share of the memory this model may hold that live blocks take."""
        live = sum((pool.num_used + pool.num_draining) * g.block_bytes for pool, g in zip(self.pools, self.groups, strict=True))
        return live / max(1, self.arena.slabs_within(self.quota) * self.arena.slab_bytes)

    def slabs_for(self, num_tokens: int) -> int:
        """Slabs that a request of `num_tokens`, alone, needs at most."""
        return sum(-(-self._peak_blocks(g, num_tokens) // p.blocks_per_slab) for g, p in zip(self.groups, self.pools, strict=True))

    def max_request_len(self) -> int:
        """The most tokens that a request, alone, could have."""
        slabs = self.arena.slabs_within(self.quota)
        low, high = 0, 1
        while self.slabs_for(high) <= slabs and high < 2**31:
            low, high = high, high * 2
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.slabs_for(middle) <= slabs else (low, middle)
        return low

    def close(self) -> None:
        """Leave the arena; no request may hold blocks."""
        for pool in self.pools:
            self.arena.remove_owner(pool)

    def check_integrity(self) -> None:
        """Raises InternalError unless every pool's blocks add up and its references are exactly those of the tables."""
        for i, pool in enumerate(self.pools):
            pool.check_integrity()
            held: dict[int, int] = {}
            for state in self._requests.values():
                for entry in state.tables[i][state.dead[i] :]:
                    held[entry] = held.get(entry, 0) + 1
            if held != pool.references():
                raise InternalError(f"{pool.name}: references do not match the {len(self._requests)} block tables")

    def _rewrite(self, group: int, targets: dict[int, int], moved: set[Request]) -> None:
        """Put moved blocks into the tables, and let them be published again once their holders' next step has ended."""
        for request, state in self._requests.items():
            table = state.tables[group]
            for index in range(state.dead[group], len(table)):
                if table[index] in targets:
                    table[index] = targets[table[index]]
                    state.num_published[group] = min(state.num_published[group], index)
                    state.published_to = 0
                    moved.add(request)

    def _may_share(self, request: Request) -> bool:
        pooling = request.pooling_params
        needs_every_token = request.sampling_params.prompt_logprobs is not None or (pooling is not None and pooling.needs_every_token)
        return self.enable_prefix_caching and not needs_every_token

    def _peak_blocks(self, spec: KVGroupSpec, num_tokens: int) -> int:
        if spec.sliding_window is not None:
            num_tokens = min(num_tokens, spec.sliding_window + self.max_chunk + spec.block_size)
        return -(-num_tokens // spec.block_size)

    def _give_up_behind(self, state: _Tables, group: int, first: int, fence: Drains | None) -> None:
        table, dead = state.tables[group], state.dead[group]
        first = min(first, len(table))
        if first > dead:
            self._give_up(self.pools[group], table[dead:first], fence)
            table[dead:first] = [DEAD] * (first - dead)
            state.dead[group] = first

    @staticmethod
    def _give_up(pool: BlockPool, entries: list[int], fence: Drains | None) -> None:
        if fence is None:
            pool.release(entries)
        elif entries:
            pool.drain(entries)
            fence.append((pool, entries))

    def _refresh(self, state: _Tables) -> None:
        state.capacity = min(len(t) * g.block_size for t, g in zip(state.tables, self.groups, strict=True))
        state.next_death = 2**62
        for spec, dead in zip(self.groups, state.dead, strict=True):
            if spec.sliding_window is not None:
                state.next_death = min(state.next_death, (dead + 1) * spec.block_size + spec.sliding_window - 1)
