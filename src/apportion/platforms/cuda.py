"""A GPU of NVIDIA (cuda) or AMD (rocm, by the same face: PyTorch calls both `cuda`): its memory, and graphs of the work queued on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from apportion.core.errors import InvalidParameter, OutOfMemory, Unsupported
from apportion.platforms.cpu import CpuPlatform
from apportion.platforms.platform import Captured, ComputeShare, Fetched

OLDEST = (8, 0)  # compute capability: the first with bfloat16 in its matrix units
GIB = 2**30


class DeviceArena:
    """platforms/arena.Arena on a GPU, of one process."""

    fd = -1

    def __init__(self, nbytes: int, device: torch.device) -> None:
        """Zero-filled. Errors: InvalidParameter for a size below 1, OutOfMemory where the GPU has less."""
        if nbytes < 1:
            raise InvalidParameter(f"an arena needs at least one byte, got {nbytes}")
        try:
            self._tensor: Tensor | None = torch.zeros(nbytes, dtype=torch.uint8, device=device)
        except torch.OutOfMemoryError as error:
            free = torch.cuda.mem_get_info(device)[0]
            raise OutOfMemory(f"{nbytes / GIB:.2f} GiB do not fit on the GPU, which has {free / GIB:.2f} GiB free") from error
        self.nbytes = nbytes

    @property
    def tensor(self) -> Tensor:
        if self._tensor is None:
            raise InvalidParameter("this arena is closed")
        return self._tensor

    @property
    def resident_bytes(self) -> int:
        return self.nbytes

    def collapse(self) -> None:
        """Its pages are what they are."""

    def close(self) -> None:
        self._tensor = None


class CudaPlatform:
    """platforms/platform.Platform for the first GPU that this process sees. Threads of a share are the host's.

    Errors: Unsupported, in one sentence, where there is no GPU, it is of another make than `name`, or it is too old.
    """

    def __init__(self, name: str = "cuda") -> None:
        obstacle = why_not(name)
        if obstacle:
            raise Unsupported(f"device {name}: {obstacle}; take device=cpu")
        self.name = name
        self.depth = 2  # one runs while the next is made ready and queued
        self.device = torch.device("cuda", torch.cuda.current_device())
        self._host = CpuPlatform()
        self._pool: Any = None

    @property
    def num_cores(self) -> int:
        return self._host.num_cores

    def total_memory(self) -> int:
        return int(torch.cuda.mem_get_info(self.device)[1])

    def free_memory(self) -> int:
        return int(torch.cuda.mem_get_info(self.device)[0])

    def create_arena(self, nbytes: int, shared: bool = True) -> Any:
        """Errors: Unsupported for memory that another process could map, besides those of an arena."""
        if shared:
            raise Unsupported("a GPU's memory cannot be shared with worker processes yet; give every lane the executor 'uniproc'")
        return DeviceArena(nbytes, self.device)

    def compute_shares(self, num_threads: Sequence[int]) -> tuple[ComputeShare, ...]:
        """Of the host's threads, not pinned: they queue work and wait."""
        return tuple(ComputeShare(share.cores, pinned=False) for share in self._host.compute_shares(num_threads))

    def upload(self, tensor: Tensor) -> Tensor:
        """From page-locked memory, which the allocator does not hand out again before the copy is done."""
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def fetch(self, tensor: Tensor) -> Fetched:
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        host.copy_(tensor, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return Fetched(host, event)

    def enter(self, share: ComputeShare) -> None:
        torch.cuda.set_device(self.device)

    def capture(self, run: Callable[[], Any]) -> Captured:
        """A CUDA graph of what `run` queues. It is run once before, so that kernels are compiled and buffers made."""
        run()
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            outputs = run()
        self._pool = graph.pool()
        return Captured(graph.replay, outputs)


def why_not(name: str) -> str:
    """Why the first GPU cannot be the device `name`; empty where it can."""
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip or "the CPU alone"
        return f"PyTorch {torch.__version__}, built for {built}, sees no GPU"
    made = "rocm" if torch.version.hip else "cuda"
    if made != name:
        return f"the GPU at hand is a {made} device"
    capability = torch.cuda.get_device_capability()
    if made == "cuda" and capability < OLDEST:
        gpu = torch.cuda.get_device_name()
        return f"{gpu} has compute capability {capability[0]}.{capability[1]}, and bfloat16 kernels need {OLDEST[0]}.{OLDEST[1]} or newer"
    return ""
