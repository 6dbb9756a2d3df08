"""One device's KV memory as the control plane sees it: equal slabs, each lent to one owner at a time.

It knows slab numbers, owners and quotas; it must not know blocks, requests or where the bytes are. An owner (a `BlockPool`: one
model's layer group in one format) cuts its slabs into equal blocks and gives a slab back as soon as no block of it is in use.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from apportion.core.errors import InternalError, InvalidParameter, OutOfMemory
from apportion.core.kv_spec import UNIT_BYTES

MAX_WASTE = 0.06
PAGE_BYTES = 4096


@dataclass(slots=True, eq=False)
class Quota:
    """A limit in bytes on what the owners that share this object may hold together. Lowering it below `held_bytes` takes nothing
    away by itself: no slab is added until reclaiming or finishing requests bring the holding down. None: the whole arena.

    It is soft: the scheduler lifts it for a request that would otherwise stand still with nobody to wait for."""

    limit_bytes: int | None = None
    held_bytes: int = 0

    def admits(self, num_bytes: int) -> bool:
        return self.limit_bytes is None or self.held_bytes + num_bytes <= self.limit_bytes

    @contextmanager
    def lifted(self) -> Iterator[None]:
        limit, self.limit_bytes = self.limit_bytes, None
        try:
            yield
        finally:
            self.limit_bytes = limit


class SlabOwner(Protocol):
    name: str
    quota: Quota

    @property
    def slabs(self) -> Iterable[int]: ...

    @property
    def num_idle_slabs(self) -> int:
        """Slabs that hold no live block, only cached ones."""

    def give_slab(self) -> bool:
        """Evict the cached blocks of one idle slab and return it to the arena; False when there is none."""


class Arena:
    """`num_bytes` cut into slabs of `slab_bytes`. Slab i lies at i * slab_bytes; entries count `UNIT_BYTES` from the start."""

    def __init__(self, num_bytes: int, slab_bytes: int) -> None:
        if slab_bytes % UNIT_BYTES:
            raise InvalidParameter(f"slab_bytes must be a multiple of {UNIT_BYTES}, got {slab_bytes}")
        self.slab_bytes = slab_bytes
        self.slab_units = slab_bytes // UNIT_BYTES
        self.num_slabs = num_bytes // slab_bytes
        if self.num_slabs < 1:
            raise OutOfMemory(f"{num_bytes} bytes of KV memory hold no slab of {slab_bytes} bytes; give at least {slab_bytes}")
        self.owners: list[SlabOwner] = []
        self.num_releases = 0  # blocks that stopped being live so far, by any owner: what failed may be tried again when it moved
        self._free = list(range(self.num_slabs - 1, -1, -1))

    @property
    def num_bytes(self) -> int:
        return self.num_slabs * self.slab_bytes

    @property
    def num_free_slabs(self) -> int:
        return len(self._free)

    def add_owner(self, owner: SlabOwner) -> None:
        self.owners.append(owner)

    def remove_owner(self, owner: SlabOwner) -> None:
        """Forget an owner that holds nothing but cached blocks."""
        while owner.give_slab():
            pass
        if any(True for _ in owner.slabs):
            raise InternalError(f"{owner.name} leaves the arena with live blocks")
        self.owners.remove(owner)

    def take_slab(self, owner: SlabOwner) -> int | None:
        """A slab for `owner`, evicting other owners' idle slabs if none is free; None when the quota or the memory is spent."""
        while not owner.quota.admits(self.slab_bytes):
            if not self._evict_from(o for o in self.owners if o.quota is owner.quota and o is not owner):
                return None
        if not self._free and not self._evict_from(o for o in self._by_excess() if o is not owner):
            return None
        owner.quota.held_bytes += self.slab_bytes
        return self._free.pop()

    def return_slab(self, owner: SlabOwner, slab: int) -> None:
        owner.quota.held_bytes -= self.slab_bytes
        self._free.append(slab)

    def num_obtainable_slabs(self, owner: SlabOwner) -> int:
        """How many `take_slab` calls would succeed now."""
        idle = sum(o.num_idle_slabs for o in self.owners if o is not owner)
        total = len(self._free) + idle
        if owner.quota.limit_bytes is None:
            return total
        siblings = sum(o.num_idle_slabs for o in self.owners if o.quota is owner.quota and o is not owner)
        return min(total, max(0, owner.quota.limit_bytes - owner.quota.held_bytes) // self.slab_bytes + siblings)

    def slabs_within(self, quota: Quota) -> int:
        """The most slabs that owners under `quota` could ever hold."""
        return self.num_slabs if quota.limit_bytes is None else min(self.num_slabs, quota.limit_bytes // self.slab_bytes)

    def check_integrity(self) -> None:
        """Raises InternalError unless every slab is free or has exactly one owner and quotas add up."""
        held = [slab for owner in self.owners for slab in owner.slabs]
        if sorted(held + self._free) != list(range(self.num_slabs)):
            raise InternalError(f"arena: {len(held)} held and {len(self._free)} free slabs are not a partition of {self.num_slabs}")
        for quota in {id(o.quota): o.quota for o in self.owners}.values():
            count = sum(1 for o in self.owners if o.quota is quota for _ in o.slabs)
            if count * self.slab_bytes != quota.held_bytes:
                raise InternalError(f"arena: a quota counts {quota.held_bytes} bytes and its owners hold {count * self.slab_bytes}")

    def _by_excess(self) -> list[SlabOwner]:
        """Owners, the one furthest above its quota first."""

        def room(owner: SlabOwner) -> int:
            limit = owner.quota.limit_bytes
            return (self.num_bytes if limit is None else limit) - owner.quota.held_bytes

        return sorted(self.owners, key=room)

    def _evict_from(self, owners: Iterable[SlabOwner]) -> bool:
        return any(owner.give_slab() for owner in owners)


def choose_slab_bytes(block_bytes: Sequence[int], arena_bytes: int) -> int:
    """The smallest slab that wastes at most `MAX_WASTE` of itself for every block size, in whole pages.

    It is also at least a 64th of an owner's even share of the arena or 1 MiB, whichever is less, so that small blocks do not
    make slabs by the million. Errors: OutOfMemory when not even one slab per owner fits.
    """
    largest = max(block_bytes)
    floor = min(2**20, arena_bytes // (64 * len(block_bytes)))
    count = max(1, floor // largest)
    while True:
        # Seventeen of the largest block always do, as a slab then loses less than a seventeenth to any smaller one.
        slab = -(-count * largest // PAGE_BYTES) * PAGE_BYTES
        if all(slab % b <= MAX_WASTE * slab for b in block_bytes):
            break
        count += 1
    if slab * len(block_bytes) > arena_bytes:
        raise OutOfMemory(
            f"{arena_bytes} bytes of KV memory do not hold a slab of {slab} bytes for each of {len(block_bytes)} layer groups;"
            f" give kv_cache_memory of at least {slab * len(block_bytes)}"
        )
    return slab
