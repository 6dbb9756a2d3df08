"""A prompt's log-probabilities over the whole vocabulary, kept in a file or held against one: what a PromptReference asks for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from apportion.core.errors import InvalidRequest
from apportion.core.sampling_params import PromptReference
from apportion.core.schedule import TokenLogprobs


def meet_reference(reference: PromptReference, position: int, logits_TV: Tensor, entries: Sequence[TokenLogprobs]) -> None:
    """Write the distributions of the prompt tokens from `position` (1: the second) on, or set the `kl` of their entries.

    logits [T, V] float32, as the model gave them. Errors: InvalidRequest when the file cannot be mapped or has another vocabulary.
    """
    rows, vocab = logits_TV.shape
    if vocab != reference.vocab:
        raise InvalidRequest(f"the reference has a vocabulary of {reference.vocab} tokens and this model one of {vocab}")
    offset = (reference.first_row + position - 1) * vocab * 4
    try:
        stored = np.memmap(reference.path, np.float32, "r" if reference.compare else "r+", offset, (rows, vocab))
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"the reference {reference.path} cannot be mapped: {error}") from error
    own_TV = logits_TV.log_softmax(dim=-1).cpu()
    if not reference.compare:
        stored[:] = own_TV.numpy()
        return
    theirs_TV = torch.from_numpy(np.array(stored))
    kl_T = (theirs_TV.exp() * (theirs_TV - own_TV)).sum(dim=-1, dtype=torch.float64)
    for entry, kl in zip(entries, kl_T.tolist(), strict=True):
        entry.kl = kl
