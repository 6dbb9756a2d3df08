"""The gated feed-forward block: down(silu(gate x) * up x) (GLU variants, arXiv:2002.05202)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from apportion.layers.linear import Linear, gate_up, row_parallel
from apportion.layers.site import Site


class GatedMLP(nn.Module):
    """x [T, M] -> [T, M] in the slot "delta". ffn: width before any cut over ranks.

    slots: prefix of its activation slots, for a second one of another width in the same model.
    """

    def __init__(self, site: Site, ffn: int, bias: bool = False, slots: str = "") -> None:
        super().__init__()
        hidden = site.spec.hidden
        self.gate_up_proj = gate_up(site, hidden, ffn, bias, f"{slots}gated")
        self.down_proj = row_parallel(site / "down_proj", hidden, ffn, f"{slots}delta", bias)
        self.gate_up_proj.feed(self.down_proj)

    @property
    def entry(self) -> Linear:
        """The linear that alone takes the input."""
        return self.gate_up_proj

    def forward(self, x: Any) -> Tensor:
        return self.down_proj.forward(self.gate_up_proj.forward(x))
