"""The operators by name: signatures, shapes, meaning. The only thing callers import from `kernels`.

Axis letters: T tokens (flat), R requests, H query heads, K kv heads, D head dim, M model dim, F ffn dim, E experts, V vocab,
N output and C input features of a linear.

On the CPU every activation is float32, contiguous in its last axis; weights and KV have their own dtypes. An operator is made
once (it holds weights, strides and the thread team) and then called with tensors. Every implementation is held to
`kernels/reference` by tests/conformance. Where an implementation rounds activations before multiplying (matrix tiles take bf16
operands), its capability says so.

Bitwise promise of a `batch_invariant` implementation: the result of a row depends on that row (and for attention on its
request's KV and its position) alone, never on T, R, chunking or the number of threads. Linears accumulate C in one fixed order; attention
cuts the context at absolute positions (chunks of 64 tokens, partitions of PARTITION_LEN) and merges partitions in order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from apportion.core.errors import InvalidParameter
from apportion.core.kv_spec import KVGroupSpec
from apportion.core.number_format import NumberFormat

PARTITION_LEN = 1024  # tokens of context one work item of attention walks with one running maximum
WEIGHT_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(slots=True)
class QuantizedWeight:
    """Rows [n, C] of a matrix as they are stored, whatever file they come from (kernels/reference/number_formats gives them meaning).

    codes: uint8 [n, C], one code each: the bits of a float8, or an integer in offset binary (0 is the least). scale: float32, one for each
    block of the format, `format.scale_shape(n, C)`. zero: of the shape of scale: uint8 zero points in the codes' offset binary, or float32
    minima. order: int32 [C], the input channel of each column. input_scale: float32 [1], of a static activation format.
    """

    format: NumberFormat
    codes: Tensor
    scale: Tensor
    zero: Tensor | None = None
    order: Tensor | None = None
    input_scale: Tensor | None = None


@dataclass(slots=True)
class RoundedRows:
    """An input of a linear as its scheme rounds it: codes [T, C] in a dtype that the implementation chooses, scales float32 [T, G].

    Without scales: rows that are not rounded.
    """

    codes: Tensor
    scales: Tensor | None

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape


class Rounding(Protocol):
    """How a linear wants its input, of implementations that round in a pass of its own: with what comes before in the same pass."""

    def __call__(self, x: Tensor) -> RoundedRows:
        """x [T, C], rows may be strided."""

    def rms_norm(self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> RoundedRows:
        """Of Ops.rms_norm, or with a residual of Ops.add_rms_norm."""

    def silu_mul(self, x: Tensor) -> RoundedRows: ...


@dataclass(frozen=True, slots=True)
class LinearSpec:
    """y[T, N] = x[T, C] @ w[N, C]^T + bias[N]. scheme: how w is stored and what x is rounded to (core/number_format); a dtype is one.

    gated (in floating point only): the first half of the N rows are gates, the rest ups: y[T, N / 2] = silu(gates) * ups, and neither half
    is ever stored.
    """

    out_features: int
    in_features: int
    scheme: str = "float32"
    bias: bool = False
    gated: bool = False

    @property
    def width(self) -> int:
        """Of y."""
        return self.out_features // 2 if self.gated else self.out_features


class Linear(Protocol):
    """A linear and its weight, in the layout its implementation likes best: a manifest's bytes are for one set of kernels.

    Floating point on the CPU: panels [N / 32][C / lanes][32][lanes], lanes = 4 // element_bytes; N and C are padded to multiples of 32
    with zeros; the bias (float32) follows the panels in the same buffer. Gated: the panels of gates and ups alternate, each half padded by
    itself.
    """

    spec: LinearSpec
    nbytes: int
    rounding: Rounding | None  # None: calls take tensors alone, and what they round they round while it is read

    def bind(self, buffer: Tensor) -> None:
        """Use `buffer` (uint8 [nbytes], 256-byte aligned) as storage; its content is kept: it may be already packed."""

    def load_rows(self, weight: Tensor | QuantizedWeight, row: int) -> None:
        """Pack weight [n, C] as output rows row..row+n: any float dtype for a floating-point scheme, else codes of the scheme's format.

        Where blocks of scales span several rows, `row` is a multiple of them.
        """

    def load_bias(self, bias: Tensor, row: int) -> None: ...

    def __call__(self, x: Any, out: Tensor | None = None) -> Tensor:
        """x [T, C] -> [T, spec.width] float32. x may be a view with a row stride, or RoundedRows that `rounding` made."""

    def rows(self, ids: Tensor, out: Tensor | None = None) -> Tensor:
        """Rows `ids` (int32 [T]) of the weight as float32 [T, C]: a tied embedding reads its packed table. Not of a gated one."""


@dataclass(frozen=True, slots=True)
class ExpertsSpec:
    """E experts of gate, up, down: y = sum over chosen e of p_e * down_e(silu(gate_e x) * up_e x).

    schemes: those of (gate, up, down) of each expert, since experts and projections may differ; a single entry means all experts alike.
    """

    num_experts: int
    hidden: int
    ffn: int
    schemes: tuple[tuple[str, str, str], ...] = (("float32", "float32", "float32"),)

    def __post_init__(self) -> None:
        if len(self.schemes) not in (1, self.num_experts):
            raise InvalidParameter(f"{len(self.schemes)} schemes were given for {self.num_experts} experts; give one, or one per expert.")

    def schemes_of(self, expert: int) -> tuple[str, str, str]:
        return self.schemes[expert if len(self.schemes) > 1 else 0]


class Experts(Protocol):
    spec: ExpertsSpec
    nbytes: int

    def bind(self, buffer: Tensor) -> None: ...

    def load(self, expert: int, projection: str, weight: Tensor | QuantizedWeight, row: int = 0) -> None:
        """projection: 'gate' or 'up' (weight [n, M], rows row..row+n of F) or 'down' (weight [n, F], rows of M)."""

    def __call__(self, x: Tensor, expert_ids: Tensor, expert_weights: Tensor) -> Tensor:
        """x [T, M], expert_ids int32 [T, k], expert_weights float32 [T, k] -> [T, M]; summed over k in the given order.

        An id of -1 is skipped (expert-parallel ranks).
        """


@dataclass(frozen=True, slots=True)
class RouteSpec:
    """How router logits become experts and weights.

    scoring: 'softmax' or 'sigmoid'. renormalize: divide the chosen weights by their sum. num_groups / top_groups: group-limited
    routing (DeepSeek-V2 section 2.1.2): only the experts of the best groups can be chosen, a group scoring as its best expert.
    """

    num_experts: int
    top_k: int
    scoring: str = "softmax"
    renormalize: bool = True
    num_groups: int = 1
    top_groups: int = 1
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """Paged attention of one layer group.

    rotary_dim: leading channels of each head that are rotated; interleaved: pairs are (2i, 2i+1) instead of (i, i + rotary_dim / 2).
    qk_norm_eps: epsilon of the per-head RMSNorm on q and k before rotation, None for none.
    """

    num_heads: int
    kv: KVGroupSpec
    scale: float
    rotary_dim: int
    interleaved: bool = False
    qk_norm_eps: float | None = None


class PagedAttention(Protocol):
    """Attention over blocks laid out as core/kv_spec says. One object per layer group and worker."""

    spec: AttentionSpec

    @property
    def generation(self) -> int:
        """Changes when the memory that plans lie in has moved."""

    def plan(
        self, query_start_loc: Tensor, seq_lens: Tensor, block_table: Tensor, num_requests: int, num_tokens: int, handle: Any = None
    ) -> Any:
        """A handle for `write` and `run`, valid while the tensors live: work items for the team. Once a step.

        handle: one from an earlier step, to be filled anew and returned: a recording that was made with it then replays this step.
        """

    def write(
        self,
        layer_offset: int,
        qkv: Tensor,
        positions: Tensor,
        cos_sin: Tensor,
        handle: Any,
        q_norm: Tensor | None = None,
        k_norm: Tensor | None = None,
        scales: Tensor | None = None,
    ) -> None:
        """qkv [T, (H + 2K) * D]: normalize (optional) and rotate q in place and k; store k and v of the T new tokens.

        positions int32 [T]; cos_sin float32 [P, rotary_dim]: cos in the first half, sin in the second. layer_offset: bytes
        of the layer inside a block (KVGroupSpec.layer_offset). scales float32 [2, K]: what keys and values are divided by where the
        format is scaled, None for 1.
        """

    @property
    def recomputed(self) -> Any:
        """Rows that left the range of a unified maximum, ever; int() of it waits for the device."""

    def unify(self, layer_offset: int, phi_H: Tensor | None) -> None:
        """Softmax of this layer under phi as the maximum of each head's scores, in base 2 (log2(e) times a score); NaN or None: online.

        A row that this loses is computed again, online, within the call. FlashDecoding++, arXiv:2311.01282, section 3.
        """

    def run(self, layer_offset: int, qkv: Tensor, out: Tensor, handle: Any, scales: Tensor | None = None) -> Tensor:
        """Causal attention of the rotated q in qkv over the stored context -> out [T, H * D]."""


class LatentAttention(Protocol):
    """MLA over a latent cache (DeepSeek-V2 section 2.1): keys are the latent and a shared rotated part, values the latent itself."""

    spec: AttentionSpec

    @property
    def generation(self) -> int: ...

    def plan(
        self, query_start_loc: Tensor, seq_lens: Tensor, block_table: Tensor, num_requests: int, num_tokens: int, handle: Any = None
    ) -> Any: ...

    def write(self, layer_offset: int, latent: Tensor, handle: Any, scales: Tensor | None = None) -> None:
        """latent [T, head_dim]: normalized latent followed by the rotated shared key. scales float32 [2, 1], both the same."""

    @property
    def recomputed(self) -> Any: ...

    def unify(self, layer_offset: int, phi_H: Tensor | None) -> None: ...

    def run(self, layer_offset: int, q: Tensor, out: Tensor, handle: Any, scales: Tensor | None = None) -> Tensor:
        """q [T, H, head_dim] (absorbed and rotated) -> out [T, H, v_head_dim]."""


@dataclass(slots=True)
class SamplingRows:
    """Parameters of R rows as arrays: float32 temperature (0 = greedy), top_p, min_p; int32 top_k (0 = all); int64 seed, position."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seed: Tensor
    position: Tensor


