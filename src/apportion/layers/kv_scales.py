"""The scales of a layer's cached keys and values, for caches of 8-bit numbers, under every name that checkpoints give them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from apportion.core.errors import CheckpointError
from apportion.layers.site import Site
from apportion.layers.weights import JointSource, Shard
from apportion.quant.schemes.tensors import scales

# Below the attention module: vLLM and AutoFP8, vLLM's own layer, ModelOpt, compressed-tensors; `kv_scale` is one for both.
KEY_NAMES = ("k_scale", "attn.k_scale", "k_proj.k_scale", "k_proj.output_scale", "kv_scale", "attn.kv_scale")
VALUE_NAMES = ("v_scale", "attn.v_scale", "v_proj.v_scale", "v_proj.output_scale", "kv_scale", "attn.kv_scale")
UNUSED_NAMES = (  # of queries and probabilities, which stay in float32
    "q_scale", "attn.q_scale", "q_proj.q_scale", "q_proj.output_scale", "prob_scale", "attn.prob_scale", "prob_output_scale",
)  # fmt: skip


class KVScales(nn.Module):
    """float32 [2, K]: what the keys and the values of each kv head are divided by; in files one number, or one for each head.

    A latent cache has one vector and takes the scale of keys. Without any in the checkpoint they are 0, which stands for none.
    """

    def __init__(self, site: Site, heads: Shard, latent: bool) -> None:
        super().__init__()
        self.name = f"{site.name}.kv_scales"
        self.heads = heads
        self._stem, self._latent = site.name, latent
        self._stored = torch.zeros(2, heads.count)

    @property
    def calibrated(self) -> bool:
        return bool(self._stored.all())

    @property
    def values(self) -> Tensor:
        """A tensor of its own; 1 where the checkpoint has none."""
        return torch.where(self._stored == 0, 1.0, self._stored).contiguous()

    @property
    def nbytes(self) -> int:
        return 8 * self.heads.count

    def bind(self, buffer: Tensor) -> None:
        self._stored = buffer.view(torch.float32).view(2, self.heads.count)

    def sources(self, present: Collection[str]) -> Iterator[JointSource]:
        names = [f"{self._stem}.{name}" for name in dict.fromkeys((*KEY_NAMES, *VALUE_NAMES, *UNUSED_NAMES))]
        found = [name for name in names if name in present]
        if found:
            n = self.heads.total
            yield JointSource(dict.fromkeys(found, ((), (1,), (n,), (n, 1), (n, 1, 1), (1, n, 1, 1))), self._load)

    def _load(self, tensors: Mapping[str, Tensor]) -> None:
        rows = []
        for kinds in (KEY_NAMES, KEY_NAMES if self._latent else VALUE_NAMES):
            name = next((f"{self._stem}.{kind}" for kind in kinds if f"{self._stem}.{kind}" in tensors), None)
            if name is not None:
                rows.append(scales(name, tensors[name]).flatten().expand(self.heads.total)[self.heads.slice])
        if len(rows) == 1:
            raise CheckpointError(f"{self._stem} has a scale of cached keys or of cached values; it takes both: {', '.join(tensors)}")
        if rows:
            self._stored.copy_(torch.stack(rows))

    def describe(self) -> dict[str, Any]:
        return {"heads": self.heads.count}
