"""One step of one model on one rank: batch, metadata, forward, the rows that need logits, sampling. Only what every model shares."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from apportion.attention.backend import AttentionBackend
from apportion.core.errors import InvalidInput
from apportion.core.schedule import ModelRunnerOutput, SchedulerOutput
from apportion.engine.decode_graphs import DecodeGraphs
from apportion.engine.forward_pass import ForwardPass
from apportion.engine.input_batch import InputBatch, StepInputs
from apportion.engine.prompt_reference import meet_reference
from apportion.engine.sampler import Sampler
from apportion.kernels.ops import Ops
from apportion.models.interface import CausalLM
from apportion.platforms.platform import Captured

PROMPT_LOGPROB_ELEMENTS = 1 << 22  # logits of a prompt held at once


class ModelRunner:
    """backends: one per layer group, in the order of the model's kv groups; they hold the arena. capture: the platform's or None."""

    def __init__(
        self,
        model: CausalLM,
        backends: Sequence[AttentionBackend],
        ops: Ops,
        capture: Callable[[Callable[[], Any]], Captured] | None = None,
    ) -> None:
        spec = model.site.spec
        self.model, self._vocab = model, spec.vocab
        self._device = ops.device
        self._graphs = DecodeGraphs(capture, model, backends) if capture else None
        self.batch = InputBatch(len(backends), spec.vocab)
        self.forward = ForwardPass(model, tuple(backends), ops)
        self.sampler = Sampler(ops)
        self._backends, self._recomputed = backends, 0

    def execute(self, step: SchedulerOutput) -> ModelRunnerOutput:
        started = time.perf_counter()
        output = ModelRunnerOutput(step.step_id, step.model, {request_id: [] for request_id in step.num_scheduled_tokens})
        output.errors = self.batch.update(step)
        if step.num_scheduled_tokens:
            inputs = self.batch.build(step.num_scheduled_tokens)
            replayed = self._graphs.run(inputs) if self._graphs is not None else None
            hidden_TM, logits_TV = replayed if replayed is not None else (self.forward(inputs), None)
            if self.batch.num_prompt_logprobs:
                self._prompt_logprobs(inputs, hidden_TM, output)
            if self.batch.pooling_types:
                self._pool(inputs, hidden_TM, output)
            if len(inputs.sampled):
                self._sample(inputs, hidden_TM, logits_TV, step.grammar_mask, output)
            recomputed = sum(backend.recomputed for backend in self._backends)
            output.softmax_rows_recomputed, self._recomputed = recomputed - self._recomputed, recomputed
        output.execute_s = time.perf_counter() - started
        return output

    def _sample(
        self, inputs: StepInputs, hidden_TM: Tensor, logits_TV: Tensor | None, masks: dict[str, bytes], output: ModelRunnerOutput
    ) -> None:
        batch = self.batch
        known = hidden_TM if logits_TV is None else logits_TV
        if len(inputs.logit_rows) < len(known):
            known = known[torch.from_numpy(inputs.logit_rows).to(self._device)]
        logits_SV = known if logits_TV is not None else self.model.compute_logits(known)
        extras = batch.extras(inputs)
        sampled_ids = [inputs.request_ids[i] for i in inputs.sampled]
        result = self.sampler(
            logits_SV,
            batch.sampling_rows(inputs),
            {i: batch.rules[row] for i, row in extras if row in batch.rules},
            {i: masks[request_id] for i, request_id in enumerate(sampled_ids) if request_id in masks} if masks else {},
            {i: batch.num_logprobs[row] for i, row in extras if row in batch.num_logprobs},
        )
        batch.append(inputs, inputs.sampled, result.token_ids)
        for request_id, token in zip(sampled_ids, result.token_ids.tolist(), strict=True):
            output.token_ids[request_id] = [token]
        for i, logprobs in result.logprobs.items():
            output.logprobs[sampled_ids[i]] = [logprobs]
        for i, sentence in result.errors.items():
            output.token_ids[sampled_ids[i]] = []
            output.errors[sampled_ids[i]] = sentence

    def _pool(self, inputs: StepInputs, hidden_TM: Tensor, output: ModelRunnerOutput) -> None:
        for request_id, rows in self.batch.pooled_rows(inputs):
            part = hidden_TM[rows].double().sum(dim=0)
            if part.isfinite().all():
                output.pooled[request_id] = part.tolist()
            else:
                output.errors[request_id] = "the model gave NaN or infinite hidden states; the request was stopped"

    def _prompt_logprobs(self, inputs: StepInputs, hidden_TM: Tensor, output: ModelRunnerOutput) -> None:
        """Every row of a prompt predicts the next prompt token; the logits of a long chunk are made piece by piece."""
        rows_at_once = max(1, PROMPT_LOGPROB_ELEMENTS // self._vocab)
        for index, request_id in enumerate(inputs.request_ids):
            num = self.batch.num_prompt_logprobs.get(request_id)
            if num is None:
                continue
            start, position, targets = self.batch.prompt_targets(inputs, index)
            reference = self.batch.prompt_references.get(request_id)
            found = output.prompt_logprobs[request_id] = []
            for first in range(0, len(targets), rows_at_once):
                chosen = torch.from_numpy(targets[first : first + rows_at_once])
                logits = self.model.compute_logits(hidden_TM[start + first : start + first + len(chosen)])
                entries = self.sampler.logprobs(logits, chosen, [num] * len(chosen))
                found += entries
                if reference is not None:
                    try:
                        meet_reference(reference, position + first, logits, entries)
                    except InvalidInput as error:
                        output.errors[request_id] = str(error)
                        break
