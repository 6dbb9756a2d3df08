"""Python objects over a Unix socket between an executor and its worker; an Arena inside them travels as its file descriptor."""

from __future__ import annotations

import io
import pickle
import select
import socket
import struct
from typing import Any

from apportion.platforms.arena import Arena

_HEADER = struct.Struct("<QI")  # bytes of the pickle, descriptors behind it


class Channel:
    """Both ends are processes of this program: what arrives is trusted. Errors: EOFError once the other end is gone."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end

    def send(self, message: Any) -> None:
        buffer = io.BytesIO()
        pickler = _ArenaPickler(buffer, protocol=pickle.HIGHEST_PROTOCOL)
        pickler.dump(message)
        payload = buffer.getbuffer()
        try:
            self._socket.sendall(_HEADER.pack(len(payload), len(pickler.fds)))
            self._socket.sendall(payload)
            if pickler.fds:
                socket.send_fds(self._socket, [b"\0"], pickler.fds)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise EOFError("the other end is gone") from error

    def receive(self) -> Any:
        size, num_fds = _HEADER.unpack(self._read(_HEADER.size))
        payload = self._read(size)
        fds = socket.recv_fds(self._socket, 1, num_fds)[1] if num_fds else []
        return _ArenaUnpickler(io.BytesIO(payload), fds).load()

    def has_message(self) -> bool:
        """Whether `receive` has something to begin with, or the other end is gone."""
        return bool(select.select([self._socket], [], [], 0)[0])

    def close(self) -> None:
        self._socket.close()

    def _read(self, size: int) -> bytearray:
        data = bytearray(size)
        view, filled = memoryview(data), 0
        while filled < size:
            try:
                count = self._socket.recv_into(view[filled:])
            except ConnectionResetError:
                count = 0
            if count == 0:
                raise EOFError("the other end is gone")
            filled += count
        return data


class _ArenaPickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, protocol: int) -> None:
        super().__init__(file, protocol)
        self.fds: list[int] = []

    def persistent_id(self, obj: Any) -> tuple[int, int] | None:
        if not isinstance(obj, Arena):
            return None
        self.fds.append(obj.fd)
        return len(self.fds) - 1, obj.nbytes


class _ArenaUnpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, fds: list[int]) -> None:
        super().__init__(file)
        self._fds = fds

    def persistent_load(self, pid: tuple[int, int]) -> Arena:
        index, nbytes = pid
        return Arena.attach(self._fds[index], nbytes)
