"""A mixture of experts made from a trained dense decoder (upcycling, Komatsuzaki et al. 2023, with experts that differ from the start).

Per layer, the tokens of a sample are clustered by what enters the feed-forward part; the centroids are the router, and each expert takes
the neurons that its tokens use most (as MoEfication, Zhang et al. 2022, splits a trained layer). Attention and embeddings stay.
"""

from __future__ import annotations

from typing import Any

import torch
from small_models import Decoder
from torch import Tensor
from torch.nn import functional


def config_of_mixture(config: dict[str, Any], *, num_experts: int, top_k: int, ffn_dim: int) -> dict[str, Any]:
    """The dense model's configuration as Qwen3-MoE's."""
    kept = {key: value for key, value in config.items() if key not in ("architectures", "model_type", "mlp_bias", "pretraining_tp")}
    return kept | {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts": num_experts, "num_experts_per_tok": top_k,
        "moe_intermediate_size": ffn_dim, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
        "output_router_logits": False, "use_sliding_window": False,
    }  # fmt: skip


@torch.no_grad()
def upcycle(dense: Decoder, config: dict[str, Any], ids_BT: Tensor, seed: int) -> Decoder:
    """The dense decoder as a mixture of `config`'s sizes. ids_BT: the sample of tokens that its experts are cut by."""
    mixture = Decoder(config)
    generator = torch.Generator().manual_seed(seed)
    shared = {name: t for name, t in dense.state_dict().items() if ".mlp." not in name}
    mixture.load_state_dict(shared, strict=False)
    x = dense.embed_tokens(ids_BT)
    cos, sin = dense.cos[: ids_BT.shape[1]], dense.sin[: ids_BT.shape[1]]
    for given, made in zip(dense.layers, mixture.layers, strict=True):
        normed = given.input_layernorm(x)
        for norm, projection in ((made.self_attn.q_norm, given.self_attn.q_proj), (made.self_attn.k_norm, given.self_attn.k_proj)):
            norm.weight.fill_(projection(normed).view(-1, config["head_dim"]).norm(dim=-1).mean() * config["head_dim"] ** -0.5)
        x, inside = given.attend(x, cos, sin)
        rows = inside.flatten(0, 1)
        centroids, nearest = cluster(rows, config["num_experts"], config["num_experts_per_tok"], generator)
        used = functional.silu(given.mlp.gate_proj(rows)) * given.mlp.up_proj(rows)
        importance = used.abs() * given.mlp.down_proj.weight.norm(dim=0)
        for expert in range(config["num_experts"]):
            tokens = (nearest == expert).any(-1)
            neurons = importance[tokens].mean(0).topk(config["moe_intermediate_size"]).indices.sort().values
            made.mlp.gate_EFM[expert] = given.mlp.gate_proj.weight[neurons]
            made.mlp.up_EFM[expert] = given.mlp.up_proj.weight[neurons]
            made.mlp.down_EMF[expert] = given.mlp.down_proj.weight[:, neurons]
        made.mlp.gate.weight.copy_(centroids)
        wanted, got = given.mlp(inside), made.mlp(inside)
        made.mlp.down_EMF *= (wanted * got).sum() / got.square().sum()  # the scale that is nearest in the sum of squares
        x = x + wanted
    return mixture


def cluster(rows_NM: Tensor, count: int, top_k: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Spherical k-means of the rows: (centroids [count, M], scaled to logits with a spread of 1.5; each row's nearest [N, k])."""
    unit = functional.normalize(rows_NM, dim=-1)
    centroids = unit[torch.randperm(len(unit), generator=generator)[:count]]
    for _ in range(20):
        chosen = (unit @ centroids.T).argmax(-1)
        sums = torch.zeros_like(centroids).index_add_(0, chosen, unit)
        centroids = torch.where(sums.any(-1, keepdim=True), functional.normalize(sums, dim=-1), centroids)
    centroids = centroids - centroids.mean(0)  # the same to a softmax
    logits = rows_NM @ centroids.T
    return centroids * (1.5 / logits.std(-1).mean()), logits.topk(top_k, dim=-1).indices
