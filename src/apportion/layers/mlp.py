"""The gated feed-forward block: down(silu(gate x) * up x) (GLU variants, arXiv:2002.05202)."""

from __future__ import annotations

from torch import Tensor, nn

from apportion.layers.linear import gate_up, row_parallel
from apportion.layers.site import Site


class GatedMLP(nn.Module):
    """x [T, M] -> [T, M] in the slot "delta". ffn: width before any cut over ranks.

    slots: prefix of its activation slots, for a second one of another width in the same model.
    """

    def __init__(self, site: Site, ffn: int, bias: bool = False, slots: str = "") -> None:
        super().__init__()
        hidden = site.spec.hidden
        self.gate_up_proj = gate_up(site, hidden, ffn, bias, f"{slots}gate_up")
        self.down_proj = row_parallel(site / "down_proj", hidden, ffn, f"{slots}delta", bias)
        self._silu_mul = site.ops.silu_mul
        self._activations = site.activations
        self._gated = f"{slots}gated"
        self._width = self.gate_up_proj.width // 2

    def forward(self, x: Tensor) -> Tensor:
        gate_up = self.gate_up_proj.forward(x)
        gated = self._silu_mul(gate_up, self._activations.take(self._gated, x.shape[0], self._width))
        return self.down_proj.forward(gated)
