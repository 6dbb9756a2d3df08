import multiprocessing
import os
import pickle
import subprocess
import sys

import pytest
import torch

from apportion.core.errors import InvalidParameter, OutOfMemory
from apportion.platforms import memory
from apportion.platforms.arena import Arena


def _double(arena, done):
    arena.tensor[:1000] *= 2
    done.send(memory.pss_bytes())


def test_a_spawned_process_writes_into_the_same_bytes():
    arena = Arena.create(1 << 20)
    arena.tensor[:1000] = 21
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    child = context.Process(target=_double, args=(arena, there))
    child.start()
    assert here.recv() > 0
    child.join()
    assert (arena.tensor[:1000] == 42).all() and arena.tensor[1000] == 0


def test_a_descriptor_is_enough_to_attach():
    arena = Arena.create(8192)
    code = (
        "import sys; from apportion.platforms.arena import Arena; a = Arena.attach(int(sys.argv[1]), 8192); a.tensor[8191] = 7; a.close()"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(arena.fd)],
        pass_fds=[arena.fd],
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert arena.tensor[8191] == 7


def test_pages_are_taken_when_touched():
    arena = Arena.create(1 << 32)
    assert arena.resident_bytes == 0
    arena.tensor[1 << 31] = 1
    assert 0 < arena.resident_bytes <= 2 << 20


def test_shared_pages_are_counted_once():
    arena = Arena.create(64 << 20)
    arena.tensor.fill_(1)
    alone = memory.pss_bytes()
    other = Arena.attach(os.dup(arena.fd), arena.nbytes)
    other.tensor.sum()
    assert memory.pss_bytes() - alone < 8 << 20


def test_tensors_outlive_close():
    arena = Arena.create(4096)
    view = arena.tensor[:4].view(torch.int32)
    arena.close()
    arena.close()
    view[0] = 9
    assert view.item() == 9
    with pytest.raises(InvalidParameter, match="closed"):
        _ = arena.tensor


def test_without_memfd_a_temporary_file_serves(monkeypatch):
    monkeypatch.delattr(os, "memfd_create")
    arena = Arena.create(4096)
    arena.tensor[0] = 5
    assert Arena.attach(os.dup(arena.fd), 4096).tensor[0] == 5


def test_errors_name_the_size():
    with pytest.raises(InvalidParameter, match="at least one byte"):
        Arena.create(0)
    with pytest.raises(OutOfMemory, match=str(1 << 62)):
        Arena.create(1 << 62)
    arena = Arena.create(4096)
    with pytest.raises(InvalidParameter, match="4096 bytes, 8192 were asked for"):
        Arena.attach(arena.fd, 8192)


def test_a_private_arena_stays_in_its_process():
    arena = Arena.create(3 << 20, shared=False)
    arena.tensor[-1] = 7
    arena.collapse()
    assert arena.tensor.sum() == 7
    with pytest.raises(InvalidParameter, match="private arena"):
        pickle.dumps(arena)


def test_collapse_keeps_the_bytes_of_a_shared_arena():
    arena = Arena.create(5 << 20)
    arena.tensor.copy_(torch.arange(arena.nbytes) % 251)
    arena.collapse()
    assert torch.equal(Arena.attach(os.dup(arena.fd), arena.nbytes).tensor, (torch.arange(arena.nbytes) % 251).to(torch.uint8))
