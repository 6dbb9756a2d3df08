"""One step of one model on one rank: batch, metadata, forward, the rows that need logits, sampling. Only what every model shares."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from apportion.attention.backend import AttentionBackend
from apportion.core.errors import InvalidInput
from apportion.core.schedule import ModelRunnerOutput, SchedulerOutput
from apportion.engine.decode_graphs import DecodeGraphs
from apportion.engine.forward_pass import ForwardPass
from apportion.engine.input_batch import InputBatch, StepInputs
from apportion.engine.prompt_reference import meet_reference
from apportion.engine.sampler import Sampler, SamplerOutput
from apportion.kernels.ops import Ops
from apportion.models.interface import CausalLM
from apportion.platforms.cpu import CpuPlatform
from apportion.platforms.platform import Fetched, Platform

PROMPT_LOGPROB_ELEMENTS = 1 << 22  # logits of a prompt held at once


@dataclass(slots=True, eq=False)
class Launched:
    """A step that is queued behind `before`. finish: takes in what the device has made once `fetched` is there."""

    output: ModelRunnerOutput
    before: Launched | None
    started: float = field(default_factory=time.perf_counter)
    ended: float = 0.0
    fetched: Fetched | None = None
    finish: Callable[[], None] | None = None

    @property
    def is_ready(self) -> bool:
        return (self.before is None or self.before.ended > 0) and (self.fetched is None or self.fetched.is_ready)

    def result(self) -> ModelRunnerOutput:
        """Waits for it, and for those before. execute_s: since it was launched, or the step before it ended."""
        if not self.ended:
            if self.before is not None:
                self.before.result()
                self.started = max(self.started, self.before.ended)
            if self.finish is not None:
                self.finish()
            self.ended = time.perf_counter()
            self.output.execute_s = self.ended - self.started
            self.before = self.finish = None
        return self.output


class ModelRunner:
    """backends: one per layer group, in the order of the model's kv groups; they hold the arena."""

    def __init__(self, model: CausalLM, backends: Sequence[AttentionBackend], ops: Ops, platform: Platform | None = None) -> None:
        spec = model.site.spec
        self.model, self._vocab = model, spec.vocab
        self._platform: Platform = platform or CpuPlatform()
        self._graphs = DecodeGraphs(self._platform.capture, model, backends) if self._platform.capture else None
        self.batch = InputBatch(len(backends), spec.vocab)
        self.forward = ForwardPass(model, tuple(backends), ops)
        self.sampler = Sampler(ops, self._platform.fetch)
        self._backends, self._recomputed = backends, 0
        self._last: Launched | None = None
        self._sampled = torch.zeros(0, dtype=torch.int32, device=ops.device)  # by row: the token that a step in flight samples

    def execute(self, step: SchedulerOutput) -> ModelRunnerOutput:
        return self.launch(step).result()

    def launch(self, step: SchedulerOutput) -> Launched:
        """Queue a step. Waits for the device only where requests want log-probabilities, hidden states, rules or a grammar."""
        output = ModelRunnerOutput(step.step_id, step.model, {request_id: [] for request_id in step.num_scheduled_tokens})
        launched = self._last = Launched(output, self._last)
        output.errors, sampled = self.batch.update(step), None
        if step.num_scheduled_tokens:
            inputs = self._feed(self.batch.build(step.num_scheduled_tokens))
            replayed = self._graphs.run(inputs) if self._graphs is not None else None
            hidden_TM, logits_TV = replayed if replayed is not None else (self.forward(inputs), None)
            if self.batch.num_prompt_logprobs:
                self._prompt_logprobs(inputs, hidden_TM, output)
            if self.batch.pooling_types:
                self._pool(inputs, hidden_TM, output)
            if len(inputs.sampled):
                sampled = self._sample(inputs, hidden_TM, logits_TV, step.grammar_mask, launched)
            recomputed = sum(backend.recomputed for backend in self._backends)
            counted = self._platform.fetch(recomputed) if isinstance(recomputed, Tensor) else recomputed
            launched.fetched = sampled.fetched if sampled is not None else self._platform.fetch(hidden_TM[:1, :1])
            launched.finish = partial(self._finish, inputs, output, sampled, counted)
        if launched.is_ready:
            launched.result()
        elif sampled is not None:
            self._keep(inputs, sampled.tokens_S)
        return launched

    def _feed(self, inputs: StepInputs) -> StepInputs:
        """The step's tokens and positions on the device, with the tokens that steps in flight sample."""
        inputs.token_ids_T, inputs.positions_T = map(self._platform.upload, (inputs.token_ids_T, inputs.positions_T))
        if len(inputs.fed):
            places = np.stack([inputs.query_start_loc[1:][inputs.fed] - 1, inputs.rows[inputs.fed]])
            place, row = self._platform.upload(torch.from_numpy(places))
            inputs.token_ids_T[place] = self._sampled[row]
        return inputs

    def _keep(self, inputs: StepInputs, tokens_S: Tensor) -> None:
        """For the next step to read, on the device."""
        missing = self.batch.num_rows - len(self._sampled)
        if missing:
            self._sampled = torch.nn.functional.pad(self._sampled, (0, missing))
        rows = self._platform.upload(torch.from_numpy(inputs.rows[inputs.sampled]))
        self._sampled.index_copy_(0, rows, tokens_S.clamp(min=0))

    def _sample(
        self, inputs: StepInputs, hidden_TM: Tensor, logits_TV: Tensor | None, masks: dict[str, bytes], launched: Launched
    ) -> SamplerOutput:
        batch = self.batch
        known = hidden_TM if logits_TV is None else logits_TV
        if len(inputs.logit_rows) < len(known):
            known = known[self._platform.upload(torch.from_numpy(inputs.logit_rows))]
        logits_SV = known if logits_TV is not None else self.model.compute_logits(known)
        extras = batch.extras(inputs)
        if launched.before is not None and any(row in batch.rules for _, row in extras):
            launched.before.result()  # rules look at every token before
        sampled_ids = [inputs.request_ids[i] for i in inputs.sampled]
        return self.sampler(
            logits_SV,
            batch.sampling_rows(inputs),
            {i: batch.rules[row] for i, row in extras if row in batch.rules},
            {i: masks[request_id] for i, request_id in enumerate(sampled_ids) if request_id in masks} if masks else {},
            {i: batch.num_logprobs[row] for i, row in extras if row in batch.num_logprobs},
        )

    def _finish(self, inputs: StepInputs, output: ModelRunnerOutput, sampled: SamplerOutput | None, counted: Fetched | int) -> None:
        recomputed = int(counted.result()) if isinstance(counted, Fetched) else counted
        output.softmax_rows_recomputed, self._recomputed = recomputed - self._recomputed, recomputed
        if sampled is None:
            return
        self.batch.append(inputs, sampled.token_ids)
        sampled_ids = [inputs.request_ids[i] for i in inputs.sampled]
        output.token_ids |= {request_id: [token] for request_id, token in zip(sampled_ids, sampled.token_ids.tolist(), strict=True)}
        output.logprobs |= {sampled_ids[i]: [logprobs] for i, logprobs in sampled.logprobs.items()}
        output.errors |= {sampled_ids[i]: sentence for i, sentence in sampled.errors.items()}
        output.token_ids |= {sampled_ids[i]: [] for i in sampled.errors}

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
