"""From the scheduler's deltas to the tensors of a step.

Knows every request of one model on one worker as a row of arrays: tokens, block tables, computed counts, sampling parameters. A
step gathers its rows with a handful of array operations, whatever the number of requests. Knows nothing of models or kernels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from apportion.core.errors import InternalError, InvalidInput
from apportion.core.sampling_params import PromptReference
from apportion.core.schedule import CachedRequest, NewRequest, SchedulerOutput
from apportion.engine.sampler import LogitRules, has_rules
from apportion.kernels.ops import SamplingRows

# num_values: tokens whose values are known here. admission: which request of those that ever took the row
COUNTS = {"num_tokens": np.int32, "num_prompt_tokens": np.int32, "num_computed_tokens": np.int32, "num_values": np.int32}
COUNTS |= {"admission": np.int64, "has_extras": np.bool_}
SAMPLING = {"temperature": np.float32, "top_k": np.int32, "top_p": np.float32, "min_p": np.float32, "seed": np.int64}


@dataclass(slots=True)
class StepInputs:
    """One step: R requests, T tokens. Tensors are int32.

    rows [R]: where the batch keeps each request. sampled [S]: which of the R requests get a token, as their last known one is computed
    in this step. logit_rows [S]: the row of T that gives it. admissions [R]: a number for each request that ever took a row. fed: which
    of the R requests end in a token that an earlier step has yet to give.
    """

    request_ids: list[str]
    rows: np.ndarray
    seq_lens: np.ndarray
    sampled: np.ndarray
    logit_rows: np.ndarray
    query_start_loc: np.ndarray
    token_ids_T: Tensor
    positions_T: Tensor
    block_tables: tuple[Tensor, ...]
    admissions: np.ndarray
    fed: np.ndarray


class InputBatch:
    def __init__(self, num_groups: int, vocab: int) -> None:
        self._vocab = vocab
        self._row_of: dict[str, int] = {}
        self._num_admissions = 0
        self._free: list[int] = []
        self._arrays = {name: np.zeros(0, dtype) for name, dtype in (COUNTS | SAMPLING).items()}
        self._tokens = np.zeros((0, 256), np.int32)
        self._tables = [np.zeros((0, 16), np.int32) for _ in range(num_groups)]
        self._num_blocks = np.zeros((num_groups, 0), np.int32)
        self.rules: dict[int, LogitRules] = {}  # by row, for the few requests that have any
        self.num_logprobs: dict[int, int] = {}
        self.num_prompt_logprobs: dict[str, int] = {}
        self.pooling_types: dict[str, str] = {}
        self.prompt_references: dict[str, PromptReference] = {}

    # -- what the engine says ---------------------------------------------------------------------------------------------

    def update(self, step: SchedulerOutput) -> dict[str, str]:
        """Take in a step's news. Returns one sentence for each new request that cannot run here."""
        errors = {}
        for request_id in step.finished_ids:
            self._forget(request_id)
        for new in step.new_requests:
            try:
                self._admit(new)
            except InvalidInput as error:
                errors[new.request_id] = str(error)
                self.rules.pop(self._row_of[new.request_id], None)
        computed = self._arrays["num_computed_tokens"]
        for known in step.cached_requests:
            row = self._row(known.request_id)
            computed[row] = known.num_computed_tokens
            if known.new_token_ids or known.new_blocks or known.freed_blocks:
                self._extend(row, known)
        return errors

    def _admit(self, new: NewRequest) -> None:
        self._forget(new.request_id)
        if not self._free:
            self._grow_rows()
        row = self._row_of[new.request_id] = self._free.pop()
        params, arrays = new.sampling_params, self._arrays
        if params.seed is None and not params.is_greedy:
            raise InternalError(f"request {new.request_id!r} samples at temperature {params.temperature:g} without a seed")
        self._num_admissions += 1
        num_tokens = len(new.token_ids)
        values = (num_tokens, new.num_prompt_tokens, new.num_computed_tokens, num_tokens, self._num_admissions, False)
        values += (params.temperature, params.top_k, params.top_p, params.min_p, params.seed or 0)
        for array, value in zip(arrays.values(), values, strict=True):
            array[row] = value
        self._ensure_length(len(new.token_ids))
        self._tokens[row, : len(new.token_ids)] = new.token_ids
        self._num_blocks[:, row] = 0
        for group, entries in enumerate(new.block_tables):
            self._append_blocks(group, row, entries)
        if params.logprobs is not None:
            self.num_logprobs[row] = params.logprobs
        if params.prompt_logprobs is not None:
            self.num_prompt_logprobs[new.request_id] = params.prompt_logprobs
        if new.pooling_params is not None:
            self.pooling_types[new.request_id] = new.pooling_params.pooling_type
        if params.prompt_reference is not None:
            self.prompt_references[new.request_id] = params.prompt_reference
        if has_rules(params):
            prompt, output = new.token_ids[: new.num_prompt_tokens], new.token_ids[new.num_prompt_tokens :]
            self.rules[row] = LogitRules(params, prompt, output, new.eos_token_ids, self._vocab)
        arrays["has_extras"][row] = row in self.rules or row in self.num_logprobs

    def _extend(self, row: int, known: CachedRequest) -> None:
        if known.new_token_ids:
            start = int(self._arrays["num_tokens"][row])
            self._ensure_length(start + len(known.new_token_ids))
            self._tokens[row, start : start + len(known.new_token_ids)] = known.new_token_ids
            for count in ("num_tokens", "num_values"):
                self._arrays[count][row] += len(known.new_token_ids)
            if row in self.rules:
                for token in known.new_token_ids:
                    self.rules[row].append(token)
        for group, entries in enumerate(known.new_blocks):
            if entries:
                self._append_blocks(group, row, entries)
        for group, dead in enumerate(known.freed_blocks):
            self._tables[group][row, :dead] = -1

    def _forget(self, request_id: str) -> None:
        row = self._row_of.pop(request_id, None)
        if row is not None:
            self._free.append(row)
            self.rules.pop(row, None)
            self.num_logprobs.pop(row, None)
            self.num_prompt_logprobs.pop(request_id, None)
            self.pooling_types.pop(request_id, None)
            self.prompt_references.pop(request_id, None)

    def _row(self, request_id: str) -> int:
        try:
            return self._row_of[request_id]
        except KeyError:
            raise InternalError(f"request {request_id!r} was scheduled on a worker that does not know it") from None

    # -- what a step computes ---------------------------------------------------------------------------------------------

    def build(self, num_scheduled: Mapping[str, int]) -> StepInputs:
        rows = np.fromiter(map(self._row, num_scheduled), np.int64, len(num_scheduled))
        counts = np.fromiter(num_scheduled.values(), np.int32, len(num_scheduled))
        arrays = self._arrays
        computed = arrays["num_computed_tokens"][rows]
        seq_lens = computed + counts
        arrays["num_computed_tokens"][rows] = seq_lens
        query_start_loc = np.zeros(len(rows) + 1, np.int32)
        np.cumsum(counts, out=query_start_loc[1:])
        self._ensure_length(int(seq_lens.max()) + 1)
        if query_start_loc[-1] == len(rows):
            positions, token_ids = computed, self._tokens[rows, computed]
        else:
            positions = np.arange(query_start_loc[-1], dtype=np.int32) + np.repeat(computed - query_start_loc[:-1], counts)
            token_ids = self._tokens[np.repeat(rows, counts), positions]
        samples = seq_lens >= arrays["num_tokens"][rows]
        if self.pooling_types:
            samples &= np.fromiter((request_id not in self.pooling_types for request_id in num_scheduled), np.bool_, len(rows))
        sampled = np.flatnonzero(samples)
        arrays["num_tokens"][rows[sampled]] = seq_lens[sampled] + 1  # a next step may be built before `append` tells which
        widths = self._num_blocks[:, rows].max(axis=1, initial=1)
        return StepInputs(
            request_ids=list(num_scheduled),
            rows=rows,
            seq_lens=seq_lens,
            sampled=sampled,
            logit_rows=query_start_loc[1:][sampled] - 1,
            query_start_loc=query_start_loc,
            token_ids_T=torch.from_numpy(token_ids),
            positions_T=torch.from_numpy(positions),
            block_tables=tuple(torch.from_numpy(t[:, :w].take(rows, axis=0)) for t, w in zip(self._tables, widths, strict=True)),
            admissions=arrays["admission"][rows],
            fed=np.flatnonzero(seq_lens > arrays["num_values"][rows]),
        )

    def sampling_rows(self, step: StepInputs) -> SamplingRows:
        rows = step.rows[step.sampled]
        columns = {name: torch.from_numpy(self._arrays[name][rows]) for name in SAMPLING}
        return SamplingRows(**columns, position=torch.from_numpy(step.seq_lens[step.sampled].astype(np.int64)))

    def extras(self, step: StepInputs) -> list[tuple[int, int]]:
        """(index among the sampled, row) of requests with rules or log-probabilities; empty in the usual case."""
        rows = step.rows[step.sampled]
        return [(int(i), int(rows[i])) for i in np.flatnonzero(self._arrays["has_extras"][rows])]

    def prompt_targets(self, step: StepInputs, index: int) -> tuple[int, int, np.ndarray]:
        """Of request `index` of the step: its first row of T, and position and ids of the prompt tokens that it and the next predict."""
        row, start, stop = step.rows[index], int(step.query_start_loc[index]), int(step.query_start_loc[index + 1])
        first = int(step.seq_lens[index]) - (stop - start) + 1
        last = min(int(step.seq_lens[index]) + 1, int(self._arrays["num_prompt_tokens"][row]))
        return start, first, self._tokens[row, first:last].copy()

    def pooled_rows(self, step: StepInputs) -> list[tuple[str, slice]]:
        """(request id, the rows of T to sum) of each request whose hidden states this step brings."""
        found = []
        for index, request_id in enumerate(step.request_ids):
            kind = self.pooling_types.get(request_id)
            if kind is None:
                continue
            start, stop, end = int(step.query_start_loc[index]), int(step.query_start_loc[index + 1]), int(step.seq_lens[index])
            if kind == "mean":
                found.append((request_id, slice(start, stop)))
            elif kind == "cls" and end == stop - start:
                found.append((request_id, slice(start, start + 1)))
            elif kind == "last" and end == int(self._arrays["num_tokens"][step.rows[index]]):
                found.append((request_id, slice(stop - 1, stop)))
        return found

    @property
    def num_rows(self) -> int:
        return len(self._tokens)

    def append(self, step: StepInputs, token_ids: np.ndarray) -> None:
        """The step sampled token_ids [S]; steps come in order. Requests that have left their row meanwhile are passed over."""
        here = self._arrays["admission"][step.rows[step.sampled]] == step.admissions[step.sampled]
        rows, ends, token_ids = step.rows[step.sampled][here], step.seq_lens[step.sampled][here], token_ids[here]
        self._tokens[rows, ends] = token_ids
        self._arrays["num_values"][rows] = ends + 1
        if self.rules:
            for row, token in zip(rows.tolist(), token_ids.tolist(), strict=True):
                if row in self.rules:
                    self.rules[row].append(token)

    # -- storage ----------------------------------------------------------------------------------------------------------

    def _append_blocks(self, group: int, row: int, entries: Sequence[int]) -> None:
        start = int(self._num_blocks[group, row])
        stop = start + len(entries)
        table = self._tables[group]
        if stop > table.shape[1]:
            wider = np.full((len(table), max(stop, 2 * table.shape[1])), -1, np.int32)
            wider[:, : table.shape[1]] = table
            table = self._tables[group] = wider
        table[row, start:stop] = entries
        self._num_blocks[group, row] = stop

    def _ensure_length(self, length: int) -> None:
        if length >= self._tokens.shape[1]:
            grown = np.zeros((len(self._tokens), max(length + 1, 2 * self._tokens.shape[1])), np.int32)
            grown[:, : self._tokens.shape[1]] = self._tokens
            self._tokens = grown

    def _grow_rows(self) -> None:
        size = len(self._tokens)
        more = max(16, size)
        self._free.extend(reversed(range(size, size + more)))
        self._tokens = np.pad(self._tokens, ((0, more), (0, 0)))
        self._tables = [np.pad(table, ((0, more), (0, 0)), constant_values=-1) for table in self._tables]
        self._num_blocks = np.pad(self._num_blocks, ((0, 0), (0, more)))
        self._arrays = {name: np.pad(array, (0, more)) for name, array in self._arrays.items()}
