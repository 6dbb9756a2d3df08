"""The attention of one layer: hands a step's q, k and v to the backend of the layer's group. And the binding of backends to a model."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from apportion.attention.backend import AttentionBackend, ForwardContext
from apportion.attention.dense import DenseBackend
from apportion.attention.mla import LatentBackend
from apportion.attention.paged import PagedBackend
from apportion.core.errors import InternalError
from apportion.core.kv_spec import KVGroupSpec
from apportion.core.softmax_table import SoftmaxTable
from apportion.kernels.ops import AttentionSpec
from apportion.layers.kv_scales import KVScales
from apportion.layers.linear import kv_heads
from apportion.layers.norm import RMSNorm
from apportion.layers.rotary import cos_sin_table
from apportion.layers.site import Site
from apportion.layers.weights import Shard

logger = logging.getLogger(__name__)


class Attention(nn.Module):
    """qkv [T, (H + 2K) * D] -> [T, H * D] in the slot "attended".

    q_norm, k_norm: per-head norms before rotation, where the model has them. value_dim: channels of a head's output, head_dim unless
    given. Latent attention takes the absorbed queries followed by the latent, [T, (H + 1) * D] (attention/mla).
    """

    def __init__(
        self, site: Site, layer: int, q_norm: RMSNorm | None = None, k_norm: RMSNorm | None = None, value_dim: int | None = None
    ) -> None:
        super().__init__()
        self.layer = layer
        self.width = site.spec.heads_per_rank(site.group.size) * (value_dim or site.spec.head_dim)
        self.q_norm, self.k_norm = q_norm, k_norm
        latent = site.spec.latent is not None
        self.kv_scales = KVScales(site, Shard.whole(1) if latent else kv_heads(site, site.spec.num_kv_heads), latent)
        self._activations = site.activations
        self._run: Callable[..., Tensor] = _no_backend
        self._group = 0
        self._norm_weights: tuple[Tensor, ...] = ()

    def bind_backend(self, backend: AttentionBackend, group: int) -> None:
        """Attend by `backend`, with the metadata of kv group `group`."""
        self._run, self._group = backend.run, group
        norms = (self.q_norm, self.k_norm)
        self._norm_weights = tuple(norm.weight for norm in norms if norm is not None)

    def forward(self, qkv_TC: Tensor, context: ForwardContext) -> Tensor:
        out = self._activations.take("attended", qkv_TC.shape[0], self.width)
        return self._run(self.layer, qkv_TC, context.positions_T, out, context.metadata[self._group], *self._norm_weights)


def _no_backend(*step: object) -> Tensor:
    raise InternalError("a model was run before attention backends were bound to it")


def attention_spec(site: Site, group: KVGroupSpec) -> AttentionSpec:
    """What the kernels of one layer group must know, on this rank."""
    spec = site.spec
    return AttentionSpec(
        num_heads=spec.heads_per_rank(site.group.size),
        kv=group,
        scale=spec.attention_scale,
        rotary_dim=spec.rope.rotary_dim,
        interleaved=spec.rope.interleaved,
        qk_norm_eps=spec.norm_eps if spec.qk_norm else None,
    )


def bind_paged_attention(
    model: nn.Module, site: Site, groups: Sequence[KVGroupSpec], arena: Tensor, max_model_len: int
) -> tuple[AttentionBackend, ...]:
    """Make every attention layer of `model` read and write `arena` (uint8 [bytes]); returns the backend of each group, to plan steps with.

    groups: ModelSpec.kv_groups of this rank. Weights are bound before.
    """
    cos_sin = cos_sin_table(site.spec.rope, max_model_len).to(arena.device)
    layers = {module.layer: module.kv_scales for module in model.modules() if isinstance(module, Attention)}
    bare = [layer for group in groups if group.format.scaled for layer in group.layers if not layers[layer].calibrated]
    if bare and site.group.rank == 0:
        logger.warning(
            "%d of %d layers have no calibrated scales for a cache in %s: keys and values are stored as they are, scale 1.0",
            len(bare), len(layers), groups[0].format.name,
        )  # fmt: skip

    def make(group: KVGroupSpec) -> AttentionBackend:
        kind = LatentBackend if group.latent else PagedBackend
        scales = {layer: layers[layer].values for layer in group.layers if group.format.scaled and layers[layer].calibrated}
        return kind(site.ops, attention_spec(site, group), arena, cos_sin, scales)

    return _bind(model, groups, make)


def unify_softmax(backends: Sequence[AttentionBackend], groups: Sequence[KVGroupSpec], site: Site, table: SoftmaxTable) -> None:
    """Give every head that has one its unified maximum."""
    heads = Shard.even(site.spec.num_heads, site.group).slice
    for backend, group in zip(backends, groups, strict=True):
        for layer in group.layers:
            phi = [math.nan if value is None else value for value in table.phi[layer][heads]]
            backend.unify(layer, torch.tensor(phi, dtype=torch.float32))


def bind_dense_attention(model: nn.Module, site: Site, groups: Sequence[KVGroupSpec], max_len: int) -> tuple[AttentionBackend, ...]:
    """The same without a cache: each step brings whole sequences of at most `max_len` tokens."""
    cos_sin = cos_sin_table(site.spec.rope, max_len)
    return _bind(model, groups, lambda group: DenseBackend(site.ops, attention_spec(site, group), cos_sin))


def _bind(model: nn.Module, groups: Sequence[KVGroupSpec], make: Callable[[KVGroupSpec], AttentionBackend]) -> tuple[AttentionBackend, ...]:
    backends = tuple(make(group) for group in groups)
    group_of = {layer: index for index, group in enumerate(groups) for layer in group.layers}
    for module in model.modules():
        if isinstance(module, Attention):
            index = group_of[module.layer]
            module.bind_backend(backends[index], index)
    return backends
