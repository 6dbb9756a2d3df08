"""One step of one model on one rank: batch, metadata, forward, the rows that need logits, sampling. Only what every model shares."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from apportion.attention.backend import AttentionBackend, AttentionMetadata, ForwardContext
from apportion.core.schedule import ModelRunnerOutput, SchedulerOutput
from apportion.engine.input_batch import InputBatch, StepInputs
from apportion.engine.sampler import Sampler
from apportion.kernels.ops import Ops
from apportion.models.interface import CausalLM

PROMPT_LOGPROB_ELEMENTS = 1 << 22  # logits of a prompt held at once


class ModelRunner:
    """backends: one per layer group, in the order of the model's kv groups; they hold the arena."""

    def __init__(self, model: CausalLM, backends: Sequence[AttentionBackend], ops: Ops) -> None:
        spec = model.site.spec
        self.model, self._backends, self._vocab = model, tuple(backends), spec.vocab
        self.batch = InputBatch(len(self._backends), spec.vocab)
        self.sampler = Sampler(ops)

    def execute(self, step: SchedulerOutput) -> ModelRunnerOutput:
        started = time.perf_counter()
        output = ModelRunnerOutput(step.step_id, step.model, {request_id: [] for request_id in step.num_scheduled_tokens})
        output.errors = self.batch.update(step)
        if step.num_scheduled_tokens:
            inputs = self.batch.build(step.num_scheduled_tokens)
            context = ForwardContext(inputs.positions_T, self._plan(inputs))
            hidden_TM = self.model.forward(inputs.token_ids_T, context)
            if self.batch.num_prompt_logprobs:
                self._prompt_logprobs(inputs, hidden_TM, output)
            if len(inputs.sampled):
                self._sample(inputs, hidden_TM, step.grammar_mask, output)
        output.execute_s = time.perf_counter() - started
        return output

    def _plan(self, inputs: StepInputs) -> tuple[AttentionMetadata, ...]:
        """The batch as each layer group sees it."""
        starts, lens = torch.from_numpy(inputs.query_start_loc), torch.from_numpy(inputs.seq_lens)
        num_requests, num_tokens = len(inputs.rows), len(inputs.token_ids_T)
        return tuple(
            backend.plan(AttentionMetadata(num_requests, num_tokens, starts, lens, table))
            for backend, table in zip(self._backends, inputs.block_tables, strict=True)
        )

    def _sample(self, inputs: StepInputs, hidden_TM: Tensor, masks: dict[str, bytes], output: ModelRunnerOutput) -> None:
        batch = self.batch
        all_rows = len(inputs.logit_rows) == len(hidden_TM)
        logits_SV = self.model.compute_logits(hidden_TM if all_rows else hidden_TM[torch.from_numpy(inputs.logit_rows)])
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

    def _prompt_logprobs(self, inputs: StepInputs, hidden_TM: Tensor, output: ModelRunnerOutput) -> None:
        """Every row of a prompt predicts the next prompt token; the logits of a long chunk are made piece by piece."""
        rows_at_once = max(1, PROMPT_LOGPROB_ELEMENTS // self._vocab)
        for index, request_id in enumerate(inputs.request_ids):
            num = self.batch.num_prompt_logprobs.get(request_id)
            if num is None:
                continue
            start, targets = self.batch.prompt_targets(inputs, index)
            found = output.prompt_logprobs[request_id] = []
            for first in range(0, len(targets), rows_at_once):
                chosen = torch.from_numpy(targets[first : first + rows_at_once])
                logits = self.model.compute_logits(hidden_TM[start + first : start + first + len(chosen)])
                found += self.sampler.logprobs(logits, chosen, [num] * len(chosen))
