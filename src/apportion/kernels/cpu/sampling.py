"""Sampling and log-probabilities of csrc/cpu/sampling*, as kernels/ops states them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from apportion.core.errors import InternalError
from apportion.kernels.cpu import extension
from apportion.kernels.ops import SamplingRows


class Sampling:
    """`sample`, `apply_bitmask` and `logprobs` of kernels/ops.Ops. A row whose largest logit is NaN or infinite gives token -1 and
    log-probabilities of NaN."""

    def __init__(self, team: Any) -> None:
        self._kernel = extension.load().Sampling(team)

    def sample(self, logits: Tensor, rows: SamplingRows) -> Tensor:
        """logits float32 [R, V], contiguous in its last axis -> token ids int32 [R]."""
        count, size = logits.shape
        out = torch.empty(count, dtype=torch.int32)
        self._kernel.sample(
            logits.data_ptr(),
            logits.stride(0),
            count,
            size,
            rows.temperature.data_ptr(),
            rows.top_k.data_ptr(),
            rows.top_p.data_ptr(),
            rows.min_p.data_ptr(),
            rows.seed.data_ptr(),
            rows.position.data_ptr(),
            out.data_ptr(),
        )
        return out

    def apply_bitmask(self, logits: Tensor, rows: Tensor, masks: Tensor) -> None:
        """logits float32 [R, V], contiguous in its last axis; rows int32 [G]; masks uint8 [G, >= V / 8]."""
        size, mask_bytes = logits.shape[1], masks.shape[1]
        if mask_bytes * 8 < size:
            raise InternalError(f"a mask of {mask_bytes} bytes does not cover a vocabulary of {size} tokens")
        self._kernel.apply_bitmask(
            logits.data_ptr(), logits.stride(0), size, rows.data_ptr(), len(rows), masks.contiguous().data_ptr(), mask_bytes
        )

    def logprobs(self, logits: Tensor, token_ids: Tensor, top_n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(logprob of token_ids int32 [R], rank int32 [R] from 1, top ids int32 [R, n], top logprobs [R, n]); n at most V."""
        count, size = logits.shape
        n = min(top_n, size)
        values, ranks = torch.empty(count), torch.empty(count, dtype=torch.int32)
        top_ids, top_values = torch.empty(count, n, dtype=torch.int32), torch.empty(count, n)
        token_ids = token_ids.to(torch.int32)
        self._kernel.logprobs(
            logits.data_ptr(),
            logits.stride(0),
            count,
            size,
            token_ids.data_ptr(),
            n,
            values.data_ptr(),
            ranks.data_ptr(),
            top_ids.data_ptr(),
            top_values.data_ptr(),
        )
        return values, ranks, top_ids, top_values
