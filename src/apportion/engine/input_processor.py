"""What a caller asks for, as requests of one model: prompt to tokens, parameters checked against the vocabulary, seeds drawn."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from numbers import Integral

from apportion.core.errors import InternalError, InvalidParameter, InvalidRequest
from apportion.core.grammar import Grammar
from apportion.core.model_spec import ModelSpec
from apportion.core.pooling_params import PoolingParams
from apportion.core.request import Request
from apportion.core.sampling_params import MAX_SEED, SamplingParams
from apportion.processor.tokenizer import Tokenizer


class InputProcessor:
    """seed: of the generator that draws seeds for requests that name none, so that a run can be repeated."""

    def __init__(self, model: str, spec: ModelSpec, max_model_len: int, tokenizer: Tokenizer | None, seed: int = 0) -> None:
        self.model, self.spec, self.max_model_len, self.tokenizer = model, spec, max_model_len, tokenizer
        self.eos_token_ids = frozenset(spec.eos_token_ids)
        if not self.eos_token_ids and tokenizer is not None and tokenizer.eos_token_id is not None:
            self.eos_token_ids = frozenset({tokenizer.eos_token_id})
        self._seeds = random.Random(seed)

    def make_requests(
        self,
        request_id: str,
        prompt: str | Sequence[int],
        params: SamplingParams,
        *,
        priority: int | None = None,
        add_special_tokens: bool = True,
        start_grammar: Callable[[], Grammar] | None = None,
    ) -> list[Request]:
        """The n sequences of one prompt (text or token ids). start_grammar: a fresh state of what `structured_outputs` was compiled to.

        Errors: InvalidRequest for a prompt that is empty or outside the vocabulary, InvalidParameter for token ids outside it.
        """
        token_ids = self._truncate(self._token_ids(prompt, add_special_tokens), params.truncate_prompt_tokens)
        if not token_ids:
            raise InvalidRequest("the prompt is empty; give at least one token")
        if (params.structured_outputs is None) != (start_grammar is None):
            raise InternalError(f"request {request_id!r}: structured_outputs and a compiled grammar come together")
        params = self._complete(params)
        return [
            Request(
                request_id=request_id if params.n == 1 else f"{index}_{request_id}",
                model=self.model,
                prompt_token_ids=token_ids,
                sampling_params=params if params.n == 1 else replace(params, n=1, seed=_nth_seed(params.seed, index)),
                eos_token_ids=self.eos_token_ids,
                priority=params.priority if priority is None else priority,
                grammar=start_grammar() if start_grammar else None,
            )
            for index in range(params.n)
        ]

    def make_pooling_request(
        self, request_id: str, prompt: str | Sequence[int], params: PoolingParams, *, priority: int = 0, add_special_tokens: bool = True
    ) -> Request:
        """A request for hidden states. Errors: InvalidRequest."""
        token_ids = self._token_ids(prompt, add_special_tokens)
        limit = params.truncate_prompt_tokens
        if limit is not None:
            token_ids = token_ids[-(self.max_model_len if limit == -1 else limit) :]
        if not token_ids:
            raise InvalidRequest("the prompt is empty; give at least one token")
        greedy = SamplingParams(temperature=0.0, max_tokens=1)
        return Request(request_id, self.model, token_ids, greedy, priority=priority, pooling_params=params)

    def _token_ids(self, prompt: str | Sequence[int], add_special_tokens: bool) -> list[int]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise InvalidRequest(f"model {self.model!r} has no tokenizer: give prompt_token_ids")
            prompt = self.tokenizer.encode(prompt, add_special_tokens)  # which may know more tokens than the model
        for position, token in enumerate(prompt):
            if not isinstance(token, Integral) or isinstance(token, bool):  # also numpy's
                raise InvalidRequest(f"prompt token {position} is {token!r}; token ids are integers")
            if not 0 <= token < self.spec.vocab:
                raise InvalidRequest(f"prompt token {position} is {token}, outside the vocabulary of {self.spec.vocab} tokens")
        return [int(token) for token in prompt]

    def _truncate(self, token_ids: list[int], limit: int | None) -> list[int]:
        if limit is None:
            return token_ids
        return token_ids[-(self.max_model_len - 1 if limit == -1 else limit) :]

    def _complete(self, params: SamplingParams) -> SamplingParams:
        """A copy with bad_words as tokens and a seed; the caller's own is never written to."""
        self._check_ids("stop_token_ids", params.stop_token_ids or ())
        self._check_ids("allowed_token_ids", params.allowed_token_ids or ())
        self._check_ids("logit_bias", params.logit_bias or ())
        seed = params.seed
        if seed is None and not params.is_greedy:
            seed = self._seeds.randrange(2**63)
        params = replace(params, seed=seed, structured_outputs=None)  # workers are sent masks, never a grammar
        if not params.bad_words:
            return params
        if self.tokenizer is None:
            raise InvalidParameter(f"bad_words need a tokenizer, and model {self.model!r} has none")
        spellings = self.tokenizer.bad_words_token_ids(params.bad_words)
        can_come = [ids for ids in spellings if max(ids) < self.spec.vocab]
        return replace(params, bad_words_token_ids=can_come)

    def _check_ids(self, name: str, ids: Iterable[int]) -> None:
        for token in ids:
            if token >= self.spec.vocab:
                raise InvalidParameter(f"{name} names token {token}, outside the vocabulary of {self.spec.vocab} tokens")


def _nth_seed(seed: int | None, index: int) -> int | None:
    return None if seed is None else (seed + index + MAX_SEED) % (2 * MAX_SEED + 1) - MAX_SEED
