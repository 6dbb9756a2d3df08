"""Thread teams: alone, side by side, waking from sleep."""

import threading
import time

import pytest
import torch

from apportion.kernels.cpu import extension
from apportion.kernels.ops import LinearSpec

if not extension.available():
    pytest.skip(f"{extension.ABSENT}", allow_module_level=True)

from apportion.kernels.cpu.ops import CpuOps

CPU = extension.load()
WEIGHT, X = torch.randn(512, 256), torch.randn(20, 256)


def linear(team):
    made = CpuOps(team).linear(LinearSpec(512, 256))
    made.bind(torch.empty(made.nbytes, dtype=torch.uint8))
    made.load_rows(WEIGHT, 0)
    return made


EXPECTED = linear(CPU.ThreadTeam(1))(X)


@pytest.mark.parametrize("num_threads", [1, 2, 3, 5])
def test_any_number_of_threads(num_threads):
    run = linear(CPU.ThreadTeam(num_threads))
    assert all(torch.equal(run(X), EXPECTED) for _ in range(50))


def test_workers_wake_from_sleep():
    run = linear(CPU.ThreadTeam(2))
    for _ in range(20):
        time.sleep(0.002)  # longer than the spin
        assert torch.equal(run(X), EXPECTED)


def test_teams_side_by_side():
    failures = []

    def call():
        run = linear(CPU.ThreadTeam(2))
        if not all(torch.equal(run(X), EXPECTED) for _ in range(100)):
            failures.append(threading.current_thread())

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_teams_come_and_go():
    for _ in range(100):
        team = CPU.ThreadTeam(3)
        assert team.num_threads == 3
        del team


def test_bad_teams_are_named():
    with pytest.raises(ValueError, match="num_threads is 0"):
        CPU.ThreadTeam(0)
    with pytest.raises(ValueError, match="3 threads got only 2 cores"):
        CPU.ThreadTeam(3, [0, 1])
    with pytest.raises(ValueError, match="core 100000"):
        CPU.ThreadTeam(2, [0, 100000])
