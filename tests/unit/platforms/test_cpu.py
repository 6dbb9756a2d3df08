import os
from pathlib import Path

import pytest

from apportion.core.errors import InvalidParameter, Unsupported
from apportion.platforms import cpu, memory
from apportion.platforms.cpu import CpuPlatform
from apportion.platforms.null import NullPlatform
from apportion.platforms.platform import select_platform

GB = 1 << 30


def lay(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine of 16 GB with 12 free; its control groups are laid out by the test."""
    monkeypatch.setattr(memory, "PROC", tmp_path / "proc")
    monkeypatch.setattr(memory, "CGROUP", tmp_path / "cgroup")
    lay(tmp_path, {"proc/meminfo": f"MemTotal: {16 * GB // 1024} kB\nMemAvailable: {12 * GB // 1024} kB\n", "proc/self/cgroup": "0::/\n"})
    return tmp_path


def test_without_limits_the_system_tells(machine):
    assert memory.total_memory() == 16 * GB and memory.free_memory() == 12 * GB


def test_the_tightest_group_version_2_decides(machine):
    lay(
        machine,
        {
            "proc/self/cgroup": "0::/jobs/one\n",
            "cgroup/jobs/memory.max": str(4 * GB),
            "cgroup/jobs/memory.current": str(3 * GB),
            "cgroup/jobs/memory.stat": f"anon 1\ninactive_file {GB}\n",
            "cgroup/jobs/one/memory.max": "max\n",
        },
    )
    assert memory.total_memory() == 4 * GB
    assert memory.free_memory() == 2 * GB  # page cache can be dropped


def test_version_1_is_read_too(machine):
    lay(
        machine,
        {
            "proc/self/cgroup": "4:memory:/job\n0::/\n",
            "cgroup/memory/job/memory.limit_in_bytes": str(GB),
            "cgroup/memory/job/memory.usage_in_bytes": str(2 * GB),
            "cgroup/memory/job/memory.stat": "total_inactive_file 0\n",
        },
    )
    assert memory.total_memory() == GB and memory.free_memory() == 0


def test_a_cpu_quota_limits_the_cores(machine, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    assert CpuPlatform().num_cores == 8
    lay(machine, {"cgroup/cpu.max": "250000 100000\n"})
    assert CpuPlatform().num_cores == 2
    lay(machine, {"cgroup/cpu.max": "max 100000\n"})
    assert CpuPlatform().num_cores == 8


def test_shares_are_disjoint_and_spread_over_physical_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(cpu, "_physical_core", lambda core: (0, core % 4))  # core and core + 4 are siblings
    platform = CpuPlatform()
    assert [s.cores for s in platform.compute_shares([3, 1])] == [(0, 1, 2), (3,)]
    assert [s.cores for s in platform.compute_shares([2, 6])] == [(0, 4), (1, 5, 2, 6, 3, 7)]
    assert all(s.pinned for s in platform.compute_shares([3, 1])) and not any(s.pinned for s in platform.compute_shares([2, 1]))
    with pytest.raises(InvalidParameter, match="9 threads together, 8 cores"):
        platform.compute_shares([4, 5])
    with pytest.raises(InvalidParameter, match="at least one thread"):
        platform.compute_shares([0])


def test_entering_a_share_of_a_full_machine_pins_this_thread():
    before = os.sched_getaffinity(0)
    platform = CpuPlatform()
    try:
        shares = platform.compute_shares([1] * len(platform.cores))
        platform.enter(shares[-1])
        assert os.sched_getaffinity(0) == set(shares[-1].cores)
    finally:
        os.sched_setaffinity(0, before)


def test_this_machine_can_be_read():
    platform = select_platform()
    assert 0 < platform.free_memory() <= platform.total_memory()
    assert 1 <= platform.num_cores <= os.cpu_count()
    with pytest.raises(Unsupported, match="'tpu'"):
        select_platform("tpu")


def test_the_null_platform_is_what_it_is_told():
    platform = NullPlatform(memory=GB, num_cores=3)
    assert platform.free_memory() == GB and [s.cores for s in platform.compute_shares([1, 2])] == [(0,), (1, 2)]
