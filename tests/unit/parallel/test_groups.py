"""Two processes over loopback, and a peer that never comes."""

import subprocess
import sys

import pytest
import torch

from apportion.core.errors import ExecutorDied, InvalidParameter
from apportion.parallel.groups import ParallelGroup, connect

RANK = """
import sys, torch
from apportion.parallel.groups import connect
rank, path = int(sys.argv[1]), sys.argv[2]
group = connect(rank, 2, path, timeout_s=20)
x = torch.arange(6, dtype=torch.float32).view(2, 3) + 10 * rank
assert group.all_gather_last_dim(x).tolist() == [[0, 1, 2, 10, 11, 12], [3, 4, 5, 13, 14, 15]]
assert group.all_reduce(x).tolist() == [[10, 12, 14], [16, 18, 20]]
"""


def test_two_ranks_reduce_and_gather(tmp_path):
    """Four times, for the end of a process is part of it: gloo's threads must be gone before the interpreter is."""
    for attempt in range(4):
        ranks = [subprocess.Popen([sys.executable, "-c", RANK, str(rank), str(tmp_path / f"store{attempt}")]) for rank in range(2)]
        assert [rank.wait(timeout=60) for rank in ranks] == [0, 0]


def test_a_missing_peer_is_named(tmp_path):
    with pytest.raises(ExecutorDied, match=r"rank 0 of 2 .*limit 0\.5 s\)"):
        connect(0, 2, str(tmp_path / "store"), timeout_s=0.5)


def test_a_group_of_one_changes_nothing():
    x = torch.arange(4.0)
    group = ParallelGroup()
    assert group.all_reduce(x) is x and group.all_gather_last_dim(x) is x
    with pytest.raises(InvalidParameter, match="rank 2 is outside"):
        connect(2, 2, "unused")
