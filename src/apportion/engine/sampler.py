"""From logits to tokens and log-probabilities, in vLLM's order: raw log-probabilities, then masks, biases and penalties, then sampling.

Knows a request's parameters and tokens, nothing of batches, blocks or models. Random numbers come from (seed, position of the
token) alone, so a token does not depend on who else is in the batch, on the lane, or on a replay.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from apportion.core.errors import InvalidParameter
from apportion.core.sampling_params import SamplingParams
from apportion.core.schedule import TokenLogprobs
from apportion.kernels.ops import Ops, SamplingRows
from apportion.platforms.platform import Fetched

NOT_FINITE = "the model gave NaN or infinite logits at position {position}; the request was stopped"
NOTHING_ALLOWED = "no token is left to sample at position {position}: allowed_token_ids, bad_words, min_tokens and the grammar exclude all"


class LogitRules:
    """What the parameters of one request do to its logits before sampling; holds counts that are rebuilt from tokens at any time.

    Errors: InvalidParameter when a token id is outside the vocabulary.
    """

    def __init__(
        self, params: SamplingParams, prompt_ids: Sequence[int], output_ids: Sequence[int], eos_ids: Sequence[int], vocab: int
    ) -> None:
        self.params = params
        self.output_ids: list[int] = []
        self.stop_ids = _ids("stop_token_ids", sorted({*(params.stop_token_ids or ()), *eos_ids}), vocab)
        bias = params.logit_bias or {}
        self.bias_ids, self.bias = _ids("logit_bias", list(bias), vocab), torch.tensor(list(bias.values()), dtype=torch.float32)
        self.excluded: Tensor | None = None  # bool [V]
        if params.allowed_token_ids is not None:
            self.excluded = torch.ones(vocab, dtype=torch.bool)
            self.excluded[_ids("allowed_token_ids", params.allowed_token_ids, vocab)] = False
        for word in params.bad_words_token_ids:
            _ids("bad_words", word, vocab)
        self.penalized = has_penalties(params)
        if self.penalized:
            # ids of every token seen, prompt and output; counts are of the output alone
            seen = np.unique(np.asarray(prompt_ids, dtype=np.int64)) if params.repetition_penalty != 1.0 else np.empty(0, np.int64)
            self._index = {int(token): i for i, token in enumerate(seen)}
            self._num_seen = len(seen)
            self._seen, self._counts = np.zeros(len(seen) + 64, np.int64), np.zeros(len(seen) + 64, np.float32)
            self._seen[: len(seen)] = seen
        for token in output_ids:
            self.append(token)

    def append(self, token: int) -> None:
        """`token` was sampled."""
        self.output_ids.append(token)
        if not self.penalized:
            return
        index = self._index.setdefault(token, self._num_seen)
        if index == self._num_seen:
            self._num_seen += 1
            if index == len(self._seen):
                self._seen, self._counts = (np.concatenate([a, np.zeros_like(a)]) for a in (self._seen, self._counts))
            self._seen[index] = token
        self._counts[index] += 1

    def apply(self, logits_V: Tensor) -> None:
        """Change the logits of the next token in place: masks, bias, penalties."""
        params = self.params
        if self.excluded is not None:
            logits_V.masked_fill_(self.excluded, -torch.inf)
        for word in params.bad_words_token_ids:
            prefix = word[:-1]
            if not prefix or self.output_ids[-len(prefix) :] == prefix:
                logits_V[word[-1]] = -torch.inf
        if len(self.output_ids) < params.min_tokens:
            logits_V[self.stop_ids] = -torch.inf
        if len(self.bias_ids):
            logits_V[self.bias_ids] += self.bias
        if self.penalized and self._num_seen:
            ids, counts = torch.from_numpy(self._seen[: self._num_seen]), torch.from_numpy(self._counts[: self._num_seen])
            values = logits_V[ids]
            if (penalty := params.repetition_penalty) != 1.0:
                values = torch.where(values > 0, values / penalty, values * penalty)
            logits_V[ids] = values - params.frequency_penalty * counts - params.presence_penalty * (counts > 0)


def has_penalties(params: SamplingParams) -> bool:
    return bool(params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1.0)


def has_rules(params: SamplingParams) -> bool:
    return bool(
        has_penalties(params)
        or params.logit_bias
        or params.bad_words_token_ids
        or params.min_tokens
        or params.allowed_token_ids is not None
    )


def _ids(name: str, ids: Sequence[int], vocab: int) -> Tensor:
    for token in ids:
        if not 0 <= token < vocab:
            raise InvalidParameter(f"{name} has the token id {token}; the model's vocabulary has {vocab} tokens")
    return torch.tensor(list(ids), dtype=torch.int64)


@dataclass(eq=False)
class SamplerOutput:
    """tokens_S: int32 on the device, below 0 where a row has none; fetched: the same for the host. logprobs and errors by row.

    position_S: of the tokens. highest_S: the largest logit of each row, where rules or masks may have left none.
    """

    tokens_S: Tensor
    fetched: Fetched
    position_S: Tensor
    highest_S: Tensor | None
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)

    @cached_property
    def token_ids(self) -> np.ndarray:
        """int32 [S], 0 for a row with an error. Waits for the device, as `errors` does."""
        return self.fetched.result().numpy().clip(min=0)

    @cached_property
    def errors(self) -> dict[int, str]:
        found = {}
        for row in np.flatnonzero(self.fetched.result().numpy() < 0).tolist():
            excluded = self.highest_S is not None and float(self.highest_S[row]) == -torch.inf
            found[row] = (NOTHING_ALLOWED if excluded else NOT_FINITE).format(position=int(self.position_S[row]))
        return found


class Sampler:
    """Samples a batch. One operator call when no row asks for more than temperature, top_k, top_p and min_p."""

    def __init__(self, ops: Ops, fetch: Callable[[Tensor], Fetched] = Fetched) -> None:
        self._ops, self._fetch = ops, fetch

    def __call__(
        self,
        logits_SV: Tensor,
        rows: SamplingRows,
        rules: dict[int, LogitRules],
        grammar_masks: dict[int, bytes],
        num_logprobs: dict[int, int],
    ) -> SamplerOutput:
        """logits float32 [S, V], changed in place. rules, grammar_masks (a bit per token, lowest first), num_logprobs (-1: all): by
        row, for the rows that have any."""
        wanted = sorted(num_logprobs)
        raw_WV = logits_SV[wanted] if wanted else logits_SV  # indexing copies: rules must not show in raw log-probabilities
        for row, rule in rules.items():
            on_host = logits_SV[row].cpu()  # the row itself where that is where it lies
            rule.apply(on_host)
            logits_SV[row] = on_host
        if grammar_masks:
            masks = np.stack([np.frombuffer(mask, np.uint8) for mask in grammar_masks.values()])
            device = logits_SV.device
            masked = torch.tensor(list(grammar_masks), dtype=torch.int32, device=device)
            self._ops.apply_bitmask(logits_SV, masked, torch.from_numpy(masks).to(device))
        tokens_S = self._ops.sample(logits_SV, rows)
        highest_S = logits_SV.amax(dim=1) if rules or grammar_masks else None
        output = SamplerOutput(tokens_S, self._fetch(tokens_S), rows.position, highest_S)
        if wanted:
            tokens = tokens_S[wanted].clamp(min=0)
            output.logprobs = dict(zip(wanted, self.logprobs(raw_WV, tokens, [num_logprobs[row] for row in wanted]), strict=True))
        return output

    def logprobs(self, logits_SV: Tensor, token_ids: Tensor, num: Sequence[int]) -> list[TokenLogprobs]:
        """Log-probabilities of token_ids int32 [S] and of the num[s] most likely tokens (-1: all) of each row."""
        token_ids = token_ids.to(logits_SV.device)
        vocab = logits_SV.shape[1]
        counts = [vocab if n < 0 else min(n, vocab) for n in num]
        found: list[TokenLogprobs | None] = [None] * len(counts)
        for n in set(counts):
            rows = [row for row, count in enumerate(counts) if count == n]
            logits = logits_SV if len(rows) == len(counts) else logits_SV[rows]
            columns = self._ops.logprobs(logits, token_ids if len(rows) == len(counts) else token_ids[rows], n)
            chosen_ids = token_ids[rows].tolist()
            for row, token, chosen, rank, ids, tops in zip(rows, chosen_ids, *(c.tolist() for c in columns), strict=True):
                found[row] = TokenLogprobs([token, *ids], [chosen, *tops], [rank, *range(1, n + 1)])
        return [entry for entry in found if entry is not None]
