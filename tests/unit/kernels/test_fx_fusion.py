"""Fused operators found in models of plain torch by torch.compile: where they are put, where not, and that tokens of the two agree."""

import pytest
import torch
from torch import nn

from apportion.bench.kernels import make_ops
from apportion.kernels import fx_fusion
from apportion.kernels.cpu import extension
from apportion.kernels.fx_fusion import fuse, fusing
from apportion.kernels.reference.ops import ReferenceOps


class Norm(nn.Module):
    def __init__(self, width, eps=1e-5):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.rand(width) + 0.5), eps

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


def turn(x, cos, sin):
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin


class Layer(nn.Module):
    def __init__(self, width=64, ffn=96, heads=4):
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(Norm(width) for _ in range(2))
        self.qkv, self.o = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.gate_up, self.down = nn.Linear(width, 2 * ffn, bias=False), nn.Linear(ffn, width, bias=False)

    def forward(self, hidden, cos, sin):
        q, k, v = self.qkv(self.norms[0](hidden)).view(len(hidden), 3, self.heads, -1).unbind(1)
        attended = nn.functional.scaled_dot_product_attention(
            *(t.transpose(0, 1) for t in (turn(q, cos, sin), turn(k, cos, sin), v)), is_causal=True
        )
        hidden = hidden + self.o(attended.transpose(0, 1).flatten(1))
        gate, up = self.gate_up(self.norms[1](hidden)).chunk(2, dim=-1)
        return hidden + self.down(nn.functional.silu(gate) * up)


class Model(nn.Module):
    def __init__(self, layers=2):
        super().__init__()
        self.layers, self.last = nn.ModuleList(Layer() for _ in range(layers)), Norm(64)

    def forward(self, hidden, cos, sin):
        for layer in self.layers:
            hidden = layer(hidden, cos, sin)
        return self.last(hidden)


@pytest.fixture
def counted(monkeypatch):
    counts = []
    monkeypatch.setattr(fx_fusion, "fuse", lambda graph, ops: counts.append(fuse(graph, ops)))
    yield counts
    torch.compiler.reset()


@pytest.mark.parametrize("kernels", ["reference", "cpu"])
def test_a_model_of_plain_torch_runs_over_the_fused_operators(counted, kernels):
    if kernels == "cpu" and not extension.available():
        pytest.skip("the CPU kernels are not built")
    ops = ReferenceOps() if kernels == "reference" else make_ops(1)
    torch.manual_seed(0)
    model, hidden, angles = Model(), torch.randn(7, 64), torch.randn(7, 1, 8).repeat(1, 1, 2)
    before = hidden.clone()
    with torch.no_grad():
        expected = model(hidden, angles.cos(), angles.sin())
        found = torch.compile(model, backend=fusing(ops))(hidden, angles.cos(), angles.sin())
    assert torch.allclose(found, expected, atol=1e-5)
    assert counted == [5 + 2 + 4], "five norms, two gates, queries and keys of two layers"
    assert torch.equal(hidden, before), "the caller's tensor is not a residual to write into"


def run(function, *inputs):
    with torch.no_grad():
        return torch.compile(function, backend=fusing(ReferenceOps()))(*inputs)


def test_a_residual_that_is_read_later_keeps_its_values(counted):
    norm, x = Norm(8), torch.randn(3, 8)

    def function(x):
        residual = x.sin()
        total = residual + x.cos()
        return norm(total) + total, residual, residual[:, :2]

    with torch.no_grad():
        for found, expected in zip(run(function, x), function(x), strict=True):
            assert torch.allclose(found, expected, atol=1e-6)
    assert counted == [1]


@pytest.mark.parametrize(
    "function",
    [
        lambda x, w: w * (x * torch.rsqrt(x.pow(2).mean(0, keepdim=True) + 1e-5)),
        lambda x, w: w * (x * torch.rsqrt(x.pow(4).mean(-1, keepdim=True) + 1e-5)),
        lambda x, w: w * (x * torch.rsqrt((x + 1).pow(2).mean(-1, keepdim=True) + 1e-5)),
        lambda x, w: nn.functional.silu(x[..., :3]) * x[..., 3:6],
        lambda x, w: nn.functional.silu(x.chunk(2, -1)[1]) * x.chunk(2, -1)[0],
        lambda x, w: x * w + torch.cat((x[..., 4:], -x[..., :4]), dim=-1) * w,
    ],
)
def test_what_is_merely_alike_stays_torch_s(counted, function):
    x, w = torch.randn(5, 8), torch.rand(8)
    assert torch.allclose(run(function, x, w), function(x, w)) and counted == [0]
