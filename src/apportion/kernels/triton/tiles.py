"""The shapes in which kernels may cut their work, the default first: scripts/gpu measures them, `make triton-sweep` compiles them."""

from __future__ import annotations

from dataclasses import dataclass, replace

MOST_ROWS = 64  # tokens of a program in the kernels for few tokens


@dataclass(frozen=True, slots=True)
class Tile:
    """rows: of activations (0: what the call has). n: outputs, or tokens of context. k: inputs at a time. num_stages: tiles in flight."""

    rows: int = 0
    n: int = 64
    k: int = 64
    num_warps: int = 4
    num_stages: int = 3

    @property
    def launch(self) -> dict[str, int]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


@dataclass(frozen=True, slots=True)
class Tiles:
    flat: tuple[Tile, ...] = (
        Tile(n=64, k=128, num_stages=4),
        Tile(n=64, k=256, num_stages=3),
        Tile(n=64, k=64, num_stages=6),
        Tile(n=128, k=64, num_stages=5),
        Tile(n=128, k=128, num_stages=3),
    )
    experts: tuple[Tile, ...] = (Tile(n=64, k=64, num_stages=4), Tile(n=128, k=64), Tile(n=64, k=128))
    decode: tuple[Tile, ...] = (
        Tile(rows=16, n=64),
        Tile(rows=16, n=128, num_stages=2),
        Tile(rows=16, n=32, num_stages=4),
        Tile(rows=16, n=64, num_warps=2),
    )
    prefill: tuple[Tile, ...] = (
        Tile(rows=64, n=64, num_warps=8),
        Tile(rows=128, n=64, num_warps=8),
        Tile(rows=64, n=32, num_stages=2),
        Tile(rows=128, n=32, num_warps=8),
    )
    latent_decode: tuple[Tile, ...] = (
        Tile(rows=16, n=32, num_warps=8, num_stages=1),
        Tile(rows=16, n=64, num_warps=8, num_stages=1),
        Tile(rows=16, n=32, num_warps=8, num_stages=2),
    )
    latent_prefill: tuple[Tile, ...] = (
        Tile(rows=32, n=32, num_warps=8, num_stages=1),
        Tile(rows=32, n=64, num_warps=8, num_stages=1),
        Tile(rows=64, n=32, num_warps=8, num_stages=1),
    )

    def within(self, shared_bytes: int) -> Tiles:
        """The same with as many stages as a block's shared memory holds. Products keep both operands of a stage there (16-bit; an
        expert's gate and up together), attention the K or V of a tile."""

        def fit(tile: Tile, bytes_per_stage: int) -> Tile:
            return replace(tile, num_stages=max(1, min(tile.num_stages, shared_bytes // bytes_per_stage)))

        return replace(
            self,
            flat=tuple(fit(tile, 2 * tile.k * (tile.n + MOST_ROWS)) for tile in self.flat),
            experts=tuple(fit(tile, 2 * tile.k * (2 * tile.n + MOST_ROWS)) for tile in self.experts),
        )
