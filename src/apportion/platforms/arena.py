"""Bytes that other processes can map: the KV cache and packed weights live in them.

Pages are taken when they are first touched, and counted once (PSS) however many processes map them.
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


class Arena:
    """A shared mapping of `nbytes` bytes (page aligned) behind the file descriptor `fd`, as the uint8 tensor `tensor`.

    Give it to a child process by pickling it (multiprocessing passes the descriptor) or by `pass_fds=[arena.fd]` and
    `Arena.attach(fd, nbytes)` there. The mapping ends with its last tensor: `close` drops the arena's own and the descriptor.
    """

    _tensor: Tensor | None = None

    def __init__(self, fd: int, nbytes: int) -> None:
        """Takes over `fd`, whose file holds at least nbytes. Use `create` or `attach`."""
        mapping = mmap.mmap(fd, nbytes)
        with suppress(OSError):  # advice: a kernel without huge pages refuses it, and nothing is lost
            mapping.madvise(mmap.MADV_HUGEPAGE)
        self._tensor = torch.frombuffer(mapping, dtype=torch.uint8)
        self.fd = fd
        self.nbytes = nbytes

    @classmethod
    def create(cls, nbytes: int) -> Arena:
        """A new one, zero-filled. Errors: InvalidParameter for a size below 1, OutOfMemory where the system refuses it."""
        if nbytes < 1:
            raise InvalidParameter(f"an arena needs at least one byte, got {nbytes}")
        fd = _anonymous_file()
        try:
            os.ftruncate(fd, nbytes)
            return cls(fd, nbytes)
        except (OSError, ValueError, OverflowError) as error:
            os.close(fd)
            raise OutOfMemory(f"an arena of {nbytes} bytes cannot be mapped: {error}") from error

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
        """Bytes that have been touched, by any process that maps it."""
        return os.fstat(self.fd).st_blocks * 512

    def close(self) -> None:
        """Drop the descriptor; the bytes live on as long as a tensor over them does. Twice is fine."""
        if self._tensor is not None:
            self._tensor = None
            os.close(self.fd)

    def __del__(self) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return _attach_received, (reduction.DupFd(self.fd), self.nbytes)


def _attach_received(fd: Any, nbytes: int) -> Arena:
    return Arena.attach(fd.detach(), nbytes)


def _anonymous_file() -> int:
    """A file without a name, in memory where the system has memfd_create."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("apportion", os.MFD_CLOEXEC)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
