"""What is said where there is no GPU, or none that serves; with a GPU simulated by what PyTorch reports."""

import logging

import pytest
import torch

from apportion.core.errors import InvalidParameter, OutOfMemory, Unsupported
from apportion.kernels import dispatch, triton
from apportion.platforms import platform as platforms
from apportion.platforms.cuda import CudaPlatform, DeviceArena, why_not
from apportion.platforms.platform import select_platform

GIB = 2**30


@pytest.fixture
def gpu(monkeypatch):
    """gpu(capability, hip): PyTorch reports such a GPU; memory stays the host's."""

    def simulate(capability=(9, 0), hip=None):
        cuda = torch.cuda
        monkeypatch.setattr(cuda, "is_available", lambda: True)
        monkeypatch.setattr(cuda, "get_device_capability", lambda *device: capability)
        monkeypatch.setattr(cuda, "get_device_name", lambda *device: "Old One")
        monkeypatch.setattr(cuda, "current_device", lambda: 0)
        monkeypatch.setattr(cuda, "mem_get_info", lambda device=None: (3 * GIB, 80 * GIB))
        monkeypatch.setattr(torch.version, "hip", hip)

    return simulate


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_sentence_says_so():
    for name in ("cuda", "rocm"):
        with pytest.raises(Unsupported, match=f"device {name}: PyTorch .* sees no GPU; take device=cpu"):
            select_platform(name)
    assert select_platform("auto").name == "cpu"


def test_too_old_a_gpu_is_named(gpu, caplog):
    gpu((7, 5))
    with pytest.raises(Unsupported, match=r"Old One has compute capability 7.5, and bfloat16 kernels need 8.0 or newer; take device=cpu"):
        select_platform("cuda")
    with caplog.at_level(logging.WARNING, "apportion"):
        assert select_platform("auto").name == "cpu"
    assert "the CPU is taken: Old One" in caplog.text, "never silently"


def test_auto_takes_a_gpu_that_serves_and_says_when_triton_is_missing(gpu, monkeypatch, caplog):
    gpu()
    monkeypatch.setattr(platforms, "find_spec", lambda name: object())
    chosen = select_platform("auto")
    assert (chosen.name, chosen.free_memory(), chosen.total_memory()) == ("cuda", 3 * GIB, 80 * GIB)
    monkeypatch.setattr(platforms, "find_spec", lambda name: None)
    with caplog.at_level(logging.WARNING, "apportion"):
        assert select_platform("auto").name == "cpu"
    assert "triton is not installed" in caplog.text


def test_a_gpu_that_is_insisted_on_without_triton_says_what_to_install(gpu, monkeypatch):
    gpu()
    monkeypatch.setattr(triton, "find_spec", lambda name: None)
    monkeypatch.setattr(triton, "interpreted", lambda: False)
    monkeypatch.setattr(dispatch, "implementations", triton.implementations)
    with pytest.raises(Unsupported, match=r"no kernels for device 'cuda'.*triton is not installed; pip install 'triton==3.6"):
        dispatch.choose("cuda")


def test_rocm_is_cuda_by_another_name(gpu):
    gpu((9, 4), hip="6.3")
    assert select_platform("rocm").name == "rocm" and not why_not("rocm")
    with pytest.raises(Unsupported, match="the GPU at hand is a rocm device"):
        select_platform("cuda")


def test_a_share_is_of_host_threads_and_memory_is_of_one_process(gpu):
    gpu()
    platform = CudaPlatform()
    (share,) = platform.compute_shares([1])
    assert share.num_threads == 1 and not share.pinned
    with pytest.raises(Unsupported, match="executor 'uniproc'"):
        platform.create_arena(1 << 20)


def test_memory_that_does_not_fit_is_said_in_gib(gpu, monkeypatch):
    gpu()

    def refuse(*shape, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "zeros", refuse)
    with pytest.raises(OutOfMemory, match=r"5.00 GiB do not fit on the GPU, which has 3.00 GiB free"):
        DeviceArena(5 * GIB, torch.device("cuda", 0))


def test_an_arena_lives_until_it_is_closed():
    arena = DeviceArena(512, torch.device("cpu"))
    assert arena.tensor.shape == (512,) and not arena.tensor.any() and arena.resident_bytes == 512
    arena.collapse()
    arena.close()
    with pytest.raises(InvalidParameter, match="closed"):
        _ = arena.tensor
    with pytest.raises(InvalidParameter, match="at least one byte"):
        DeviceArena(0, torch.device("cpu"))
