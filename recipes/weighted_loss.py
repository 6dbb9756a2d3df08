"""Cross-entropy of a tied output embedding, weighted by token, that never holds a row of logits for every token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def chunk_loss(hidden: Tensor, embedding: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One piece of the loss with its gradients: (nll [N] unweighted, whether the target was the likeliest [N], d hidden, d embedding)."""
    logits = (hidden @ embedding.T).float()
    nll = logits.logsumexp(-1) - logits.gather(1, targets[:, None])[:, 0]
    hit = logits.argmax(-1) == targets
    probs = torch.softmax(logits, dim=-1)
    wrong = probs - (torch.arange(logits.shape[1], device=logits.device) == targets[:, None]).float()
    slope = (wrong * weights[:, None]).to(hidden.dtype)
    return nll, hit, slope @ embedding, (slope.T @ hidden).float()


class WeightedLoss(torch.autograd.Function):
    """Cross-entropy of a tied output embedding, its gradient made with it in pieces: no [N, V] tensor is ever held."""

    piece: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]] = staticmethod(chunk_loss)

    @staticmethod
    def forward(ctx: Any, hidden_NM: Tensor, embedding_VM: Tensor, targets_N: Tensor, weights_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        table, size = embedding_VM.to(hidden_NM.dtype), 512
        d_hidden, d_table = torch.empty_like(hidden_NM), torch.zeros_like(embedding_VM)
        nlls, hits = torch.empty_like(weights_N), torch.empty_like(targets_N, dtype=torch.bool)
        for start in range(0, len(hidden_NM), size):
            part = slice(start, start + size)
            nlls[part], hits[part], d_hidden[part], d_part = WeightedLoss.piece(hidden_NM[part], table, targets_N[part], weights_N[part])
            d_table += d_part
        ctx.save_for_backward(d_hidden, d_table)
        ctx.mark_non_differentiable(nlls, hits)
        return (nlls * weights_N).sum(), nlls, hits

    @staticmethod
    def backward(ctx: Any, slope: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_table = ctx.saved_tensors
        return d_hidden * slope.to(d_hidden.dtype), d_table * slope, None, None