class Recording(Protocol):
    """Calls of one Ops and its objects, kept to be made again with the same arguments, addresses included: a step without Python.

    Inside `with recording:` every call is made and kept; what torch does there is not. Who records keeps all memory of the calls alive.
    """

    num_calls: int

    def __enter__(self) -> Any: ...
    def __exit__(self, *exception: object) -> None: ...
    def replay(self) -> None: ...


class Ops(Protocol):
    """The operators of one device, chosen once (`dispatch.select_ops`). Functional ones are plain methods."""

    name: str
    device: torch.device  # where every tensor lies that they are given, except a step's metadata (`plan`): the host brings that

    def recording(self) -> Recording | None:
        """A new, empty one; None where calls cannot be kept."""

    def linear(self, spec: LinearSpec) -> Linear: ...
    def experts(self, spec: ExpertsSpec) -> Experts: ...
    def paged_attention(self, spec: AttentionSpec, arena: Tensor) -> PagedAttention:
        """arena: the KV arena as uint8 [bytes]; block entries count 256-byte units from its start."""

    def latent_attention(self, spec: AttentionSpec, arena: Tensor) -> LatentAttention: ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
        """x [T, M] (rows may be strided), weight float32 [M] -> [T, M]: x / sqrt(mean(x^2) + eps) * weight."""

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
        """residual += x in place; returns rms_norm(residual)."""

    def silu_mul(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """x [T, 2F] -> silu(x[:, :F]) * x[:, F:]."""

    def rotate(self, x: Tensor, positions: Tensor, cos_sin: Tensor, interleaved: bool) -> None:
        """Rotate x [T, heads, rotary_dim] in place (rows and heads may be strided)."""

    def route(self, logits: Tensor, spec: RouteSpec) -> tuple[Tensor, Tensor]:
        """logits [T, E] -> expert ids int32 [T, k] (best first; ties to the lower id), weights float32 [T, k]."""

    def sample(self, logits: Tensor, rows: SamplingRows) -> Tensor:
        """logits float32 [R, V] -> token ids int32 [R].

        Greedy: the largest, ties to the lower id. Else: divide by temperature, keep the top_k largest, then the smallest set of the
        largest whose probability reaches top_p, then those with p >= min_p * p_max; u = uniform(seed, position); the token is the
        first, in id order, whose cumulative kept mass exceeds u * total. Sums are float64 in id order (in descending order for top_p).
        uniform: Philox4x32-10 with key (seed low, seed high) and counter (position low, position high, 0, 0), 32-bit words;
        its first word >> 8, times 2^-24.
        A row with a NaN, or whose largest logit is not finite, gives -1.
        """

    def apply_bitmask(self, logits: Tensor, rows: Tensor, masks: Tensor) -> None:
        """Exclude tokens in place: minus infinity where a bit is 0. logits float32 [R, V]; rows int32 [G]: which of R have a mask;
        masks uint8 [G, B], B >= V / 8, a bit per token, the lowest of a byte first."""

    def logprobs(self, logits: Tensor, token_ids: Tensor, top_n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """log-softmax of R rows: (logprob of token_ids [R], its rank int32 [R] from 1, top ids int32 [R, n], top logprobs [R, n])."""
