"""A mixture of experts made from a trained dense decoder (upcycling, Komatsuzaki et al. 2023, with experts that differ from the start).

Per layer, the tokens of a sample are clustered by what enters the feed-forward part; the centroids are the router, and each expert takes
the neurons that its tokens use most (as MoEfication, Zhang et al. 2022, splits a trained layer). Its outputs are then fitted to the dense
layer's by least squares. Attention and embeddings stay, and so does the first layer's feed-forward part: cut like the others it alone
would cost more than all of them together.
"""

from __future__ import annotations

from typing import Any

import torch
from small_models import MLP, Decoder, MoE
from torch import Tensor
from torch.nn import functional

RIDGE = 0.01  # of the mean square, for neurons that the sample hardly uses


def config_of_mixture(config: dict[str, Any], *, num_experts: int, top_k: int, ffn_dim: int) -> dict[str, Any]:
    """The dense model's configuration as Qwen3-MoE's."""
    kept = {key: value for key, value in config.items() if key not in ("architectures", "model_type", "mlp_bias", "pretraining_tp")}
    return kept | {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts": num_experts, "num_experts_per_tok": top_k,
        "moe_intermediate_size": ffn_dim, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [0],
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
        wanted = given.mlp(inside)
        if isinstance(made.mlp, MoE):
            split(given.mlp, made.mlp, inside.flatten(0, 1), wanted.flatten(0, 1), generator)
        else:
            made.mlp.load_state_dict(given.mlp.state_dict())
        x = x + wanted
    return mixture


def split(given: MLP, made: MoE, rows_NM: Tensor, wanted_NM: Tensor, generator: torch.Generator) -> None:
    """Give `made` a router and experts that come as near as they can to `given`, which turns the rows into those wanted."""
    experts, ffn_dim, _ = made.gate_EFM.shape
    centroids, nearest = cluster(rows_NM, experts, made.top_k, generator)
    made.gate.weight.copy_(centroids)
    importance = (functional.silu(given.gate_proj(rows_NM)) * given.up_proj(rows_NM)).abs() * given.down_proj.weight.norm(dim=0)
    weights = torch.zeros(len(rows_NM), experts)
    weights.scatter_(1, nearest, functional.softmax((rows_NM @ centroids.T).gather(1, nearest), dim=-1))
    inside = []  # what each expert's neurons hold, weighted by the router: the outputs are linear in it
    for expert in range(experts):
        neurons = importance[weights[:, expert] > 0].mean(0).topk(ffn_dim).indices.sort().values
        made.gate_EFM[expert], made.up_EFM[expert] = given.gate_proj.weight[neurons], given.up_proj.weight[neurons]
        held = functional.silu(rows_NM @ made.gate_EFM[expert].T) * (rows_NM @ made.up_EFM[expert].T)
        inside.append(held * weights[:, expert, None])
    inside_NF = torch.cat(inside, dim=1)
    gram = inside_NF.T @ inside_NF
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    down_FM = torch.linalg.solve(gram, inside_NF.T @ wanted_NM)
    made.down_EMF.copy_(down_FM.view(experts, ffn_dim, -1).mT)


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
