"""The messages of the executor seam: what one step is, and what came of it. Plain data, picklable, no torch.

A step is a token count per request; there is no prefill flag. `SchedulerOutput` is a delta: a request is described in full
when a lane sees it for the first time (or again, after a move, a preemption or a replay), and by what changed afterwards.
Logits never cross: sampling happens in the worker.

A worker does, in this order: forget `finished_ids`; take in `new_requests` (one with a known id replaces it) and `cached_requests`;
run `kv_ops`; compute. A row of n tokens stands at positions num_computed_tokens .. num_computed_tokens + n - 1. It samples exactly when
the row reaches the last token the worker knows of the request (its own samples count: with two steps in flight the second reads the
first one's sample, which the scheduler has not seen). A step may carry no rows, only `kv_ops`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from apportion.core.pooling_params import PoolingParams
from apportion.core.sampling_params import SamplingParams


@dataclass(slots=True)
class NewRequest:
    """A request in full.

    token_ids: every token known so far, prompt first. block_tables: per layer group, entries in units of 256 bytes from the
    arena's base; an entry of -1 lies wholly behind the group's window. num_computed_tokens: tokens whose KV is already stored.
    eos_token_ids: what ends the request by itself, held back until min_tokens. pooling_params: set where hidden states are wanted; such a
    request samples nothing.
    """

    request_id: str
    token_ids: list[int]
    num_prompt_tokens: int
    num_computed_tokens: int
    sampling_params: SamplingParams
    block_tables: tuple[list[int], ...]
    adapter_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pooling_params: PoolingParams | None = None


@dataclass(slots=True)
class CachedRequest:
    """What changed in a request that the lane already knows.

    num_computed_tokens: where this step's row starts; steps still in flight are counted as done.
    new_token_ids: tokens sampled elsewhere that this lane has not seen (empty in the usual case: the lane sampled them).
    new_blocks: per layer group, entries appended to the table; () when none was. freed_blocks: per group, how many leading entries
    are dead by now, all told; () when that did not change.
    """

    request_id: str
    num_computed_tokens: int
    new_token_ids: Sequence[int] = ()
    new_blocks: tuple[list[int], ...] = ()
    freed_blocks: tuple[int, ...] = ()


class KVOpKind(StrEnum):
    COPY = "copy"  # copy bytes; the source stays
    MOVE = "move"  # copy bytes; the source is drained after the step
    QUANTIZE = "quantize"  # re-store a block in another format (a position-defined transition)


@dataclass(slots=True, frozen=True)
class KVOp:
    """Executed by the worker before the step's forward pass. `src` and `dst` are arena entries (256-byte units)."""

    kind: KVOpKind
    group: int
    src: int
    dst: int
    num_bytes: int


@dataclass(slots=True)
class SchedulerOutput:
    """One step of one model on one lane. `num_scheduled_tokens` is ordered: rows of the batch come in that order."""

    step_id: int
    model: str
    num_scheduled_tokens: dict[str, int]
    new_requests: list[NewRequest] = field(default_factory=list)
    cached_requests: list[CachedRequest] = field(default_factory=list)
    finished_ids: list[str] = field(default_factory=list)  # forget these (finished, aborted, moved or preempted)
    kv_ops: list[KVOp] = field(default_factory=list)
    draft_tokens: dict[str, list[int]] = field(default_factory=dict)
    grammar_mask: dict[str, bytes] = field(default_factory=dict)  # of rows that sample: one bit per token, lowest of a byte first

    @property
    def total_tokens(self) -> int:
        return sum(self.num_scheduled_tokens.values())


@dataclass(slots=True)
class TokenLogprobs:
    """Log-probabilities at one position: the chosen token first, then the top ones, each with its rank (1 = most likely).

    kl: KL(reference || model) in nats over the whole vocabulary, where the request names a reference to be compared with.
    """

    token_ids: list[int]
    logprobs: list[float]
    ranks: list[int]
    kl: float | None = None


@dataclass(slots=True)
class ModelRunnerOutput:
    """What a step produced. `token_ids` holds 0..n sampled tokens per request (0 while a prompt is still being computed)."""

    step_id: int
    model: str
    token_ids: dict[str, list[int]]
    logprobs: dict[str, list[TokenLogprobs]] = field(default_factory=dict)
    prompt_logprobs: dict[str, list[TokenLogprobs]] = field(default_factory=dict)  # of this chunk's positions
    num_accepted_drafts: dict[str, int] = field(default_factory=dict)
    pooled: dict[str, list[float]] = field(default_factory=dict)  # this chunk's part: the sum of its rows, or the row asked for
    errors: dict[str, str] = field(default_factory=dict)  # request id -> one sentence; the others go on
    execute_s: float = 0.0
    softmax_rows_recomputed: int = 0
