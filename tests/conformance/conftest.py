"""Every implementation that dispatch knows, one after the other. A skip always quotes a declared capability.

Triton's kernels run in its interpreter where there is no GPU.
"""

import pytest
import torch

from apportion.core.kv_spec import KV_FORMATS
from apportion.kernels.dispatch import implementations
from apportion.kernels.ops import WEIGHT_DTYPES
from apportion.kernels.reference.ops import ReferenceOps
from apportion.platforms.platform import ComputeShare, select_platform
from tests.conformance.on_device import OnDevice


@pytest.fixture(params=implementations(), ids=lambda i: i.name)
def implementation(request):
    if request.param.unavailable:
        pytest.skip(f"{request.param.name} is unavailable: {request.param.unavailable}")
    return request.param


@pytest.fixture
def capability(implementation):
    return implementation.capability


@pytest.fixture
def make_ops(implementation):
    """make_ops(op, num_threads) -> the implementation's operators, or a skip where `op` is not declared."""

    def make(op, num_threads=1):
        if op not in implementation.capability.ops:
            pytest.skip(f"{implementation.name} declares no {op}")
        cores = select_platform("cpu").cores
        ops = implementation.make(ComputeShare(tuple(cores[i % len(cores)] for i in range(num_threads))))
        return ops if ops.device.type == "cpu" else OnDevice(ops, ops.device)

    threads = torch.get_num_threads()
    yield make
    torch.set_num_threads(threads)


@pytest.fixture
def interpreted(implementation):
    """Are the kernels interpreted? A program takes milliseconds there."""
    return implementation.name == "triton"


@pytest.fixture
def thin(interpreted):
    """thin(things) -> all of them, or every third where kernels are interpreted."""
    return lambda things: things[::3] if interpreted else things


@pytest.fixture
def reference():
    return ReferenceOps()


@pytest.fixture(params=WEIGHT_DTYPES)
def weight_dtype(request, capability):
    if request.param not in capability.weight_dtypes:
        pytest.skip(f"weights in {request.param} are not declared")
    return request.param


@pytest.fixture(params=tuple(KV_FORMATS))
def kv_dtype(request, capability, interpreted):
    if request.param not in capability.kv_dtypes:
        pytest.skip(f"KV in {request.param} is not declared")
    if interpreted and request.param == "float16":
        pytest.skip("interpreted kernels take time: bfloat16 goes the same way as float16")
    shapes = {"fp8_e4m3": ("gqa", "window", "wide"), "fp8_e5m2": ("gqa",)}.get(request.param, ())
    if interpreted and shapes and request.node.callspec.params.get("shape", "gqa") not in shapes:
        pytest.skip("interpreted kernels take time: 8-bit caches go the way of bfloat16 but for their bits")
    return request.param


@pytest.fixture
def batch_invariant(capability):
    if not capability.batch_invariant:
        pytest.skip("batch invariance is not declared")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(1)
