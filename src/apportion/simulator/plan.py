"""A strategy for a decoder in a dozen numbers, and the annotated tree it stands for: what the command line and searches speak in."""

from __future__ import annotations

from dataclasses import dataclass

from apportion.core.errors import InvalidParameter
from apportion.core.model_spec import ModelSpec
from apportion.simulator import presets
from apportion.simulator.cluster import Cluster
from apportion.simulator.compiler import compile
from apportion.simulator.execution_graph import ExecutionGraph
from apportion.simulator.models.transformer import transformer
from apportion.simulator.ops import ITEMSIZE, Model
from apportion.simulator.strategy_tree import ORDERS, StrategyTree

RECOMPUTE = ("none", "selective", "full")


@dataclass(frozen=True)
class Workload:
    """What is trained: a decoder, sequences of seq_len, `batch` of them per step. The flags are `models.transformer`'s."""

    spec: ModelSpec
    batch: int
    seq_len: int
    gated: bool = True
    fused_attention: bool = True
    dropout: bool = False

    def model(self, batch: int | None = None, num_layers: int | None = None) -> Model:
        from dataclasses import replace

        layers = self.spec.num_layers if num_layers is None else num_layers
        spec = replace(self.spec, num_layers=layers, windows=(self.spec.windows or (None,))[:1] * layers)
        return transformer(
            spec, batch or self.batch, self.seq_len, gated=self.gated, fused_attention=self.fused_attention, dropout=self.dropout
        )


@dataclass(frozen=True)
class Plan:
    """pp, dp, tp: sizes of the mesh, tp nearest. chunks: pipeline stages of a rank (interleaved). recompute: none, selective (the core of
    attention) or full (whole layers). grad_dtype, bucket_mb: as the strategy tree. overlap_gradients: reduced while the backward runs.
    split_sends: pipeline messages are cut over tp, as Megatron's scatter-gather.
    """

    pp: int = 1
    dp: int = 1
    tp: int = 1
    num_micro_batches: int = 1
    schedule: str = "1f1b"
    chunks: int = 1
    zero: int = 0
    recompute: str = "none"
    sequence_parallel: bool = False
    grad_dtype: str | None = None
    bucket_mb: float = 25.0
    overlap_gradients: bool = True
    split_sends: bool = False

    def __post_init__(self) -> None:
        if self.recompute not in RECOMPUTE:
            raise InvalidParameter(f"unknown recompute {self.recompute!r}; known: {', '.join(RECOMPUTE)}")
        if self.schedule not in ORDERS:
            raise InvalidParameter(f"unknown schedule {self.schedule!r}; known: {', '.join(ORDERS)}")
        if self.zero not in range(4):
            raise InvalidParameter(f"ZeRO has stages 1, 2 and 3, not {self.zero}")
        if self.grad_dtype is not None and self.grad_dtype not in ITEMSIZE:
            raise InvalidParameter(f"unknown grad_dtype {self.grad_dtype!r}; known: {', '.join(ITEMSIZE)}")
        if self.bucket_mb <= 0:
            raise InvalidParameter(f"bucket_mb must be positive, got {self.bucket_mb:g}")
        for name in ("pp", "dp", "tp", "num_micro_batches", "chunks"):
            if getattr(self, name) < 1:
                raise InvalidParameter(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def num_devices(self) -> int:
        return self.pp * self.dp * self.tp

    def micro_batch(self, batch: int) -> int:
        """Samples of one replica in one micro-batch. Error: InvalidParameter where the batch does not divide."""
        parts = self.dp * self.num_micro_batches
        if batch % parts:
            raise InvalidParameter(f"a batch of {batch} cannot be cut into {self.num_micro_batches} micro-batches of {self.dp} replicas")
        return batch // parts


def strategy(model: Model, num_layers: int, plan: Plan, cluster: Cluster) -> StrategyTree:
    """The annotated tree of a plan for a model of `models.transformer`."""
    tree = StrategyTree(model)
    tree.at("").split(b="dp")
    presets.pipeline(tree, cluster.mesh(pp=plan.pp, dp=plan.dp, tp=plan.tp), num_layers, chunks=plan.chunks)
    presets.tensor_parallel(tree, sequence_parallel=plan.sequence_parallel)
    if plan.zero:
        presets.zero(tree, plan.zero)
    if plan.recompute == "full":
        tree.at("layers.*").recompute()
    elif plan.recompute == "selective":
        tree.at("layers.*.attn.core").recompute()
    tree.bucket_mb, tree.grad_dtype = plan.bucket_mb, plan.grad_dtype
    tree.schedule(plan.num_micro_batches, "interleaved" if plan.chunks > 1 else plan.schedule)
    return tree


def fine(workload: Workload, plan: Plan, cluster: Cluster, *, optimizer: str = "adam") -> ExecutionGraph:
    """Every operator of every layer, device and micro-batch."""
    model = workload.model()
    return compile(model, strategy(model, workload.spec.num_layers, plan, cluster), cluster, optimizer=optimizer)
