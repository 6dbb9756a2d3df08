"""An executor without a device. Its model's next token is a hash of the tokens it READS from KV memory through the block tables it was
sent, so that a wrong entry, a stale prefix hit or a block reused too early shows up as a wrong token."""

from __future__ import annotations

from collections import deque
from hashlib import blake2b

from apportion.core.errors import ExecutorDied
from apportion.core.kv_spec import UNIT_BYTES
from apportion.core.schedule import KVOpKind, ModelRunnerOutput
from apportion.engine.executor.executor import WeightsHandle

VOCAB = 1000
CELL = 8  # bytes a token takes in a block


def next_token(model, tokens_by_group):
    return int.from_bytes(blake2b(repr((model, tokens_by_group)).encode(), digest_size=4).digest()) % VOCAB


def visible(tokens, window):
    return tokens if window is None else tokens[-window:]


def sequential_run(model, groups, prompt, num_tokens, stop=()):
    """What the fake model says with no engine at all."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + num_tokens:
        tokens.append(next_token(model, [visible(tokens, g.sliding_window) for g in groups]))
        if tokens[-1] in stop:
            break
    return tokens[len(prompt) :]


def masked(token, mask):
    """What is sampled in place of `token` under a grammar's mask."""
    allowed = [t for t in range(VOCAB) if mask[t // 8] >> (t % 8) & 1]
    return allowed[token % len(allowed)]


class FakeExecutor:
    """memory: a bytearray shared by all lanes of an engine. rng: delays each step by a random number of polls when given.

    die_at: the steps (counted by `submit`) after which it dies, its queue unfinished or half done.
    """

    def __init__(self, memory, rng=None, die_at=(), bad_requests=()):
        self.memory, self.rng, self.die_at, self.bad_requests = memory, rng, set(die_at), set(bad_requests)
        self.is_alive, self.is_shut_down = True, False
        self.queue, self.models, self.requests, self.pooling = deque(), {}, {}, {}
        self.num_submits = 0
        self.steps = []

    def load_model(self, config, spec, kv_groups, weights=None):
        self._check()
        self.models[config.name] = kv_groups
        return weights or WeightsHandle(config.name, 0)

    def unload_model(self, name):
        self._check()
        del self.models[name]
        self.requests = {key: r for key, r in self.requests.items() if key[0] != name}

    def submit(self, step):
        self._check()
        self.queue.append((self.num_submits, step))
        self.steps.append(step)
        self.num_submits += 1
        return self.num_submits - 1

    def poll(self, timeout_s):
        self._check()
        if not self.queue or (self.rng is not None and self.rng.random() < 0.5):
            return []
        ticket, step = self.queue.popleft()
        output = self._run(step)
        if ticket in self.die_at:
            self.is_alive = False
            self._check()
        return [(ticket, output)]

    def shutdown(self):
        self.is_alive, self.is_shut_down = False, True

    def _check(self):
        if not self.is_alive:
            raise ExecutorDied("the fake executor is dead", "FakeError: told to die")

    def _run(self, step):
        model, groups = step.model, self.models[step.model]
        for request_id in step.finished_ids:
            self.requests.pop((model, request_id), None)
        for new in step.new_requests:
            self.requests[model, new.request_id] = (list(new.token_ids), [list(t) for t in new.block_tables])
            self.pooling[new.request_id] = new.pooling_params
        for known in step.cached_requests:
            tokens, tables = self.requests[model, known.request_id]
            tokens += known.new_token_ids
            for table, entries in zip(tables, known.new_blocks, strict=False):
                table += entries
            for table, dead in zip(tables, known.freed_blocks, strict=False):
                table[:dead] = [-1] * dead
        for op in step.kv_ops:
            assert op.kind in (KVOpKind.COPY, KVOpKind.MOVE)
            source, target = op.src * UNIT_BYTES, op.dst * UNIT_BYTES
            self.memory[target : target + op.num_bytes] = self.memory[source : source + op.num_bytes]
        starts = {r.request_id: r.num_computed_tokens for r in [*step.new_requests, *step.cached_requests]}
        output = ModelRunnerOutput(step.step_id, model, {})
        for request_id, count in step.num_scheduled_tokens.items():  # all writes of a step come before its reads, as in a batch
            tokens, tables = self.requests[model, request_id]
            for position in range(starts[request_id], starts[request_id] + count):
                for group, table in zip(groups, tables, strict=True):
                    self._cell(group, table, position)[:] = tokens[position].to_bytes(CELL)
        for request_id, count in step.num_scheduled_tokens.items():
            tokens, tables = self.requests[model, request_id]
            end = starts[request_id] + count
            start = starts[request_id]
            if request_id in self.bad_requests:
                output.errors[request_id] = "told to fail"
            elif (pooling := self.pooling[request_id]) is not None:  # a hidden state is the token it stands at
                rows = {"mean": range(start, end), "cls": range(start, int(start == 0)), "last": range(max(start, len(tokens) - 1), end)}
                chosen = [int.from_bytes(self._cell(groups[0], tables[0], p)) for p in rows[pooling.pooling_type]]
                if chosen:
                    output.pooled[request_id] = [float(sum(chosen))]
            elif end == len(tokens):
                seen = [(g, t, visible(range(end), g.sliding_window)) for g, t in zip(groups, tables, strict=True)]
                token = next_token(model, [[int.from_bytes(self._cell(g, t, p)) for p in positions] for g, t, positions in seen])
                mask = step.grammar_mask.get(request_id)
                tokens.append(token if mask is None else masked(token, mask))
                output.token_ids[request_id] = [tokens[-1]]
        return output

    def _cell(self, group, table, position):
        entry = table[position // group.block_size]
        assert entry >= 0, "a dead block is touched"
        start = entry * UNIT_BYTES + position % group.block_size * CELL
        return memoryview(self.memory)[start : start + CELL]
