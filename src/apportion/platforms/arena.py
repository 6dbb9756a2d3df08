"""Bytes that kernels read for long: the KV cache and packed weights live in them, mapped by other processes where those need them.

Pages are taken when they are first touched. Streaming from pages of 2 MiB is a third faster than from ordinary ones (benchmarks/LOG.md):
private memory gets them by advice, shared memory (counted once, as PSS, however many processes map it) by `collapse` once it is filled.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from contextlib import suppress
from multiprocessing import reduction
from typing import Any

import torch
from torch import Tensor

from apportion.core.errors import InvalidParameter, OutOfMemory

MADV_COLLAPSE = 25  # Linux 6.1: make what is resident huge now, whatever the system's policy for shared memory


class Arena:
    """A mapping of `nbytes` bytes (page aligned) as the uint8 tensor `tensor`; shared, behind the descriptor `fd`, or private (fd -1).

    Give a shared one to a child process by pickling it (multiprocessing passes the descriptor) or by `pass_fds=[arena.fd]` and
    `Arena.attach(fd, nbytes)` there. The mapping ends with its last tensor: `close` drops the arena's own and the descriptor.
    """

    _tensor: Tensor | None = None

    def __init__(self, fd: int, nbytes: int) -> None:
        """Takes over `fd`, whose file holds at least nbytes. Use `create` or `attach`."""
        self._mapping = mmap.mmap(fd, nbytes) if fd >= 0 else mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(OSError):  # advice: a kernel without huge pages refuses it, and nothing is lost
            self._mapping.madvise(mmap.MADV_HUGEPAGE)
        self._tensor = torch.frombuffer(self._mapping, dtype=torch.uint8)
        self.fd = fd
        self.nbytes = nbytes

    @classmethod
    def create(cls, nbytes: int, shared: bool = True) -> Arena:
        """A new one, zero-filled. Errors: InvalidParameter for a size below 1, OutOfMemory where the system refuses it."""
        if nbytes < 1:
            raise InvalidParameter(f"an arena needs at least one byte, got {nbytes}")
        fd = _anonymous_file() if shared else -1
        try:
            if shared:
                os.ftruncate(fd, nbytes)
            return cls(fd, nbytes)
        except (OSError, ValueError, OverflowError) as error:
            if shared:
                os.close(fd)
            raise OutOfMemory(f"an arena of {nbytes} bytes cannot be mapped: {error}") from error

    def collapse(self) -> None:
        """Make the touched pages of a shared arena huge, where the system can. Takes about a second per GiB."""
        if self.fd >= 0:
            with suppress(OSError):  # an older kernel, or no free huge page: the bytes stay as they are
                self._mapping.madvise(MADV_COLLAPSE)

    @classmethod
    def attach(cls, fd: int, nbytes: int) -> Arena:
        """Map an arena made elsewhere; takes over `fd`. Errors: InvalidParameter where the file is shorter than nbytes."""
        size = os.fstat(fd).st_size
        if not 1 <= nbytes <= size:
            raise InvalidParameter(f"the arena behind descriptor {fd} has {size} bytes, {nbytes} were asked for")
        return cls(fd, nbytes)

    @property
    def tensor(self) -> Tensor:
        if self._tensor is None:
            raise InvalidParameter("this arena is closed")
        return self._tensor

    @property
    def resident_bytes(self) -> int:
        """Bytes of a shared arena that have been touched, by any process that maps it."""
        return os.fstat(self.fd).st_blocks * 512

    def close(self) -> None:
        """Drop the descriptor; the bytes live on as long as a tensor over them does. Twice is fine."""
        if self._tensor is not None:
            self._tensor = None
            del self._mapping
            if self.fd >= 0:
                os.close(self.fd)

    def __del__(self) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        if self.fd < 0:
            raise InvalidParameter("a private arena cannot be given to another process: create it with shared=True")
        return _attach_received, (reduction.DupFd(self.fd), self.nbytes)


def _attach_received(fd: Any, nbytes: int) -> Arena:
    return Arena.attach(fd.detach(), nbytes)


def _anonymous_file() -> int:
    """A file without a name, in memory where the system has memfd_create."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("apportion", os.MFD_CLOEXEC)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
