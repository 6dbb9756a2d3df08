"""Every implementation that dispatch knows, one after the other. A skip always quotes a declared capability."""

import pytest
import torch

from apportion.core.kv_spec import KV_FORMATS
from apportion.kernels.dispatch import implementations
from apportion.kernels.ops import WEIGHT_DTYPES
from apportion.kernels.reference.ops import ReferenceOps
from apportion.platforms.platform import ComputeShare, select_platform


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
        cores = select_platform().cores
        return implementation.make(ComputeShare(tuple(cores[i % len(cores)] for i in range(num_threads))))

    threads = torch.get_num_threads()
    yield make
    torch.set_num_threads(threads)


@pytest.fixture
def reference():
    return ReferenceOps()


@pytest.fixture(params=WEIGHT_DTYPES)
def weight_dtype(request, capability):
    if request.param not in capability.weight_dtypes:
        pytest.skip(f"weights in {request.param} are not declared")
    return request.param


@pytest.fixture(params=tuple(KV_FORMATS))
def kv_dtype(request, capability):
    if request.param not in capability.kv_dtypes:
        pytest.skip(f"KV in {request.param} is not declared")
    return request.param


@pytest.fixture
def batch_invariant(capability):
    if not capability.batch_invariant:
        pytest.skip("batch invariance is not declared")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(1)
